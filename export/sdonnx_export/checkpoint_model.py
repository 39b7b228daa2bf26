"""The form that every checkpoint is read into: components with their configs and lazily read weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import ExportError


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor of a checkpoint, read on demand."""

    shape: tuple[int, ...]
    dtype: str
    """As the file stores it: F32, F16, BF16, …"""
    read: Callable[[], AnyArray]
    """Read it as float32 or float16 (bfloat16 becomes float32); integers stay as stored."""


def checked(name: str, weight: Weight) -> Weight:
    """A weight whose ``read`` raises ExportError with its name if a value is NaN or infinite."""

    def read() -> AnyArray:
        data = weight.read()
        if not np.isfinite(data).all():
            raise ExportError(f"'{name}' has NaN or infinite values; the file is damaged: download it again")
        return data

    return replace(weight, read=read)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One component of a checkpoint, as diffusers or transformers has it."""

    config: Mapping[str, Any]
    """Its config.json."""
    weights: Mapping[str, Weight]
    """By state-dict key."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint."""

    source: str
    """Hub id, or the name (without the path) of a file or directory."""
    revision: str | None
    parts: Mapping[str, Part]
    """``unet``, ``vae``, ``text_encoder`` and, for SDXL, ``text_encoder_2``; the refiner has only the second.
    ``safety_checker`` where it was asked for.

    For a VAE alone ``vae``, for a ControlNet ``controlnet``, for a T2I-Adapter ``adapter``, for an IP-Adapter
    ``image_encoder`` and ``ip_adapter``, for an upscaler ``upscaler``; then all fields below are empty."""
    scheduler: Mapping[str, Any]
    """scheduler_config.json as published."""
    tokenizers: Mapping[str, Path | str]
    """``tokenizer`` and ``tokenizer_2``: a directory with the files; or the pad token, for CLIP's own vocabulary."""
    settings: Mapping[str, Any]
    """model_index.json without its components: ``_class_name`` and the pipeline's arguments."""
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Known fields of the package's `Defaults`."""
    stated: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the source says of its model, and where; as `Source.stated` in the package's manifest."""


Report = Callable[[str, float], None]
"""Progress callback: the current action, and the completed share of it from 0 to 1."""
