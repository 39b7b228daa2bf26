"""What operators are built on: stages, element types, and the tensors that a graph stores."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder
from onnxscript.nn import Parameter
from sdonnx_runtime.adapters.quantization import BLOCK
from sdonnx_runtime.arrays import AnyArray

from sdonnx_export.checkpoint_model import Weight
from sdonnx_export.operators.inference import InferringBuilder
from sdonnx_export.operators.layouts import TransposedWeight, sizes, to_graph_layout
from sdonnx_export.operators.precision import PrecisionLookup
from sdonnx_export.operators.quantized import quantized_tensors

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16

_SAME_TYPE = frozenset({"Add", "Sub", "Mul", "Div", "Concat", "MatMul", "Conv", "PRelu"})
"""Operators whose floating inputs have one type."""


class StoredTensors(OpBuilder):
    """Any ONNX operator by its name, in stages, over tensors that the graph stores.

    Layers compute in float32, or in ``dtype`` where that is float16: then all layers but those whose precision is fp32.
    Where values of both types meet, the result is float32.

    Args:
        graph: the graph to write to.
        weights: the checkpoint's.
        find_precision: the precision that each weight is stored in.
        dtype: the type that layers compute in.
    """

    def __init__(
        self,
        graph: ir.Graph,
        weights: Mapping[str, Weight],
        find_precision: PrecisionLookup,
        dtype: ir.DataType = FLOAT,
    ) -> None:
        super().__init__(InferringBuilder(graph), "", graph.opset_imports[""])
        self.find_precision = find_precision
        self.dtype = dtype
        self.stage = ""
        self._weights = weights
        self._float32: dict[str, ir.Value] = {}
        self._casts: dict[tuple[ir.Value, ir.DataType, str], ir.Value] = {}

    def begin_stage(self, name: str) -> None:
        """Begin the stage ``name``, which all operators up to the next call belong to (see `partition.cut`)."""
        self.stage = name

    def _call_op(self, op_type: str, inputs: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        inputs = self.same_type(*inputs) if op_type in _SAME_TYPE else inputs
        result = super()._call_op(op_type, inputs, kwargs)
        node = (result if isinstance(result, ir.Value) else result[0]).producer()
        if node is not None:
            node.metadata_props.clear()
            node.metadata_props["stage"] = self.stage
        return result

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Convert a floating value to another floating type, once in each stage."""
        if self.dtype == FLOAT or x.dtype == dtype:
            return x
        if x.dtype is None:
            raise TypeError(f"{x.name} has no known type")
        key = x, dtype, self.stage  # a value that two stages read would be an edge between them
        if key not in self._casts:
            self._casts[key] = self.Cast(x, to=dtype)
        return self._casts[key]

    def same_type(self, *inputs: Any) -> Sequence[Any]:
        """Widen float16 inputs to float32 if others are float32; constants of Python follow."""
        types = {each.dtype for each in inputs if isinstance(each, ir.Value)}
        if not types >= {FLOAT, FLOAT16}:
            return inputs
        return [self.cast(each, FLOAT) if isinstance(each, ir.Value) else each for each in inputs]

    def dtype_of(self, weight: Parameter) -> ir.DataType:
        """The type that the layer of a weight computes in."""
        return self.dtype if self.find_precision(str(weight.name)) == "fp16" else FLOAT

    def parameter(self, parameter: Parameter, dtype: ir.DataType | None = None) -> ir.Value:
        """A bias or the like, which is stored in the type it is used in: ``dtype``, or by default its layer's."""
        parameter.type = ir.TensorType(self.dtype_of(parameter) if dtype is None else dtype)
        return parameter

    def matrix(self, weight: Parameter) -> ir.Value:
        """A linear or conv weight in the type that its layer computes in: cast or dequantized if stored in another."""
        name = str(weight.name)
        precision = self.find_precision(name)
        if precision == "fp32":
            return weight
        if precision == "fp16":
            weight.type = ir.TensorType(FLOAT16)
            if self.dtype == FLOAT16:
                return weight
        if name not in self._float32:
            if precision == "fp16":
                self._float32[name] = self.Cast(weight, to=FLOAT)
            else:
                self._float32[name] = self._dequantize(weight, bits=4 if precision == "int4" else 8)
        return self._float32[name]

    def _dequantize(self, weight: Parameter, *, bits: int) -> ir.Value:
        shape, inputs = sizes(weight), 0 if isinstance(weight, TransposedWeight) else 1
        name, read = str(weight.name), self.stored_reader(weight)
        if bits == 4 and shape[inputs] % BLOCK == 0:
            quantized, scale = self.store_quantized(name, read, shape, axis=inputs, bits=4)
            return self.DequantizeLinear(quantized, scale, axis=inputs, block_size=BLOCK)
        quantized, scale = self.store_quantized(name, read, shape, axis=1 - inputs)
        return self.DequantizeLinear(quantized, scale, self.zero_point(quantized, scale), axis=1 - inputs)

    def zero_point(self, quantized: ir.Value, scale: ir.Value) -> ir.Value:
        """A weight's zero points: zeros; without them, or shared, some of ONNX Runtime's CPU kernels fail."""
        count = scale.shape.numpy() if scale.shape is not None else 1
        return self.constant(f"{quantized.name}_zero", np.zeros(count, np.int8))

    def store_quantized(
        self, name: str, read: Callable[[], AnyArray], shape: tuple[int, ...], *, axis: int, bits: int = 8
    ) -> list[ir.Value]:
        """Store a weight's quantized values and their scales; for the arguments see `quantized_tensors`."""
        tensors = quantized_tensors(f"{name}_quantized", read, shape, axis=axis, bits=bits)
        return [self.store(tensor) for tensor in tensors]

    def store(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Store a tensor in the graph under its own name, once."""
        initializers, name = self.builder.root.graph.initializers, str(tensor.name)
        if name not in initializers:
            self.builder.initializer(tensor, name=name, qualify=False)
        return initializers[name]

    def stored_reader(self, weight: Parameter) -> Callable[[], AnyArray]:
        """Return a function that reads a weight as float32 in the graph's layout."""
        name = str(weight.name)
        return lambda: to_graph_layout(weight, self._weights[name].read().astype(np.float32))

    def constant(self, name: str, data: AnyArray, dtype: ir.DataType | None = None) -> ir.Value:
        """Store an array under its own name, once however often it is used; floats as ``dtype``, if given."""
        if dtype == FLOAT16:
            return self.store(ir.tensor(data.astype(np.float16), name=f"{name}_fp16"))
        return self.store(ir.tensor(data, name=name))
