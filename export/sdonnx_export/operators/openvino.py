"""Operators for ONNX Runtime's OpenVINO provider: what OpenVINO computes in 8 bits."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from onnxscript.nn import Parameter
from sdonnx_runtime.arrays import AnyArray

from sdonnx_export.checkpoint_model import Weight
from sdonnx_export.operators.base import ConvSpec, Operators
from sdonnx_export.operators.layouts import sizes
from sdonnx_export.operators.precision import PrecisionLookup
from sdonnx_export.operators.quantized import Range


class OpenVinoOperators(Operators):
    """`Operators` whose int8 layers read inputs that are quantized and dequantized again, as their weights are.

    OpenVINO makes one int8 kernel of a Conv or MatMul and the QuantizeLinear and DequantizeLinear before it. It has
    none for inputs whose range is found in each run.

    Args:
        graph: the graph to write to.
        weights: the checkpoint's.
        find_precision: the layers' precisions; what is not int8 is as in a generic graph.
        ranges: of each int8 layer's input, by the weight's name, a layer without one is as int8-weights; and of
            queries and keys, by that of the layer that makes them with ``.output``.
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
        self._rounded: dict[tuple[ir.Value, Range, str], ir.Value] = {}
        self._layers: dict[ir.Value, str] = {}

    def linear(self, x: ir.Value, weight: Parameter, bias: Parameter | None) -> ir.Value:
        """``x @ weight + bias``, as int8 MatMul where the layer is int8."""
        y = super().linear(self._round(x, str(weight.name)), weight, bias)
        self._layers[y] = str(weight.name)
        return y

    def geglu(self, x: ir.Value, weight: Parameter, bias: Parameter | None) -> ir.Value:
        """``a * gelu(b)``; each half is an int8 MatMul of its own, so that nothing is split afterwards."""
        name = str(weight.name)
        if self.find_precision(name) != "int8":
            return super().geglu(x, weight, bias)
        inputs, outputs = sizes(weight)
        rounded, read, half = self._round(x, name), self.stored_reader(weight), outputs // 2

        def part(start: int) -> ir.Value:
            def read_part() -> AnyArray:
                return np.ascontiguousarray(read()[:, start : start + half])

            quantized, scale = self.store_quantized(f"{name}_{start}", read_part, (inputs, half), axis=1)
            columns = self.DequantizeLinear(quantized, scale, self.zero_point(quantized, scale), axis=1)
            y = self.MatMul(rounded, columns)
            return y if bias is None else self.Add(y, self.Slice(bias, [start], [start + half]))

        hidden, gate = part(0), part(half)
        return self.Mul(hidden, self.gelu(gate))

    def conv(self, x: ir.Value, spec: ConvSpec) -> ir.Value:
        """2-D convolution, as int8 Conv where the layer is int8; what is upsampled is quantized before."""
        return super().conv(self._round(x, spec.name), spec)

    def attention(self, q: ir.Value, k: ir.Value, v: ir.Value, heads: int, *, upcast: bool = False) -> ir.Value:
        """Scaled dot-product attention over (N, S, heads * d); its scores are products of int8, but with ``upcast``."""
        names = [f"{self._layers.get(each)}.output" for each in (q, k)]
        if not upcast and all(name in self._ranges for name in names):
            q, k = (self._round_symmetrically(each, name) for each, name in zip((q, k), names, strict=True))
        return super().attention(q, k, v, heads, upcast=upcast)

    def _round_symmetrically(self, x: ir.Value, name: str) -> ir.Value:
        """Quantize to int8 and dequantize: of a product of activations in 8 bits, neither may have a zero point."""
        scale = self.constant(f"{name}.scale", np.array(self._ranges[name].symmetric_scale, np.float32))
        zero = self.constant(f"{name}.zero", np.array(0, np.int8))
        return self.DequantizeLinear(self.QuantizeLinear(x, scale, zero), scale, zero)

    def _round(self, x: ir.Value, name: str) -> ir.Value:
        """Quantize and dequantize the input of the layer ``name`` if it is int8; one that several read, once."""
        measured = self._ranges.get(name)
        if measured is None or self.find_precision(name) != "int8":
            return x
        key = x, measured, self.stage  # a value that two stages read would be an edge between them
        if key not in self._rounded:
            scale = self.constant(f"{name}.scale", np.array(measured.scale, np.float32))
            zero = self.constant(f"{name}.zero", np.array(measured.zero, np.uint8))
            self._rounded[key] = self.DequantizeLinear(self.QuantizeLinear(x, scale, zero), scale, zero)
        return self._rounded[key]
