"""The original single-file layout (CompVis and Stability AI), as CivitAI serves it: its keys to parts and configs.

Families, names and configs follow from the keys and shapes. What those can't tell, such as the number of heads, has
the published models' value, unless the original config lies beside the file under the same name with ``.yaml``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from sdonnx_runtime.errors import ExportError

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
"""Averages, schedule tables and the like, which training leaves in a file, and what is no part of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the layout of a family is, and what its published models have that keys don't tell."""

    texts: Mapping[str, str]
    """Where each text encoder is; that tells the family."""
    pipelines: Mapping[int, str]
    """The class in diffusers for each number of channels that its U-Nets take."""
    settings: Mapping[str, Any]
    heads: int | None = None
    """At each level; None is one for 64 channels."""
    size: int = 64
    """Width and height it was trained at, in latent cells."""
    scaling_factor: float = 0.18215
    ids: int = 0
    """Sizes, crops and scores added to the time."""


_SD = {
    4: "StableDiffusionPipeline",
    9: "StableDiffusionInpaintPipeline",
    8: "StableDiffusionInstructPix2PixPipeline",
    5: "StableDiffusionDepth2ImgPipeline",
}
_EMPTY = "force_zeros_for_empty_prompt"

_SD1 = Family(texts={"text_encoder": "cond_stage_model.transformer."}, pipelines=_SD, settings={}, heads=8)
_SD2 = Family(texts={"text_encoder": "cond_stage_model.model."}, pipelines=_SD, settings={})
_XL = Family(
    texts={
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    pipelines={4: "StableDiffusionXLPipeline", 9: "StableDiffusionXLInpaintPipeline"},
    settings={_EMPTY: True},
    size=128,
    scaling_factor=0.13025,
    ids=6,
)
_REFINER = Family(
    texts={"text_encoder_2": "conditioner.embedders.0.model."},
    pipelines={4: "StableDiffusionXLImg2ImgPipeline"},
    settings={"requires_aesthetics_score": True, _EMPTY: False},
    size=128,
    scaling_factor=0.13025,
    ids=5,
)


def split_checkpoint(path: Path, weights: Weights) -> Checkpoint:
    """The parts of a whole Stable Diffusion model.

    Raises:
        ExportError: it is something else, or parts of it are missing or unknown.
    """
    family = _family(path, weights)
    original = _original_config(path)
    try:
        parts = _parts(family, weights, original)
    except KeyError as missing:
        raise ExportError(f"{path} lacks the weight {missing}; download it again") from None
    unet = parts["unet"].config
    pipeline = _pipeline(path, family, unet)
    prediction = _prediction_type(path, family, weights, original, unet["in_channels"])
    return Checkpoint(
        source=path.name,
        revision=None,
        parts={**parts, "unet": _sized(path, family, parts["unet"], original, prediction)},
        scheduler=_scheduler(path, family, weights, original, prediction, lcm="time_cond_proj_dim" in unet),
        tokenizers={
            name.replace("text_encoder", "tokenizer"): _tokenizer(path, part.config)
            for name, part in parts.items()
            if name.startswith("text_encoder")
        },
        settings={"_class_name": pipeline, **family.settings},
        defaults=few_steps(path.stem),
    )


def split_vae(path: Path, weights: Weights) -> Part:
    """A VAE in a file of its own or in a whole checkpoint's, in LDM's names or diffusers'.

    One alone doesn't tell its scaling factor, and its config has none, unless the original config is there.

    Raises:
        ExportError: there is none in it.
    """
    weights = {name: weight for name, weight in weights.items() if not name.startswith(("loss.", *_IGNORED))}
    found = with_prefix(weights, _VAE) or weights
    if "decoder.conv_in.weight" not in found:
        raise ExportError(f"{path} holds no VAE; expected a file with 'decoder.conv_in.weight'")
    family = next((each for each in _FAMILIES if _has_texts(each, weights)), None)
    try:
        return read_vae(found, _original_config(path).get("scale_factor", family and family.scaling_factor))
    except KeyError as missing:
        raise ExportError(f"{path} lacks the weight {missing}; download it again") from None


_FAMILIES = (_SD1, _SD2, _XL, _REFINER)


def _has_texts(family: Family, weights: Weights) -> bool:
    return all(any(name.startswith(prefix) for name in weights) for prefix in family.texts.values())


def _family(path: Path, weights: Weights) -> Family:
    message = unsupported_files(path, weights)
    if message is not None:
        raise ExportError(message)
    family = next((each for each in _FAMILIES if _has_texts(each, weights)), None)
    texts = tuple(prefix for each in (_FAMILIES if family is None else (family,)) for prefix in each.texts.values())
    unknown = sorted(name for name in weights if not name.startswith((_UNET, _VAE, *texts, *_IGNORED)))
    if unknown:
        listed = ", ".join(unknown[:3])
        raise ExportError(f"{path} has {len(unknown)} weights that no such checkpoint has ({listed}); {EXPORTABLE}")
    present = {"a U-Net": _UNET, "a VAE": _VAE}
    missing = [what for what, prefix in present.items() if not with_prefix(weights, prefix)]
    if family is None:
        missing.append("a text encoder" if not any(name.startswith(texts) for name in weights) else "one text encoder")
    if missing or family is None:
        raise ExportError(f"{path} lacks {' and '.join(missing)}; {EXPORTABLE}")
    return family


def _parts(family: Family, weights: Weights, original: Mapping[str, Any]) -> dict[str, Part]:
    used = {name: weight for name, weight in weights.items() if not name.startswith(_IGNORED)}
    parts = {
        "unet": read_unet(with_prefix(used, _UNET), original, heads=family.heads),
        "vae": read_vae(with_prefix(used, _VAE), original.get("scale_factor", family.scaling_factor)),
    }
    for name, prefix in family.texts.items():
        mine = with_prefix(used, prefix)
        open_clip = prefix.endswith(".model.")
        parts[name] = read_open_clip(mine, projected=family.ids > 0) if open_clip else read_clip(mine)
    if family.ids:
        parts["unet"] = _with_added(parts["unet"], parts["text_encoder_2"].config["projection_dim"], family.ids)
    elif "add_embedding.linear_1.weight" in parts["unet"].weights:
        raise ExportError("the U-Net's 'label_emb' has no place in a Stable Diffusion model; it is of another kind")
    return parts


def _with_added(unet: Part, pooled: int, ids: int) -> Part:
    """The U-Net, its config with what is added to the time: pooled text, and embedded numbers such as sizes."""
    width = unet.weights["add_embedding.linear_1.weight"].shape[1]
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (width - pooled) // ids,
        "projection_class_embeddings_input_dim": width,
    }
    return replace(unet, config={**unet.config, **added})


