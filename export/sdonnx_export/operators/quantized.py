"""Integer codes in graphs: a weight's, made when it is written, and what an activation's stand for."""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import onnx_ir as ir
from sdonnx_runtime.adapters.quantization import BLOCK, block_scales, channel_scales, quantize_int4, quantize_int8
from sdonnx_runtime.arrays import AnyArray, Array


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


def quantized_tensors(
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
        if bits == 8:
            return ir.Tensor(quantize_int8(data, scales(data), axis), name=name)
        codes: AnyArray = quantize_int4(data, scales(data), axis).astype(ml_dtypes.int4)
        return ir.Tensor(codes, name=name)

    def make_scales() -> ir.Tensor:
        return ir.Tensor(kept[0] if kept else scales(read()), name=f"{name}_scale")

    counts = [size // BLOCK if index == axis else size for index, size in enumerate(shape)]
    scale_shape = ir.Shape([shape[axis]] if bits == 8 else counts)
    dtype = ir.DataType.INT8 if bits == 8 else ir.DataType.INT4
    return (
        ir.LazyTensor(make_codes, dtype=dtype, shape=ir.Shape(shape), name=name),
        ir.LazyTensor(make_scales, dtype=ir.DataType.FLOAT, shape=scale_shape, name=f"{name}_scale"),
    )
