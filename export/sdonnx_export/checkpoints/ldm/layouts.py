"""The layouts of single files of each family, and which of them a file or a base model has."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.packages.families import FAMILIES, Family

from sdonnx_export.checkpoint_model import Checkpoint
from sdonnx_export.checkpoints.ldm.keys import Weights

UNET, VAE = "model.diffusion_model.", "first_stage_model."
IGNORED = (
    "model_ema.", "betas", "alphas_cumprod", "sqrt_", "log_one_minus", "posterior_", "logvar", "lvlb_weights",
    "cond_stage_model.logit_scale", "cond_stage_model.text_projection", "conditioner.embedders.0.logit_scale",
    "conditioner.embedders.0.text_projection", "first_stage_model.loss.", "safety_checker.", "embedding_manager.",
    "denoiser.sigmas", "scale_factor", "depth_model.", "global_step", "v_pred", "ztsnr",
)  # fmt: skip
"""Prefixes of what training leaves in a file and inference doesn't use."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The layout of a family's single files, and what their keys don't tell."""

    family: Family
    text_encoders: Mapping[str, str]
    """Prefix of each text encoder's keys; they identify the family."""
    pipelines: Mapping[int, str]
    """diffusers' class for each number of input channels of the U-Net."""
    settings: Mapping[str, Any]
    """Arguments of that class."""
    is_linear: bool = True
    """Whether the projections of the U-Net's transformers are linear layers; before, they were convolutions."""
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

LAYOUTS = (
    Layout(
        family=FAMILIES["sd1"],
        text_encoders={"text_encoder": "cond_stage_model.transformer."},
        pipelines=_SD_PIPELINES,
        settings={},
        is_linear=False,
        reads_image_size=True,
        lcm_pipeline=_LCM_PIPELINE,
    ),
    Layout(
        family=FAMILIES["sd2"],
        text_encoders={"text_encoder": "cond_stage_model.model."},
        pipelines=_SD_PIPELINES,
        settings={},
        lcm_pipeline=_LCM_PIPELINE,
    ),
    Layout(
        family=FAMILIES["sdxl"],
        text_encoders={
            "text_encoder": "conditioner.embedders.0.transformer.",
            "text_encoder_2": "conditioner.embedders.1.model.",
        },
        pipelines={4: "StableDiffusionXLPipeline", 9: "StableDiffusionXLInpaintPipeline"},
        settings={_EMPTY: True},
        name_of_512=r"sd[-_]?xl[-_]?turbo",
    ),
    Layout(
        family=FAMILIES["sdxl-refiner"],
        text_encoders={"text_encoder_2": "conditioner.embedders.0.model."},
        pipelines={4: "StableDiffusionXLImg2ImgPipeline"},
        settings={"requires_aesthetics_score": True, _EMPTY: False},
    ),
)


def layout_of(family: str) -> Layout:
    """Return the layout of a family by its key in FAMILIES."""
    return next(layout for layout in LAYOUTS if layout.family is FAMILIES[family])


def layout_of_file(weights: Weights) -> Layout | None:
    """Return the layout whose text encoders a file has; None if it lacks one."""
    return next((each for each in LAYOUTS if _has_text_encoders(each, weights)), None)


def _has_text_encoders(layout: Layout, weights: Weights) -> bool:
    return all(any(name.startswith(prefix) for name in weights) for prefix in layout.text_encoders.values())


def layout_of_base(base: Checkpoint) -> Layout:
    """Return the layout of a base model's family."""
    encoders = {name: part for name, part in base.parts.items() if name.startswith("text_encoder") and part.weights}
    for layout in LAYOUTS:
        if set(layout.text_encoders) != set(encoders):
            continue
        open_clip = all(part.config.get("hidden_act") == "gelu" for part in encoders.values())
        if len(encoders) > 1 or open_clip == layout.text_encoders[next(iter(encoders))].endswith(".model."):
            return layout
    raise ExportError(f"{base.source} has no text encoder to lend; give a whole checkpoint with --base")
