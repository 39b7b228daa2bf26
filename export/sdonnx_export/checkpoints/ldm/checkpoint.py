"""Read the original single-file layout (CompVis and Stability AI), as on CivitAI, into components and configs.

Families, keys and configs follow from the file's keys and shapes. What those can't tell, such as the number of heads,
is as in the published models, unless the original config has it: ``model.yaml`` for ``model.safetensors``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.packages.families import FAMILIES, Family

from sdonnx_export.checkpoint_model import Checkpoint, Part
from sdonnx_export.checkpoints.few_steps import few_steps
from sdonnx_export.checkpoints.ldm.keys import Weights, with_prefix
from sdonnx_export.checkpoints.ldm.text_encoder import read_clip, read_open_clip
from sdonnx_export.checkpoints.ldm.unet import read_unet
from sdonnx_export.checkpoints.ldm.vae import read_vae
from sdonnx_export.checkpoints.unsupported import EXPORTABLE, unsupported_files

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_IGNORED = (
    "model_ema.", "betas", "alphas_cumprod", "sqrt_", "log_one_minus", "posterior_", "logvar", "lvlb_weights",
    "cond_stage_model.logit_scale", "cond_stage_model.text_projection", "conditioner.embedders.0.logit_scale",
    "conditioner.embedders.0.text_projection", "first_stage_model.loss.", "safety_checker.", "embedding_manager.",
    "denoiser.sigmas", "scale_factor", "depth_model.", "global_step", "v_pred", "ztsnr",
)  # fmt: skip
"""Prefixes of what training leaves in a file and inference doesn't use."""


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The layout of a family's single files, and what their keys don't tell."""

    family: Family
    text_encoders: Mapping[str, str]
    """Prefix of each text encoder's keys; they identify the family."""
    pipelines: Mapping[int, str]
    """diffusers' class for each number of input channels of the U-Net."""
    settings: Mapping[str, Any]
    """Arguments of that class."""
    reads_image_size: bool = False
    """Whether ``image_size`` of the original config is the sample size; in later families it has no meaning."""
    name_of_512: str | None = None
    """Pattern of the names of files with a model for 512 pixels, where the family's is for more."""
    lcm_pipeline: str | None = None
    """diffusers' class for a U-Net that embeds the guidance scale; None if that is the same."""


_SD_PIPELINES = {
    4: "StableDiffusionPipeline",
    9: "StableDiffusionInpaintPipeline",
    8: "StableDiffusionInstructPix2PixPipeline",
    5: "StableDiffusionDepth2ImgPipeline",
}
_LCM_PIPELINE = "LatentConsistencyModelPipeline"
_EMPTY = "force_zeros_for_empty_prompt"

_LAYOUTS = (
    _Layout(
        family=FAMILIES["sd1"],
        text_encoders={"text_encoder": "cond_stage_model.transformer."},
        pipelines=_SD_PIPELINES,
        settings={},
        reads_image_size=True,
        lcm_pipeline=_LCM_PIPELINE,
    ),
    _Layout(
        family=FAMILIES["sd2"],
        text_encoders={"text_encoder": "cond_stage_model.model."},
        pipelines=_SD_PIPELINES,
        settings={},
        lcm_pipeline=_LCM_PIPELINE,
    ),
    _Layout(
        family=FAMILIES["sdxl"],
        text_encoders={
            "text_encoder": "conditioner.embedders.0.transformer.",
            "text_encoder_2": "conditioner.embedders.1.model.",
        },
        pipelines={4: "StableDiffusionXLPipeline", 9: "StableDiffusionXLInpaintPipeline"},
        settings={_EMPTY: True},
        name_of_512=r"sd[-_]?xl[-_]?turbo",
    ),
    _Layout(
        family=FAMILIES["sdxl-refiner"],
        text_encoders={"text_encoder_2": "conditioner.embedders.0.model."},
        pipelines={4: "StableDiffusionXLImg2ImgPipeline"},
        settings={"requires_aesthetics_score": True, _EMPTY: False},
    ),
)


