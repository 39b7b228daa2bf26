"""Weights of float8 that are stored with a scale, as ComfyUI's: the product is the weight."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import ExportError

from sdonnx_export.checkpoint_model import Weight

_SCALES = (".scale_weight", ".weight_scale")
"""What a layer's name is followed by in the key of its weight's scale: ComfyUI's older and newer spelling."""

_UNUSED = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
"""Ends of the keys that only computing in float8 uses, and of the marks of such files."""

_OTHERS = (".weight_scale_2", ".absmax", ".quant_map", ".SCB", ".qweight", ".qzeros")
"""Ends of keys of other kinds of quantization: NVFP4, bitsandbytes, GPTQ."""

_REMEDY = "give the checkpoint in fp16, fp32 or fp8"


def apply_scales(path: Path, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Return weights without scales: each that has one is read as its product with it, in float32.

    Raises:
        ExportError: the weights are quantized in another way.
    """
    _check_quantization(path, weights)
    scales = {
        name.removesuffix(end) + ".weight": weight
        for name, weight in weights.items()
        for end in _SCALES
        if name.endswith(end)
    }
    kept = {name: weight for name, weight in weights.items() if not name.endswith((*_SCALES, *_UNUSED))}
    missing = sorted(scales.keys() - kept.keys())
    if missing:
        raise ExportError(f"{path} has a scale for '{missing[0]}', which it lacks; download it again")
    integer = next((name for name, each in kept.items() if name not in scales and _is_integer_matrix(name, each)), None)
    if integer is not None:
        raise ExportError(f"{path} has integers as '{integer}', and no scale for them; {_REMEDY}")
    return {name: _scaled(path, name, each, scales[name]) if name in scales else each for name, each in kept.items()}


def _is_integer_matrix(name: str, weight: Weight) -> bool:
    return name.endswith(".weight") and len(weight.shape) > 1 and weight.dtype.startswith(("I", "U", "BOOL"))


def _check_quantization(path: Path, weights: Mapping[str, Weight]) -> None:
    other = next((name for name in weights if name.endswith(_OTHERS) or ".quant_state." in name), None)
    if other is not None:
        raise ExportError(f"{path} is quantized ('{other}') in a way that is not supported; {_REMEDY}")
    for name, weight in weights.items():
        if name.endswith(".comfy_quant"):
            try:
                form = json.loads(weight.read().astype(np.uint8).tobytes())["format"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ExportError(f"{path}: '{name}' is damaged; download it again") from None
            if form not in ("float8_e4m3fn", "float8_e5m2"):
                raise ExportError(f"{path} is quantized as '{form}', which is not supported; {_REMEDY}")


def _scaled(path: Path, name: str, weight: Weight, scale: Weight) -> Weight:
    """Return a weight times its scale, which is one number, or one per output."""
    outputs = weight.shape[0] if weight.shape else 1
    sizes = [size for size in scale.shape if size != 1]
    if sizes not in ([], [outputs]) or (sizes and scale.shape[0] != outputs) or weight.dtype.startswith(("I", "U")):
        raise ExportError(
            f"{path}: '{name}' of {weight.dtype} {weight.shape} has a scale of {scale.shape}, which is not supported; "
            + _REMEDY
        )

    def read() -> AnyArray:
        factors = scale.read().astype(np.float32).reshape(-1, *[1] * (len(weight.shape) - 1))
        return weight.read().astype(np.float32) * factors

    return replace(weight, dtype="F32", read=read)
