"""Operators that compute in 8 bits, for ONNX Runtime's CPU kernels: channels-last, with quantized activations."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from onnxscript.nn import Parameter
from sdonnx_runtime.arrays import AnyArray

from sdonnx_export.checkpoint_model import Weight
from sdonnx_export.operators.base import ConvSpec, channels_of
from sdonnx_export.operators.channels_last import ChannelsLast
from sdonnx_export.operators.layouts import TransposedWeight, sizes
from sdonnx_export.operators.precision import PrecisionLookup
from sdonnx_export.operators.quantized import Range

_ALL = slice(None)


@dataclass(frozen=True, kw_only=True)
class _QTensor:
    """A quantized activation, and its quantization parameters, as values of the graph."""

    values: ir.Value
    scale: ir.Value
    zero: ir.Value


class Int8Operators(ChannelsLast):
    """`ChannelsLast` whose int8 layers read quantized activations.

    Linear layers and 1x1 convolutions run as int8 MatMul with float32 output (``MatMulIntegerToFloat``); the range of
    their input is found in each run, so that it follows timestep and prompt and never clips. Other convolutions run as
    int8 Conv (``QLinearConv``), whose ranges must be known beforehand. An activation that several layers read
    is quantized once.

    Args:
        graph: the graph to write to.
        weights: the checkpoint's.
        find_precision: the layers' precisions; what is not int8 computes in float32.
        ranges: of each convolution's input, by the weight's name, and of its output, by that with ``.output``; a
            convolution without ranges computes in float32.
    """

    def __init__(
        self,
        graph: ir.Graph,
        weights: Mapping[str, Weight],
        find_precision: PrecisionLookup,
        ranges: Mapping[str, Range] = MappingProxyType({}),
    ) -> None:
        super().__init__(graph, weights, find_precision)
        self._ranges = ranges
        self._quantized: dict[tuple[ir.Value, str | None, str], _QTensor] = {}
        self._concatenated: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def linear(self, x: ir.Value, weight: Parameter, bias: Parameter | None) -> ir.Value:
        """``x @ weight + bias``, as int8 MatMul where the layer is int8."""
        if self.find_precision(str(weight.name)) != "int8":
            return super().linear(x, weight, bias)
        return self._matmul(self._quantize(x), weight, bias)

    def geglu(self, x: ir.Value, weight: Parameter, bias: Parameter | None) -> ir.Value:
        """``a * gelu(b)``; each half is a MatMul of its own, so that nothing is split afterwards."""
        if self.find_precision(str(weight.name)) != "int8":
            return super().geglu(x, weight, bias)
        quantized, half = self._quantize(x), sizes(weight)[1] // 2

        def part(start: int) -> ir.Value:
            columns = slice(start, start + half)
            half_bias = None if bias is None else self.Slice(bias, [columns.start], [columns.stop])
            return self._matmul(quantized, weight, half_bias, columns=columns)

        hidden, gate = part(0), part(half)
        return self.Mul(hidden, self.gelu(gate))

    def conv(self, x: ir.Value, spec: ConvSpec) -> ir.Value:
        """2-D convolution of (N, H, W, C); what is upsampled is quantized before."""
        is_int8 = self.find_precision(spec.name) == "int8"
        if is_int8 and spec.is_pointwise:
            return self._pointwise_conv(x, spec)
        if not is_int8 or f"{spec.name}.output" not in self._ranges:
            return super().conv(x, spec)
        quantized = self._quantize(x, spec.name)
        values = self._conv_input(quantized.values, spec)
        weight, scale = self.store_quantized(spec.name, self.stored_reader(spec.weight), sizes(spec.weight), axis=0)
        output_range = self._range(f"{spec.name}.output")
        inputs = [quantized.scale, quantized.zero, weight, scale, self.zero_point(weight, scale), *output_range]
        y = self._contrib("QLinearConv", values, *inputs, **spec.attributes, channels_last=1)
        y.shape = ir.Shape([None, None, None, sizes(spec.weight)[0]])
        y = self.DequantizeLinear(y, *output_range)
        return y if spec.bias is None else self.Add(y, spec.bias)

    def concat_channels(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Concatenate the channels of two feature maps; a MatMul over them has a range for each."""
        both = super().concat_channels(x, y)
        self._concatenated[both] = (x, y)
        return both

    def _pointwise_conv(self, x: ir.Value, spec: ConvSpec) -> ir.Value:
        """A 1x1 convolution: a MatMul over channels."""
        if x not in self._concatenated:
            return self._matmul(self._quantize(x), spec.weight, spec.bias)
        first, second = self._concatenated[x]
        border = channels_of(first)
        y = self._matmul(self._quantize(first), spec.weight, spec.bias, rows=slice(0, border))
        return self.Add(y, self._matmul(self._quantize(second), spec.weight, None, rows=slice(border, None)))

    def _matmul(
        self, x: _QTensor, weight: Parameter, bias: ir.Value | None, *, rows: slice = _ALL, columns: slice = _ALL
    ) -> ir.Value:
        """``x @ weight[rows, columns] + bias`` in float32."""
        whole = sizes(weight)[:2] if isinstance(weight, TransposedWeight) else sizes(weight)[1::-1]
        shape = tuple(len(range(size)[part]) for size, part in zip(whole, (rows, columns), strict=True))
        name = "".join([str(weight.name), *(f"_{part.start}" for part in (rows, columns) if part is not _ALL)])
        read = self.stored_reader(weight)

        def read_part() -> AnyArray:
            data = read()
            return np.ascontiguousarray((data if data.ndim == 2 else data[:, :, 0, 0].T)[rows, columns])

        quantized, scale = self.store_quantized(name, read_part, shape, axis=1)
        zero = self.zero_point(quantized, scale)
        inputs = [quantized, x.scale, scale, x.zero, zero, *([] if bias is None else [bias])]
        y = self._contrib("MatMulIntegerToFloat", x.values, *inputs)
        y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), _with_last(x.values.shape, shape[1])
        return y

    def _quantize(self, x: ir.Value, name: str | None = None) -> _QTensor:
        """Quantize ``x`` with the range called ``name``; without a name, with the range that it has in each run."""
        key = x, name, self.stage  # quantized values that two stages read would be an edge between them
        if key not in self._quantized:
            if name is None:
                values, scale, zero = self.DynamicQuantizeLinear(x, _outputs=3)
            else:
                scale, zero = self._range(name)
                values = self.QuantizeLinear(x, scale, zero)
            self._quantized[key] = _QTensor(values=values, scale=scale, zero=zero)
        return self._quantized[key]

    def _range(self, name: str) -> tuple[ir.Value, ir.Value]:
        measured = self._ranges[name]
        scale = self.constant(f"{name}.scale", np.array(measured.scale, np.float32))
        return scale, self.constant(f"{name}.zero", np.array(measured.zero, np.uint8))


def _with_last(shape: ir.Shape | None, size: int) -> ir.Shape | None:
    return None if shape is None else ir.Shape([*shape[:-1], size])
