"""Integer codes of weights and activations: how they are rounded, and what they stand for."""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from sdonnx_runtime.arrays import AnyArray, Array

BLOCK = 32
"""Weights that share a scale in 4 bits."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """What an activation's codes 0 to 255 stand for: ``scale * (code - zero)``."""

    scale: float
    zero: int

    @classmethod
    def spanning(cls, low: float, high: float) -> "Range":
        """From ``low`` to ``high``; 0 is always within, and has a code of its own."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / 255, 1e-8)
        return cls(scale=scale, zero=round(-low / scale))


def channel_scales(data: AnyArray, axis: int) -> Array:
    """(size of ``axis``,): under them the largest magnitude of each slice has the code 127."""
    others = tuple(other for other in range(data.ndim) if other != axis)
    return np.maximum(np.abs(data).max(axis=others) / 127, 1e-12).astype(np.float32)


def block_scales(data: AnyArray, axis: int) -> Array:
    """Like ``data``, but one for `BLOCK` along ``axis``; the value of largest magnitude has the code -8, or 7."""
    blocks = _blocked(data, axis)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=axis + 1, keepdims=True), axis + 1)
    scales = np.squeeze(peak, axis + 1) / -8
    return np.where(np.abs(scales) < 1e-12, 1e-12, scales).astype(np.float32)


def _blocked(data: AnyArray, axis: int) -> AnyArray:
    return data.reshape(*data.shape[:axis], -1, BLOCK, *data.shape[axis + 1 :])


def codes8(data: AnyArray, scales: Array, axis: int) -> AnyArray:
    """int8 codes of ``data`` under `channel_scales`."""
    shape = [1] * data.ndim
    shape[axis] = -1
    return np.rint(data / scales.reshape(shape)).clip(-127, 127).astype(np.int8)


def codes4(data: AnyArray, scales: Array, axis: int) -> AnyArray:
    """int4 codes of ``data`` under `block_scales`."""
    blocks = _blocked(data, axis) / np.expand_dims(scales, axis + 1)
    return np.rint(blocks).clip(-8, 7).reshape(data.shape).astype(ml_dtypes.int4)


def coded(
    name: str, read: Callable[[], AnyArray], shape: tuple[int, ...], *, axis: int, bits: int = 8
) -> tuple[ir.LazyTensor, ir.LazyTensor]:
    """A weight's codes and scales, made when they are written.

    Args:
        name: the weight's; the scales are called ``name_scale``.
        read: gives it as it is stored.
        shape: of what ``read`` gives.
        axis: in 8 bits that of the output channels, in 4 bits that of the input channels.
        bits: 8 or 4.
    """
    kept: list[Array] = []  # the scales are small; what they are made from is not, and is read twice

    def scales(data: AnyArray) -> Array:
        if not kept:
            kept.append(channel_scales(data, axis) if bits == 8 else block_scales(data, axis))
        return kept[0]

    def make_codes() -> ir.Tensor:
        data = read()
        return ir.Tensor((codes8 if bits == 8 else codes4)(data, scales(data), axis), name=name)

    def make_scales() -> ir.Tensor:
        return ir.Tensor(kept[0] if kept else scales(read()), name=f"{name}_scale")

    counts = [size // BLOCK if index == axis else size for index, size in enumerate(shape)]
    scale_shape = ir.Shape([shape[axis]] if bits == 8 else counts)
    dtype = ir.DataType.INT8 if bits == 8 else ir.DataType.INT4
    return (
        ir.LazyTensor(make_codes, dtype=dtype, shape=ir.Shape(shape), name=name),
        ir.LazyTensor(make_scales, dtype=ir.DataType.FLOAT, shape=scale_shape, name=f"{name}_scale"),
    )