def _pipeline(path: Path, family: Family, unet: Mapping[str, Any]) -> str:
    channels = unet["in_channels"]
    if channels not in family.pipelines:
        known = " or ".join(str(each) for each in sorted(family.pipelines))
        raise ExportError(
            f"{path} has a U-Net of {channels} input channels; expected {known} in its family; give another checkpoint"
        )
    embedded = "time_cond_proj_dim" in unet and family.pipelines is _SD and channels == 4
    return "LatentConsistencyModelPipeline" if embedded else family.pipelines[channels]


def _sized(path: Path, family: Family, unet: Part, original: Mapping[str, Any], prediction: str) -> Part:
    """The U-Net, its config with the size that it was trained at."""
    size = family.size
    if family is _SD1:
        size = original.get("image_size", size)  # the configs of later families have a value that nothing reads
    elif family is _SD2 and prediction == "v_prediction":
        size = 96
    elif family is _XL and re.match(r"sd[-_]?xl[-_]?turbo", path.name.lower()):
        size = 64
    return replace(unet, config={**unet.config, "sample_size": size})


def _prediction_type(path: Path, family: Family, weights: Weights, original: Mapping[str, Any], channels: int) -> str:
    """As the file or its config says; else v in Stable Diffusion 2, but for its models of 512 pixels.

    Those are what is trained further to see a picture besides, Turbo, and what the training step or the name tells.
    """
    if original.get("parameterization") == "v" or "v_pred" in weights:
        return "v_prediction"
    if re.search(r"lightning_1step_x0", path.name.lower()):
        return "sample"
    step = weights.get("global_step")
    small = step is not None and int(step.read().max()) == 875000
    small = small or bool(re.search(r"(?<!\d)512(?!\d)|turbo", path.name.lower()))
    if family is not _SD2 or original or channels != 4 or small:
        return "epsilon"
    return "v_prediction"


def _scheduler(
    path: Path, family: Family, weights: Weights, original: Mapping[str, Any], prediction: str, *, lcm: bool
) -> dict[str, Any]:
    """The published one of the family, but for what the original config says."""
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
    few, rescaled = bool(few_steps(path.stem)), "ztsnr" in weights
    if family.ids or few or rescaled:
        config |= {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "use_karras_sigmas": False}
        # Few steps are the last ones of the training's, and without signal only the very last is (arXiv:2305.08891).
        config["timestep_spacing"] = "trailing" if few or rescaled else "leading"
        return {**config, "rescale_betas_zero_snr": True} if rescaled else config
    return {"_class_name": "PNDMScheduler", **config, "set_alpha_to_one": False, "skip_prk_steps": True}


def _tokenizer(path: Path, encoder: Mapping[str, Any]) -> Path | str:
    """Where the tokenizer's files are: beside the checkpoint if it has a vocabulary of its own; or the pad token."""
    if all((path.parent / name).is_file() for name in ("vocab.json", "merges.txt")):
        return path.parent
    vocabulary = encoder["vocab_size"]
    if vocabulary == 49408:
        return "!" if encoder["hidden_act"] == "gelu" else "<|endoftext|>"
    raise ExportError(
        f"{path} has a vocabulary of {vocabulary} tokens, CLIP's has 49408; put its vocab.json and merges.txt beside it"
    )


def _original_config(path: Path) -> Mapping[str, Any]:
    """The parameters in ``model.yaml`` beside ``model.safetensors``, flat; none if there is no such file."""
    beside = path.with_suffix(".yaml")
    if not beside.is_file():
        return {}
    try:
        model = yaml.safe_load(beside.read_text(encoding="utf-8"))["model"]["params"]
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
        raise ExportError(f"{beside} is no original Stable Diffusion config; mend it or move it away") from None
