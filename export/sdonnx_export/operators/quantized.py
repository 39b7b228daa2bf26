"""Quantized tensors: a weight's, made when it is written, and the ranges of activations."""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import onnx_ir as ir
from sdonnx_runtime.adapters.quantization import BLOCK, block_scales, channel_scales, quantize_int4, quantize_int8
from sdonnx_runtime.arrays import AnyArray, Array


@dataclass(frozen=True, kw_only=True)
class Range:
    """The quantization parameters of an activation in uint8: values are ``scale * (quantized - zero)``."""

    scale: float
    zero: int

    @classmethod
    def from_min_max(cls, low: float, high: float) -> "Range":
        """The range from ``low`` to ``high``, extended to contain 0, which is exact."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / 255, 1e-8)
        return cls(scale=scale, zero=round(-low / scale))

    @property
    def symmetric_scale(self) -> float:
        """The scale with which int8 without a zero point covers the range."""
        return self.scale * max(self.zero, 255 - self.zero) / 127


def quantized_tensors(
    name: str, read: Callable[[], AnyArray], shape: tuple[int, ...], *, axis: int, bits: int = 8
) -> tuple[ir.LazyTensor, ir.LazyTensor]:
    """Quantize a weight when it is written; returns the quantized values and the scales.

    Args:
        name: of the quantized values; the scales are called ``name_scale``.
        read: reads the weight in the graph's layout.
        shape: of the weight.
        axis: in 8 bits the axis of the output channels, in 4 bits that of the input channels.
        bits: 8 or 4.
    """
    cache: list[Array] = []  # the scales are small; the weight is not, and is read twice

    def compute_scales(data: AnyArray) -> Array:
        if not cache:
            cache.append(channel_scales(data, axis) if bits == 8 else block_scales(data, axis))
        return cache[0]

    def make_values() -> ir.Tensor:
        data = read()
        if bits == 8:
            return ir.Tensor(quantize_int8(data, compute_scales(data), axis), name=name)
        values: AnyArray = quantize_int4(data, compute_scales(data), axis).astype(ml_dtypes.int4)
        return ir.Tensor(values, name=name)

    def make_scales() -> ir.Tensor:
        return ir.Tensor(cache[0] if cache else compute_scales(read()), name=f"{name}_scale")

    counts = [size // BLOCK if index == axis else size for index, size in enumerate(shape)]
    scale_shape = ir.Shape([shape[axis]] if bits == 8 else counts)
    dtype = ir.DataType.INT8 if bits == 8 else ir.DataType.INT4
    return (
        ir.LazyTensor(make_values, dtype=dtype, shape=ir.Shape(shape), name=name),
        ir.LazyTensor(make_scales, dtype=ir.DataType.FLOAT, shape=scale_shape, name=f"{name}_scale"),
    )