def split_checkpoint(path: Path, weights: Weights) -> Checkpoint:
    """Split a whole Stable Diffusion model into its components.

    Raises:
        ExportError: it is something else, or components of it are missing or unknown.
    """
    layout = _find_layout(path, weights)
    original = _read_original_config(path)
    try:
        parts = _split(layout, weights, original)
    except KeyError as missing:
        raise ExportError(f"{path} lacks the weight {missing}; download it again") from None
    unet = parts["unet"].config
    pipeline = _pipeline(path, layout, unet)
    prediction = _prediction_type(path, layout, weights, original, unet["in_channels"])
    size = _sample_size(path, layout, original, prediction)
    return Checkpoint(
        source=path.name,
        revision=None,
        parts={**parts, "unet": replace(parts["unet"], config={**unet, "sample_size": size})},
        scheduler=_scheduler(path, layout, weights, original, prediction, lcm="time_cond_proj_dim" in unet),
        tokenizers={
            name.replace("text_encoder", "tokenizer"): _tokenizer(path, part.config)
            for name, part in parts.items()
            if name.startswith("text_encoder")
        },
        settings={"_class_name": pipeline, **layout.settings},
        defaults=few_steps(path.stem),
    )


def split_vae(path: Path, weights: Weights) -> Part:
    """Read a VAE from a file of its own or a whole checkpoint's, with LDM's keys or diffusers'.

    Its scaling factor is the original config's or the family's; a VAE alone without that config has none.

    Raises:
        ExportError: the file has no VAE.
    """
    weights = {name: weight for name, weight in weights.items() if not name.startswith(("loss.", *_IGNORED))}
    vae = with_prefix(weights, _VAE) or weights
    if "decoder.conv_in.weight" not in vae:
        raise ExportError(f"{path} has no VAE; expected a file with 'decoder.conv_in.weight'")
    layout = next((each for each in _LAYOUTS if _has_text_encoders(each, weights)), None)
    try:
        return read_vae(vae, _read_original_config(path).get("scale_factor", layout and layout.family.scaling_factor))
    except KeyError as missing:
        raise ExportError(f"{path} lacks the weight {missing}; download it again") from None


def _has_text_encoders(layout: _Layout, weights: Weights) -> bool:
    return all(any(name.startswith(prefix) for name in weights) for prefix in layout.text_encoders.values())


def _find_layout(path: Path, weights: Weights) -> _Layout:
    message = unsupported_files(path, weights)
    if message is not None:
        raise ExportError(message)
    layout = next((each for each in _LAYOUTS if _has_text_encoders(each, weights)), None)
    layouts = _LAYOUTS if layout is None else (layout,)
    text_encoders = tuple(prefix for each in layouts for prefix in each.text_encoders.values())
    unknown = sorted(name for name in weights if not name.startswith((_UNET, _VAE, *text_encoders, *_IGNORED)))
    if unknown:
        listed = ", ".join(unknown[:3])
        raise ExportError(f"{path} has {len(unknown)} unexpected keys ({listed}); {EXPORTABLE}")
    expected = {"a U-Net": _UNET, "a VAE": _VAE}
    missing = [what for what, prefix in expected.items() if not with_prefix(weights, prefix)]
    if layout is None:
        has_any = any(name.startswith(text_encoders) for name in weights)
        missing.append("one text encoder" if has_any else "a text encoder")
    if missing or layout is None:
        raise ExportError(f"{path} lacks {' and '.join(missing)}; {EXPORTABLE}")
    return layout


def _split(layout: _Layout, weights: Weights, original: Mapping[str, Any]) -> dict[str, Part]:
    family = layout.family
    used = {name: weight for name, weight in weights.items() if not name.startswith(_IGNORED)}
    parts = {
        "unet": read_unet(with_prefix(used, _UNET), original, heads=family.attention_heads),
        "vae": read_vae(with_prefix(used, _VAE), original.get("scale_factor", family.scaling_factor)),
    }
    for name, prefix in layout.text_encoders.items():
        text_encoder = with_prefix(used, prefix)
        is_open_clip = prefix.endswith(".model.")
        projected = family.time_ids > 0
        parts[name] = read_open_clip(text_encoder, projected=projected) if is_open_clip else read_clip(text_encoder)
    if family.time_ids:
        pooled_width = parts["text_encoder_2"].config["projection_dim"]
        parts["unet"] = _with_sdxl_conditioning(parts["unet"], pooled_width, family.time_ids)
    elif "add_embedding.linear_1.weight" in parts["unet"].weights:
        raise ExportError("unexpected key 'label_emb': not a U-Net of Stable Diffusion 1 or 2")
    return parts


def _with_sdxl_conditioning(unet: Part, pooled_width: int, time_ids: int) -> Part:
    """Add the keys for pooled text and time ids to the U-Net's config."""
    width = unet.weights["add_embedding.linear_1.weight"].shape[1]
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (width - pooled_width) // time_ids,
        "projection_class_embeddings_input_dim": width,
    }
    return replace(unet, config={**unet.config, **added})


