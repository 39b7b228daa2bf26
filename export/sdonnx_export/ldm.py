"""The original single-file layout (CompVis/latent-diffusion), as CivitAI serves it: keys to parts and configs.

Names and configs follow from the keys and shapes. What those can't tell, such as the number of heads, has Stable
Diffusion 1's value, unless the original config lies beside the file under the same name with ``.yaml``.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from sdonnx_runtime.errors import ExportError

from sdonnx_export.parts import Checkpoint, Part, Weight, current_name, is_needed

Weights = Mapping[str, Weight]

_UNET, _VAE, _TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
_IGNORED = (
    "model_ema.", "betas", "alphas_cumprod", "sqrt_", "log_one_minus", "posterior_", "logvar", "lvlb_weights",
    "cond_stage_model.logit_scale", "cond_stage_model.text_projection", "first_stage_model.loss.", "safety_checker.",
    "embedding_manager.", "denoiser.sigmas", "scale_factor", "v_pred", "ztsnr",
)  # fmt: skip
"""Averages, schedule tables and the like, which training leaves in a file and inference has no use for."""

_SIGNS = (
    (r"^conditioner\.embedders\.", "an SDXL checkpoint"),
    (r"^cond_stage_model\.model\.", "a Stable Diffusion 2 checkpoint"),
    (r"(^|\.)(double_blocks|joint_blocks)\.", "a Flux or Stable Diffusion 3 checkpoint"),
    (r"^(lora_|.*\.lora_(up|down|A|B)\.|.*\.hada_w1)", "a LoRA"),
    (r"^(control_model|input_hint_block|controlnet_|.*\.zero_convs\.)", "a ControlNet"),
    (r"^(emb_params|string_to_param|clip_[lg])$", "a textual inversion"),
    (r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|mid)\b", "a VAE alone"),
)
"""How files that are not Stable Diffusion 1 checkpoints give themselves away."""


def split_checkpoint(path: Path, weights: Weights) -> Checkpoint:
    """The parts of a whole Stable Diffusion 1 model.

    Raises:
        ExportError: it is something else, or parts of it are missing or unknown.
    """
    text = {**_below(weights, _TEXT)}
    unet, vae = _below(weights, _UNET), _below(weights, _VAE)
    unknown = [name for name in weights if not name.startswith((_UNET, _VAE, _TEXT, *_IGNORED))]
    if unknown or not (unet and vae and text):
        raise ExportError(_what_it_is(path, weights, unknown))
    original = _original_config(path)
    parts = {
        "unet": _unet(unet, original),
        "vae": _vae(vae, original),
        "text_encoder": _text_encoder(text),
    }
    return Checkpoint(
        source=path.name,
        revision=None,
        parts=parts,
        scheduler=_scheduler(original),
        tokenizers={"tokenizer": _tokenizer(path, parts["text_encoder"].config["vocab_size"])},
        settings={"_class_name": "StableDiffusionPipeline"},
    )


def split_vae(path: Path, weights: Weights) -> Part:
    """A VAE in a file of its own or in a whole checkpoint's, in LDM's names or diffusers'.

    Raises:
        ExportError: there is none in it.
    """
    found = _below(weights, _VAE) or {
        name: w for name, w in weights.items() if not name.startswith(("loss.", "model_ema."))
    }
    if "decoder.conv_in.weight" not in found:
        raise ExportError(f"{path} holds no VAE; expected a file with 'decoder.conv_in.weight'")
    return _vae(found, _original_config(path))


def _below(weights: Weights, prefix: str) -> dict[str, Weight]:
    return {
        name.removeprefix(prefix): weight
        for name, weight in weights.items()
        if name.startswith(prefix) and not name.startswith(_IGNORED)
    }


def _what_it_is(path: Path, weights: Weights, unknown: list[str]) -> str:
    for sign, kind in _SIGNS:
        if any(re.search(sign, name) for name in (unknown or weights)):
            return f"{path} looks like {kind}; what can be exported is a whole Stable Diffusion 1 model"
    if unknown:
        listed = ", ".join(sorted(unknown)[:3])
        return f"{path} has {len(unknown)} weights that no Stable Diffusion 1 model has ({listed})"
    present = {"a U-Net": _UNET, "a VAE": _VAE, "a text encoder": _TEXT}
    missing = [what for what, prefix in present.items() if not _below(weights, prefix)]
    return f"{path} lacks {' and '.join(missing)}; what can be exported is a whole Stable Diffusion 1 model"


def _original_config(path: Path) -> Mapping[str, Any]:
    """The parameters in ``model.yaml`` beside ``model.safetensors``, flat; none if there is no such file."""
    beside = path.with_suffix(".yaml")
    if not beside.is_file():
        return {}
    try:
        model = yaml.safe_load(beside.read_text(encoding="utf-8"))["model"]["params"]
        unet, vae = (model[key]["params"] for key in ("unet_config", "first_stage_config"))
        return {
            **vae.get("ddconfig", {}),
            **unet,
            **{k: v for k, v in model.items() if not isinstance(v, dict)},
        }
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise ExportError(f"{beside} is no original Stable Diffusion config; mend it or move it away") from None


def _unet(weights: Weights, original: Mapping[str, Any]) -> Part:
    names, shape = _unet_names(weights), {}
    renamed: dict[str, Weight] = {}
    for name, weight in weights.items():
        block = next((old for old in _block_prefixes(name) if old in names), None)
        if block is None:
            raise ExportError(f"the U-Net's '{name}' has no place in a Stable Diffusion 1 model")
        rest = name.removeprefix(block)
        inner = rest if "attentions" in names[block] else _replaced(rest, _RESNET)
        renamed[names[block] + inner] = weight
    shape = {name: weight.shape for name, weight in renamed.items()}
    return Part(config=_unet_config(shape, original), weights=renamed)


def _block_prefixes(name: str) -> Iterable[str]:
    """``input_blocks.1.0.in_layers.0.weight`` belongs under ``input_blocks.1.0.``; the longest first."""
    parts = name.split(".")
    return (".".join(parts[:count]) + "." for count in (3, 2))


_RESNET = (
    ("in_layers.0.", "norm1."),
    ("in_layers.2.", "conv1."),
    ("emb_layers.1.", "time_emb_proj."),
    ("out_layers.0.", "norm2."),
    ("out_layers.3.", "conv2."),
    ("skip_connection.", "conv_shortcut."),
    ("op.", "conv."),
)


def _unet_names(weights: Weights) -> dict[str, str]:
    """What each numbered block of the U-Net is called in diffusers."""
    names = {
        "time_embed.0.": "time_embedding.linear_1.",
        "time_embed.2.": "time_embedding.linear_2.",
        "input_blocks.0.0.": "conv_in.",
        "middle_block.0.": "mid_block.resnets.0.",
        "middle_block.1.": "mid_block.attentions.0.",
        "middle_block.2.": "mid_block.resnets.1.",
        "out.0.": "conv_norm_out.",
        "out.2.": "conv_out.",
    }
    for side, there, sampler in (("input", "down", "downsamplers"), ("output", "up", "upsamplers")):
        level = layer = 0
        for index in range(1 if side == "input" else 0, _count(weights, rf"{side}_blocks\.(\d+)\.")):
            place, target = f"{side}_blocks.{index}.", f"{there}_blocks.{level}."
            resizes = ""
            for slot in ("0.", "1.", "2."):
                if f"{place}{slot}op.weight" in weights or f"{place}{slot}conv.weight" in weights:
                    resizes = slot
                elif f"{place}{slot}in_layers.0.weight" in weights:
                    names[place + slot] = f"{target}resnets.{layer}."
                elif f"{place}{slot}norm.weight" in weights:
                    names[place + slot] = f"{target}attentions.{layer}."
            layer += 1
            if resizes:
                names[place + resizes] = f"{target}{sampler}.0."
                level, layer = level + 1, 0
    return names


def _count(names: Iterable[str], pattern: str) -> int:
    """How many numbers ``pattern`` finds, counting from 0."""
    found = (re.match(pattern, name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _unet_config(shapes: Mapping[str, tuple[int, ...]], original: Mapping[str, Any]) -> dict[str, Any]:
    levels = _count(shapes, r"down_blocks\.(\d+)\.")
    channels = [shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)]
    attends = {
        side: [any(name.startswith(f"{side}_blocks.{level}.attentions.") for name in shapes) for level in range(levels)]
        for side in ("down", "up")
    }
    contexts = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    projections = {len(shape) for name, shape in shapes.items() if name.endswith("proj_in.weight")}
    if len(contexts) != 1 or len(projections) != 1:
        raise ExportError(
            "the U-Net has no cross-attention to text, or several kinds of it; it is none of Stable Diffusion 1"
        )
    heads: Any = original.get("num_heads", 8)
    if original.get("num_head_channels", -1) > 0:
        heads = [width // original["num_head_channels"] for width in channels]
    return {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": heads,
        "block_out_channels": channels,
        "cross_attention_dim": contexts.pop(),
        "down_block_types": ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in attends["down"]],
        "in_channels": shapes["conv_in.weight"][1],
        "layers_per_block": [_count(shapes, rf"down_blocks\.{level}\.resnets\.(\d+)\.") for level in range(levels)],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if "mid_block.resnets.0.conv1.weight" in shapes else None,
        "out_channels": shapes["conv_out.weight"][0],
        "sample_size": original.get("image_size", 64),
        "transformer_layers_per_block": [
            _count(shapes, rf"down_blocks\.{level}\.attentions\.0\.transformer_blocks\.(\d+)\.") or 1
            for level in range(levels)
        ],
        "up_block_types": ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in attends["up"]],
        "use_linear_projection": projections == {2},
    }


def _vae(weights: Weights, original: Mapping[str, Any]) -> Part:
    levels = _count(weights, r"encoder\.down\.(\d+)\.") or _count(weights, r"encoder\.down_blocks\.(\d+)\.")
    renamed: dict[str, Weight] = {}
    for name, weight in weights.items():
        name = re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}", name)
        name = current_name(_replaced(name, _VAE_NAMES))
        renamed[name] = _flat(weight) if re.search(r"attentions\.0\.to_.*weight", name) else weight
    shapes = {name: weight.shape for name, weight in renamed.items()}
    config = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "layers_per_block": _count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "scaling_factor": original.get("scale_factor", 0.18215),
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
    }
    return Part(config=config, weights=renamed)


_VAE_NAMES = (
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
)


def _replaced(name: str, replacements: Iterable[tuple[str, str]]) -> str:
    for pattern, new in replacements:
        name = re.sub(pattern, new, name)
    return name


def _flat(weight: Weight) -> Weight:
    """A 1x1 convolution's kernel as the matrix that it is."""
    if len(weight.shape) == 2:
        return weight
    return replace(weight, shape=weight.shape[:2], read=lambda: weight.read().reshape(weight.shape[:2]))


