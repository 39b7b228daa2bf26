"""ControlNets that are stored relative to the U-Net of a base model: differences, and Control-LoRAs.

A difference (sd-webui-controlnet) is added to the base model's weights; where it is zero, its key is left out. A
Control-LoRA (Stability AI) has low-rank changes of the layers, and whole weights of what the U-Net doesn't have.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import ExportError

from sdonnx_export.checkpoint_model import Part, Weight
from sdonnx_export.checkpoints.ldm.keys import Weights, count

MARKERS = {"difference": "the difference between a ControlNet and its base model", "lora_controlnet": "a Control-LoRA"}
"""Tensor that marks each kind, and what a file with it holds."""

_COPIED = ("conv_in.", "time_embedding.linear_", "add_embedding.", "down_blocks.", "mid_block.")
"""Prefixes of the U-Net's weights of which a ControlNet has a copy."""

_SHARED = ("attention_head_dim", "num_attention_heads", "addition_time_embed_dim")
"""Keys of a U-Net's config that its weights don't tell."""


def stored_relative(weights: Weights) -> str | None:
    """Return the marker of a ControlNet that is stored relative to a base model; None if it is whole."""
    return next((marker for marker in MARKERS if marker in weights), None)


def original_names(unet: Part) -> dict[str, str]:
    """Map the original prefixes of the blocks of a U-Net's down path and mid block to diffusers'."""
    names, index = {}, 1
    for level in range(count(unet.weights, r"down_blocks\.(\d+)\.")):
        block = f"down_blocks.{level}."
        for layer in range(count(unet.weights, rf"down_blocks\.{level}\.resnets\.(\d+)\.")):
            names[f"input_blocks.{index}.0."] = f"{block}resnets.{layer}."
            names[f"input_blocks.{index}.1."] = f"{block}attentions.{layer}."
            index += 1
        names[f"input_blocks.{index}.0."] = f"{block}downsamplers.0."
        index += 1
    has_attention = any(name.startswith("mid_block.attentions.") for name in unet.weights)
    middle = ("resnets.0.", "attentions.0.", "resnets.1.") if has_attention else ("resnets.0.", "resnets.1.")
    return names | {f"middle_block.{slot}.": f"mid_block.{layer}" for slot, layer in enumerate(middle)}


def add_base(weights: Weights, unet: Part, marker: str) -> dict[str, Weight]:
    """Return the whole weights of a ControlNet from the stored ones, all under diffusers' keys.

    Raises:
        ExportError: they were made for another U-Net.
    """
    whole = {name: weight for name, weight in weights.items() if not name.endswith((".up", ".down"))}
    for name, base in unet.weights.items():
        if name.startswith(_COPIED):
            whole[name] = _with_base(name, base, weights, is_difference=marker == "difference")
    changed = {f"{name.rpartition('.')[0]}.weight" for name in weights if name.endswith((".up", ".down"))}
    unknown = sorted(changed - set(whole))
    if unknown:
        raise ExportError(f"the base model has no '{unknown[0]}'; give the one that it was made for")
    return whole


def shared_config(unet: Part) -> dict[str, Any]:
    """Return what a U-Net's config says of a ControlNet for it, beyond the weights."""
    return {key: unet.config[key] for key in _SHARED if key in unet.config}


def _with_base(name: str, base: Weight, stored: Weights, *, is_difference: bool) -> Weight:
    """Return a weight of the base model with the stored change of it, if there is one."""
    own, stem = stored.get(name), name.removesuffix(".weight")
    if own is not None:
        _check_shape(name, own.shape, base)
        return _sum(base, own.read) if is_difference else own
    if not stored.keys() & {f"{stem}.up", f"{stem}.down"}:
        return base
    up, down = stored[f"{stem}.up"], stored[f"{stem}.down"]
    if min(len(up.shape), len(down.shape)) < 2 or up.shape[1] != down.shape[0]:
        raise ExportError(
            f"'{stem}.up' and '.down' have no common rank: {up.shape} and {down.shape}; download it again"
        )
    _check_shape(name, (up.shape[0], *down.shape[1:]), base)

    def product() -> AnyArray:
        flat = (weight.read().astype(np.float32).reshape(weight.shape[0], -1) for weight in (up, down))
        return np.matmul(*flat)

    return _sum(base, product)


def _sum(base: Weight, change: Callable[[], AnyArray]) -> Weight:
    """Return the sum of a weight and a change of it, whose shape may lack or have the kernel of a 1x1 convolution."""

    def read() -> AnyArray:
        return base.read().astype(np.float32) + change().astype(np.float32).reshape(base.shape)

    return replace(base, dtype="F32", read=read)


def _check_shape(name: str, shape: tuple[int, ...], base: Weight) -> None:
    if (shape[:1], math.prod(shape)) != (base.shape[:1], math.prod(base.shape)):
        raise ExportError(
            f"'{name}' has shape {shape}, and {base.shape} in the base model; give the one that it was made for"
        )
