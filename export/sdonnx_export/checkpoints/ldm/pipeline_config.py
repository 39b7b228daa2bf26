"""The pipeline class, scheduler config, size and tokenizer that follow from a single file's family and settings."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdonnx_runtime.errors import ExportError

from sdonnx_export.checkpoint_model import Checkpoint
from sdonnx_export.checkpoints.ldm.file_settings import FileSettings, SingleFile
from sdonnx_export.checkpoints.ldm.layouts import Layout


def pipeline_class(layout: Layout, file: SingleFile, unet: Mapping[str, Any]) -> str:
    """Return diffusers' pipeline for a U-Net's config.

    Raises:
        ExportError: the family has none for its input channels.
    """
    channels = unet["in_channels"]
    if channels not in layout.pipelines:
        known = " or ".join(str(each) for each in sorted(layout.pipelines))
        raise ExportError(
            f"{file.path} has a U-Net of {channels} input channels; expected {known} in its family; "
            "give another checkpoint"
        )
    if unet.get("time_cond_proj_dim") is not None and channels == 4 and layout.lcm_pipeline is not None:
        return layout.lcm_pipeline
    return layout.pipelines[channels]


def sample_size(layout: Layout, file: SingleFile, settings: FileSettings, base: Checkpoint | None) -> int:
    """Return width and height of the latents that the U-Net was trained on."""
    if layout.reads_image_size and "image_size" in file.original:
        return file.original["image_size"]
    if layout.name_of_512 is not None and re.match(layout.name_of_512, file.name):
        return 64
    if settings.size is not None:
        return settings.size // 8
    sizes = layout.family.sample_sizes
    inherited = None if base is None else base.parts["unet"].config.get("sample_size")
    return inherited if isinstance(inherited, int) else sizes.get(settings.prediction_type, sizes["epsilon"])


def scheduler_config(
    layout: Layout, file: SingleFile, settings: FileSettings, base: Checkpoint | None, *, lcm: bool
) -> Mapping[str, Any]:
    """Return the base model's scheduler config if it suits the file, else that of the family's published models."""
    original, zero_snr, prediction = file.original, settings.zero_snr, settings.prediction_type
    is_few_steps = bool(file.few_steps)
    if base is not None and base.scheduler.get("prediction_type", "epsilon") == prediction:
        is_base_lcm = base.scheduler.get("_class_name") == "LCMScheduler"
        if lcm == is_base_lcm and not is_few_steps and not zero_snr:
            return base.scheduler
    config: dict[str, Any] = {
        "beta_end": original.get("linear_end", 0.012),
        "beta_schedule": "scaled_linear",
        "beta_start": original.get("linear_start", 0.00085),
        "clip_sample": False,
        "num_train_timesteps": original.get("timesteps", 1000),
        "prediction_type": prediction,
        "set_alpha_to_one": lcm,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
    if lcm:
        return {"_class_name": "LCMScheduler", **config, "original_inference_steps": 50}
    if layout.family.time_ids or is_few_steps or zero_snr:
        config |= {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "use_karras_sigmas": False}
        # Few-step models were distilled at trailing timesteps; zero terminal SNR is at the last one (arXiv:2305.08891).
        config["timestep_spacing"] = "trailing" if is_few_steps or zero_snr else "leading"
        return {**config, "rescale_betas_zero_snr": True} if zero_snr else config
    return {"_class_name": "PNDMScheduler", **config}


def find_tokenizer(path: Path, encoder: Mapping[str, Any]) -> Path | str:
    """Return the directory of a tokenizer next to the checkpoint; else the pad token of CLIP's own."""
    if all((path.parent / name).is_file() for name in ("vocab.json", "merges.txt")):
        return path.parent
    vocab_size = encoder.get("vocab_size", 49408)
    if vocab_size == 49408:
        return "!" if encoder.get("hidden_act") == "gelu" else "<|endoftext|>"
    raise ExportError(
        f"{path} has a vocabulary of {vocab_size} tokens, CLIP's has 49408; add its vocab.json and merges.txt"
    )