def _text_encoder(weights: Weights) -> Part:
    renamed = {current_name(name): w for name, w in weights.items() if is_needed(name, "text_encoder")}
    shapes = {name: weight.shape for name, weight in renamed.items()}
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    config = {
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "model_type": "clip_text_model",
        "num_attention_heads": width // 64,  # in every CLIP
        "num_hidden_layers": _count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        "vocab_size": vocabulary,
    }
    return Part(config=config, weights=renamed)


def _scheduler(original: Mapping[str, Any]) -> dict[str, Any]:
    """Stable Diffusion 1.5's, but for what the original config says."""
    return {
        "_class_name": "PNDMScheduler",
        "beta_end": original.get("linear_end", 0.012),
        "beta_schedule": "scaled_linear",
        "beta_start": original.get("linear_start", 0.00085),
        "num_train_timesteps": original.get("timesteps", 1000),
        "prediction_type": "v_prediction" if original.get("parameterization") == "v" else "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }


def _tokenizer(path: Path, vocabulary: int) -> Path | str:
    """Where the tokenizer's files are: beside the checkpoint if it has a vocabulary of its own; or the pad token."""
    if all((path.parent / name).is_file() for name in ("vocab.json", "merges.txt")):
        return path.parent
    if vocabulary == 49408:
        return "<|endoftext|>"
    raise ExportError(
        f"{path} has a vocabulary of {vocabulary} tokens, CLIP's has 49408; put its vocab.json and merges.txt beside it"
    )
