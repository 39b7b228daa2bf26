"""Quantization of weights to int8 and int4, and back."""

import numpy as np

from sdonnx_runtime.arrays import AnyArray, Array

BLOCK = 32
"""The number of int4 weights that share a scale."""


def channel_scales(data: AnyArray, axis: int) -> Array:
    """Compute int8 scales, (size of ``axis``,): the largest magnitude of each slice becomes 127."""
    others = tuple(other for other in range(data.ndim) if other != axis)
    largest = np.maximum(data.max(axis=others), -data.min(axis=others))
    return np.maximum(largest / 127, 1e-12).astype(np.float32)


def block_scales(data: AnyArray, axis: int) -> Array:
    """Compute int4 scales, one per `BLOCK` along ``axis``: the value of largest magnitude becomes -8."""
    blocks = _split_blocks(data, axis)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=axis + 1, keepdims=True), axis + 1)
    scales = np.squeeze(peak, axis + 1) / -8
    return np.where(np.abs(scales) < 1e-12, 1e-12, scales).astype(np.float32)


def _split_blocks(data: AnyArray, axis: int) -> AnyArray:
    return data.reshape(*data.shape[:axis], -1, BLOCK, *data.shape[axis + 1 :])


def quantize_int8(data: AnyArray, scales: Array, axis: int) -> AnyArray:
    """Quantize to int8 with `channel_scales`."""
    shape = [1] * data.ndim
    shape[axis] = -1
    scaled = data / scales.reshape(shape)
    np.rint(scaled, out=scaled)
    return scaled.clip(-127, 127, out=scaled).astype(np.int8)


def quantize_int4(data: AnyArray, scales: Array, axis: int) -> AnyArray:
    """Quantize to int4, in an int8 array, with `block_scales`."""
    blocks = _split_blocks(data, axis) / np.expand_dims(scales, axis + 1)
    np.rint(blocks, out=blocks)
    return blocks.clip(-8, 7, out=blocks).reshape(data.shape).astype(np.int8)


def dequantize(data: AnyArray, scales: Array, axis: int) -> Array:
    """Convert quantized weights to float32: int8 if ``scales`` has one axis, else int4."""
    if scales.ndim > 1:
        blocks = _split_blocks(data, axis) * np.expand_dims(scales, axis + 1)
        return blocks.reshape(data.shape)
    shape = [1] * data.ndim
    shape[axis] = -1
    return data * scales.reshape(shape)