def _pipeline(path: Path, layout: _Layout, unet: Mapping[str, Any]) -> str:
    channels = unet["in_channels"]
    if channels not in layout.pipelines:
        known = " or ".join(str(each) for each in sorted(layout.pipelines))
        raise ExportError(
            f"{path} has a U-Net of {channels} input channels; expected {known} in its family; give another checkpoint"
        )
    if "time_cond_proj_dim" in unet and channels == 4 and layout.lcm_pipeline is not None:
        return layout.lcm_pipeline
    return layout.pipelines[channels]


def _sample_size(path: Path, layout: _Layout, original: Mapping[str, Any], prediction: str) -> int:
    """Return width and height of the latents that the U-Net was trained on."""
    if layout.reads_image_size and "image_size" in original:
        return original["image_size"]
    if layout.name_of_512 is not None and re.match(layout.name_of_512, path.name.lower()):
        return 64
    sizes = layout.family.sample_sizes
    return sizes.get(prediction, sizes["epsilon"])


def _prediction_type(path: Path, layout: _Layout, weights: Weights, original: Mapping[str, Any], channels: int) -> str:
    """Return what the file or its original config says, else the family's default, else epsilon.

    Of a family whose default is v, models for 512 pixels predict epsilon: those with extra input channels, Turbo, and
    those that the training step or the name tells.
    """
    if original.get("parameterization") == "v" or "v_pred" in weights:
        return "v_prediction"
    if re.search(r"lightning_1step_x0", path.name.lower()):
        return "sample"
    step = weights.get("global_step")
    is_512 = step is not None and int(step.read().max()) == 875000
    is_512 = is_512 or channels != 4 or bool(re.search(r"(?<!\d)512(?!\d)|turbo", path.name.lower()))
    return "epsilon" if original or is_512 else next(iter(layout.family.sample_sizes))


def _scheduler(
    path: Path, layout: _Layout, weights: Weights, original: Mapping[str, Any], prediction: str, *, lcm: bool
) -> dict[str, Any]:
    """Return the family's published scheduler config, with the values of the original config."""
    config: dict[str, Any] = {
        "beta_end": original.get("linear_end", 0.012),
        "beta_schedule": "scaled_linear",
        "beta_start": original.get("linear_start", 0.00085),
        "num_train_timesteps": original.get("timesteps", 1000),
        "prediction_type": prediction,
    }
    if lcm:
        return {"_class_name": "LCMScheduler", **config, "original_inference_steps": 50, "set_alpha_to_one": True}
    config["steps_offset"] = 1
    is_few_steps, zero_snr = bool(few_steps(path.stem)), "ztsnr" in weights
    if layout.family.time_ids or is_few_steps or zero_snr:
        config |= {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "use_karras_sigmas": False}
        # Few-step models were distilled at trailing timesteps; zero terminal SNR is at the last one (arXiv:2305.08891).
        config["timestep_spacing"] = "trailing" if is_few_steps or zero_snr else "leading"
        return {**config, "rescale_betas_zero_snr": True} if zero_snr else config
    return {"_class_name": "PNDMScheduler", **config, "set_alpha_to_one": False, "skip_prk_steps": True}


def _tokenizer(path: Path, encoder: Mapping[str, Any]) -> Path | str:
    """Return the directory of a tokenizer next to the checkpoint; else the pad token of CLIP's own."""
    if all((path.parent / name).is_file() for name in ("vocab.json", "merges.txt")):
        return path.parent
    vocab_size = encoder["vocab_size"]
    if vocab_size == 49408:
        return "!" if encoder["hidden_act"] == "gelu" else "<|endoftext|>"
    raise ExportError(
        f"{path} has a vocabulary of {vocab_size} tokens, CLIP's has 49408; add its vocab.json and merges.txt"
    )


def _read_original_config(path: Path) -> Mapping[str, Any]:
    """Return the parameters of ``model.yaml`` for ``model.safetensors``, flattened; empty without that file."""
    config = path.with_suffix(".yaml")
    if not config.is_file():
        return {}
    try:
        model = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["params"]
        unet = model["unet_config" if "unet_config" in model else "network_config"]["params"]
        vae = model["first_stage_config"]["params"]
        scaling = str(model.get("denoiser_config", {}).get("params", {}).get("scaling_config", {}).get("target", ""))
        return {
            **vae.get("ddconfig", {}),
            **unet,
            **({"parameterization": "v"} if scaling.endswith(".VScaling") else {}),
            **{k: v for k, v in model.items() if not isinstance(v, dict)},
        }
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise ExportError(f"{config} is not an original Stable Diffusion config; fix or remove it") from None
