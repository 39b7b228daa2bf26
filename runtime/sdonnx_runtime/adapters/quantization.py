"""Integer codes of weights: how they are rounded, and back."""

import numpy as np

from sdonnx_runtime.arrays import AnyArray, Array

BLOCK = 32
"""Weights that share a scale in 4 bits."""


def channel_scales(data: AnyArray, axis: int) -> Array:
    """(size of ``axis``,): under them the largest magnitude of each slice has the code 127."""
    others = tuple(other for other in range(data.ndim) if other != axis)
    largest = np.maximum(data.max(axis=others), -data.min(axis=others))
    return np.maximum(largest / 127, 1e-12).astype(np.float32)


def block_scales(data: AnyArray, axis: int) -> Array:
    """Like ``data``, but one for `BLOCK` along ``axis``; the value of largest magnitude has the code -8, or 7."""
    blocks = _blocked(data, axis)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=axis + 1, keepdims=True), axis + 1)
    scales = np.squeeze(peak, axis + 1) / -8
    return np.where(np.abs(scales) < 1e-12, 1e-12, scales).astype(np.float32)


def _blocked(data: AnyArray, axis: int) -> AnyArray:
    return data.reshape(*data.shape[:axis], -1, BLOCK, *data.shape[axis + 1 :])


def quantize_int8(data: AnyArray, scales: Array, axis: int) -> AnyArray:
    """int8 codes of ``data`` under `channel_scales`."""
    shape = [1] * data.ndim
    shape[axis] = -1
    codes = data / scales.reshape(shape)
    np.rint(codes, out=codes)
    return codes.clip(-127, 127, out=codes).astype(np.int8)


def quantize_int4(data: AnyArray, scales: Array, axis: int) -> AnyArray:
    """Codes of 4 bits, as int8, of ``data`` under `block_scales`."""
    blocks = _blocked(data, axis) / np.expand_dims(scales, axis + 1)
    np.rint(blocks, out=blocks)
    return blocks.clip(-8, 7, out=blocks).reshape(data.shape).astype(np.int8)


def dequantize(codes: AnyArray, scales: Array, axis: int) -> Array:
    """The float32 weights that codes of either kind stand for: of `quantize_int8` if ``scales`` are of one axis."""
    if scales.ndim > 1:
        blocks = _blocked(codes, axis) * np.expand_dims(scales, axis + 1)
        return blocks.reshape(codes.shape)
    shape = [1] * codes.ndim
    shape[axis] = -1
    return codes * scales.reshape(shape)
