"""The form that every checkpoint is read into: parts with their configs and lazy weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdonnx_runtime.arrays import AnyArray


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor of a checkpoint, read when it is asked for."""

    shape: tuple[int, ...]
    dtype: str
    """F32, F16, BF16, …: how the file stores it."""
    read: Callable[[], AnyArray]
    """Gives it as float32 or float16 (bfloat16 is widened), or whole numbers as stored."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One component of a checkpoint."""

    config: Mapping[str, Any]
    """diffusers' or transformers' config.json."""
    weights: Mapping[str, Weight]
    """By diffusers' (transformers') state-dict keys."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint."""

    source: str
    """Hub id, or the name (without the path) of a file or directory."""
    revision: str | None
    parts: Mapping[str, Part]
    """``unet``, ``vae``, ``text_encoder`` and, in SDXL, ``text_encoder_2``; the refiner has the second alone.

    Of a VAE alone ``vae``, of a ControlNet ``controlnet``, of a T2I-Adapter ``adapter``, and what follows is empty."""
    scheduler: Mapping[str, Any]
    """scheduler_config.json as published."""
    tokenizers: Mapping[str, Path | str]
    """``tokenizer`` and ``tokenizer_2``: a directory with its files; or, for CLIP's own vocabulary, the pad token."""
    settings: Mapping[str, Any]
    """model_index.json without its components: ``_class_name``, and what a pipeline of that class is told."""
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields of `Defaults` that are known of it; those of a package."""


Report = Callable[[str, float], None]
"""Told what is being done and how much of it is, 0 to 1."""
