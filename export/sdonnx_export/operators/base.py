"""The operators that layers are written in: the one place where precision and target choose ONNX nodes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder, OpBuilder
from onnxscript.nn import Parameter
from sdonnx_runtime.adapters.quantization import BLOCK
from sdonnx_runtime.arrays import AnyArray

from sdonnx_export.checkpoint_model import Weight
from sdonnx_export.operators.precision import PrecisionOf
from sdonnx_export.operators.quantized import quantized_tensors

OPSET = 20
"""Every ONNX Runtime from 1.20 on runs it, DirectML's included; Gelu is in it since then."""

IR_VERSION = 9
"""The model format that came with opset 20."""

OPSET_4_BITS, IR_VERSION_4_BITS = 21, 10
"""Codes of 4 bits, and scales for blocks of them, came later."""

CONTRIB = "com.microsoft"


class TransposedWeight(Parameter):
    """A linear layer's weight, stored (in_features, out_features): the transpose of the checkpoint's."""


class Operators(OpBuilder):
    """Any ONNX operator by its name, and the compound ones of diffusion models by theirs.

    Values are float32, sequences (N, S, C), pictures (N, C, H, W) as they come in and go out. How pictures lie in
    between is this class's own affair: layers that handle them say what they mean (`join`, `add_to_pixels`).

    Args:
        graph: what is written to.
        weights: the checkpoint's.
        precision_of: how they are stored.
    """

    def __init__(self, graph: ir.Graph, weights: Mapping[str, Weight], precision_of: PrecisionOf) -> None:
        super().__init__(GraphBuilder(graph), "", graph.opset_imports[""])
        self.precision_of = precision_of
        self._weights = weights
        self._widened: dict[str, ir.Value] = {}
        self._whole: tuple[ir.Value, ir.Value] | None = None
        self._moments_seen: list[ir.Value] = []
        self.stage = ""

    def begin_stage(self, name: str) -> None:
        """Everything from here to the next call belongs to the stage ``name`` (see `stages.cut`)."""
        self.stage = name

    def begin_tile(self, moments: ir.Value, given: ir.Value) -> None:
        """From here on pictures are tiles of one, over whose whole their norms have a mean and a mean square.

        Norms take those of ``moments`` (N, 2 K, groups), two rows for each, if ``given`` () is 1, and their own of the
        tile if it is 0.
        """
        self._whole = moments, given

    def end_tile(self) -> ir.Value:
        """The moments (N, 2 K, groups) that the norms found in the tile."""
        self._whole = None
        return self.Concat(*self._moments_seen, axis=1)

    def _call_op(self, op_type: str, inputs: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        result = super()._call_op(op_type, inputs, kwargs)
        node = (result if isinstance(result, ir.Value) else result[0]).producer()
        if node is not None:
            node.metadata_props.clear()
            node.metadata_props["stage"] = self.stage
        return result

    def matrix(self, weight: Parameter) -> ir.Value:
        """A weight matrix or kernel as float32: stored in less space, it is widened where it is used."""
        name = str(weight.name)
        precision = self.precision_of(name)
        if precision == "fp32":
            return weight
        if name not in self._widened:
            if precision == "fp16":
                weight.type = ir.TensorType(ir.DataType.FLOAT16)
                self._widened[name] = self.Cast(weight, to=ir.DataType.FLOAT)
            else:
                self._widened[name] = self._dequantized(weight, bits=4 if precision == "int4" else 8)
        return self._widened[name]

    def _dequantized(self, weight: Parameter, *, bits: int) -> ir.Value:
        shape, inputs = sizes(weight), 0 if isinstance(weight, TransposedWeight) else 1
        if bits == 4 and shape[inputs] % BLOCK == 0:
            codes, scale = self.store_codes(str(weight.name), self.reader(weight), shape, axis=inputs, bits=4)
            return self.DequantizeLinear(codes, scale, axis=inputs, block_size=BLOCK)
        codes, scale = self.store_codes(str(weight.name), self.reader(weight), shape, axis=1 - inputs)
        return self.DequantizeLinear(codes, scale, self.no_shift(codes, scale), axis=1 - inputs)

    def no_shift(self, codes: ir.Value, scale: ir.Value) -> ir.Value:
        """A weight's zero points: zeros; where they are left out or shared, some of ONNX Runtime's CPU paths fail."""
        count = scale.shape.numpy() if scale.shape is not None else 1
        return self.constant(f"{codes.name}_zero", np.zeros(count, np.int8))

    def store_codes(
        self, name: str, read: Callable[[], AnyArray], shape: tuple[int, ...], *, axis: int, bits: int = 8
    ) -> list[ir.Value]:
        """The codes and scales of a weight as the graph has them; `quantized_tensors` has the arguments."""
        return [self.store(tensor) for tensor in quantized_tensors(f"{name}_codes", read, shape, axis=axis, bits=bits)]

    def store(self, tensor: ir.TensorProtocol) -> ir.Value:
        """A tensor in the graph, under its own name, once."""
        initializers, name = self.builder.root.graph.initializers, str(tensor.name)
        if name not in initializers:
            self.builder.initializer(tensor, name=name, qualify=False)
        return initializers[name]

    def reader(self, weight: Parameter) -> Callable[[], AnyArray]:
        """Reads a weight as float32 in the layout that the graph has it in."""
        name = str(weight.name)

        def read() -> AnyArray:
            data = self._weights[name].read().astype(np.float32)
            return data.T if isinstance(weight, TransposedWeight) else data

        return read

    def linear(self, x: ir.Value, weight: Parameter, bias: Parameter | None) -> ir.Value:
        """``x @ weight + bias``: weight (in_features, out_features), bias (out_features,)."""
        y = self.MatMul(x, self.matrix(weight))
        return y if bias is None else self.Add(y, bias)

    def embed(self, ids: ir.Value, table: Parameter) -> ir.Value:
        """Rows of ``table`` (entries, C) at ``ids`` (N, S)."""
        precision = self.precision_of(str(table.name))
        if precision == "fp32":
            return self.Gather(table, ids)
        if precision == "fp16":
            table.type = ir.TensorType(ir.DataType.FLOAT16)
            return self.Cast(self.Gather(table, ids), to=ir.DataType.FLOAT)
        codes, scale = self.store_codes(str(table.name), self.reader(table), sizes(table), axis=0)
        rows = self.Cast(self.Gather(codes, ids), to=ir.DataType.FLOAT)
        return self.Mul(rows, self.Unsqueeze(self.Gather(scale, ids), [-1]))

    def conv(
        self,
        x: ir.Value,
        weight: Parameter,
        bias: Parameter | None,
        *,
        stride: int = 1,
        pads: Sequence[int],
        enlarged: bool = False,
        like: ir.Value | None = None,
    ) -> ir.Value:
        """2-D convolution: weight (out_channels, in_channels, k, k), pads (top, left, bottom, right).

        ``enlarged`` is of ``x`` enlarged by `upsample`.
        """
        x = self.upsample(x, like) if enlarged else x
        added = [] if bias is None else [bias]
        return self.Conv(x, self.matrix(weight), *added, strides=[stride, stride], pads=list(pads))

    def attention(self, q: ir.Value, k: ir.Value, v: ir.Value, heads: int, bias: Any = None) -> ir.Value:
        """Scaled dot-product attention over (N, S, heads * d); ``bias`` (1, 1, S, S) is added to the scores."""
        mask = [None, None, bias] if bias is not None else []
        return self._contrib("MultiHeadAttention", q, k, v, *mask, num_heads=heads)

    def group_norm(self, x: ir.Value, weight: Parameter, bias: Parameter, *, groups: int, eps: float) -> ir.Value:
        """Group normalization (arXiv:1803.08494): weight and bias (C,).

        Instance normalization over (N, groups, C / groups * H * W), then the affine map per channel; of a tile, by the
        moments of the whole.
        """
        if self._whole is not None:
            return self._normed(x, weight, bias, groups=groups, eps=eps)
        grouped = self.Reshape(x, [0, groups, -1])
        ones = self.constant(f"ones_{groups}", np.ones(groups, np.float32))
        zeros = self.constant(f"zeros_{groups}", np.zeros(groups, np.float32))
        normed = self.InstanceNormalization(grouped, ones, zeros, epsilon=eps)
        normed = self.Reshape(normed, self.Shape(x))
        return self.Add(self.Mul(normed, self._per_channel(weight)), self._per_channel(bias))

    def _normed(self, x: ir.Value, weight: Parameter, bias: Parameter, *, groups: int, eps: float) -> ir.Value:
        """Group normalization by each group's mean and mean square."""
        mean, square = (self._of_whole(each, groups) for each in self._moments(x, groups))
        variance = self.Relu(self.Sub(square, self.Mul(mean, mean)))  # rounding may leave less than 0
        spread = self.Sqrt(self.Add(variance, self.constant(f"eps_{eps:g}", np.array(eps, np.float32))))
        scale = self.Div(self.Reshape(weight, [1, groups, -1]), spread)  # (N, G, C / G)
        shift = self.Sub(self.Reshape(bias, [1, groups, -1]), self.Mul(mean, scale))
        scale, shift = (self.Reshape(each, self._channels_of(sizes(weight)[0])) for each in (scale, shift))
        return self.Add(self.Mul(x, scale), shift)

    def _moments(self, x: ir.Value, groups: int) -> tuple[ir.Value, ir.Value]:
        """Of each group the mean and the mean square (N, G, 1)."""
        grouped = self.Reshape(x, [0, groups, -1])
        count = self.Cast(self.Shape(grouped, start=2), to=ir.DataType.FLOAT)
        return self.ReduceMean(grouped, [2], keepdims=1), self.Div(
            self.ReduceSumSquare(grouped, [2], keepdims=1), count
        )

    def _of_whole(self, moment: ir.Value, groups: int) -> ir.Value:
        """A tile's moment, or the whole picture's."""
        if self._whole is None:
            return moment
        own = self.Reshape(moment, [0, 1, groups])
        moments, given = self._whole
        whole = self.Gather(moments, [len(self._moments_seen)], axis=1)
        self._moments_seen.append(own)
        return self.Reshape(self.Add(own, self.Mul(given, self.Sub(whole, own))), [0, groups, 1])

    def _channels_of(self, channels: int) -> list[int]:
        """The shape of what is the same at all places of a picture."""
        return [0, channels, 1, 1]

    def layer_norm(self, x: ir.Value, weight: Parameter, bias: Parameter, *, eps: float) -> ir.Value:
        """Layer normalization over the last axis: weight and bias (C,)."""
        return self.LayerNormalization(x, weight, bias, axis=-1, epsilon=eps)

    def silu(self, x: ir.Value) -> ir.Value:
        """``x * sigmoid(x)``, as one node."""
        return self._contrib("QuickGelu", x, alpha=1.0)

    def quick_gelu(self, x: ir.Value) -> ir.Value:
        """``x * sigmoid(1.702 x)``, the activation of OpenAI's CLIP."""
        return self._contrib("QuickGelu", x, alpha=1.702)

    def gelu(self, x: ir.Value) -> ir.Value:
        """``x * Phi(x)``, exact (arXiv:1606.08415)."""
        return self.Gelu(x)

    def geglu(self, x: ir.Value, weight: Parameter, bias: Parameter | None) -> ir.Value:
        """``a * gelu(b)`` of the two halves of ``x @ weight + bias`` (arXiv:2002.05202)."""
        hidden, gate = self.Split(self.linear(x, weight, bias), axis=-1, num_outputs=2, _outputs=2)
        return self.Mul(hidden, self.gelu(gate))

    def to_sequence(self, x: ir.Value, channels: int) -> ir.Value:
        """(N, C, H, W) to (N, H * W, C)."""
        return self.Transpose(self.Reshape(x, [0, channels, -1]), perm=[0, 2, 1])

    def to_picture(self, x: ir.Value, like: ir.Value) -> ir.Value:
        """(N, H * W, C) to (N, C, H, W), with the shape of ``like``."""
        return self.Reshape(self.Transpose(x, perm=[0, 2, 1]), self.Shape(like))

    def every_other(self, x: ir.Value, like: ir.Value, channels: int) -> ir.Value:
        """Of the places (N, H * W, C) of the picture ``like``, those in every other row and column, from the first."""
        grid = self.Reshape(x, self.Concat([0], self._extent(like), [channels], axis=0))  # (N, H, W, C)
        return self.Reshape(self.Slice(grid, [0, 0], [2**31, 2**31], [1, 2], [2, 2]), [0, -1, channels])

    def _extent(self, picture: ir.Value) -> ir.Value:
        """Its height and width."""
        return self.Shape(picture, start=2)

    def from_input(self, x: ir.Value) -> ir.Value:
        """A picture (N, C, H, W) that comes into the graph."""
        return x

    def to_output(self, x: ir.Value) -> ir.Value:
        """A picture as (N, C, H, W), to go out of the graph."""
        return x

    def join(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Two pictures' channels, one after the other."""
        return self.Concat(x, y, axis=1)

    def add_to_pixels(self, x: ir.Value, vector: ir.Value) -> ir.Value:
        """A picture with ``vector`` (N, C) added at each of its places."""
        return self.Add(x, self.Unsqueeze(vector, [2, 3]))

    def add_residual(self, x: ir.Value, residual: ir.Value) -> ir.Value:
        """A picture and an input of the graph, (N, C, H, W) or of sizes of 1; rows are those of the one with more."""
        y = self.Add(x, self.from_input(residual))
        y.type, y.shape = x.type, None if x.shape is None else ir.Shape([None, *x.shape[1:]])
        return y

    def match_rows(self, x: ir.Value, like: ir.Value, *, rank: int) -> ir.Value:
        """(n, …) repeated as a whole to the N rows of ``like``; N is a multiple of n."""
        times = self.Div(self.Shape(like, end=1), self.Shape(x, end=1))
        return self.Tile(x, self.Concat(times, [1] * (rank - 1), axis=0))

    def upsample(self, x: ir.Value, like: ir.Value | None = None) -> ir.Value:
        """Nearest-neighbour upsampling, by 2 or to the height and width of ``like``."""
        options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        if like is None:
            return self.Resize(x, None, [1.0, 1.0, 2.0, 2.0], **options)
        size = self.Concat(self.Shape(x, end=2), self.Shape(like, start=2), axis=0)
        return self.Resize(x, None, None, size, **options)

    def _contrib(self, op_type: str, x: ir.Value, *inputs: Any, **attributes: Any) -> ir.Value:
        """One of ONNX Runtime's own operators; those used here give back the shape of their first input."""
        y = self._call_op(op_type, [x, *inputs], {**attributes, "_domain": CONTRIB, "_version": 1})
        y.type, y.shape = x.type, x.shape
        return y

    def _per_channel(self, vector: Parameter) -> ir.Value:
        """(C,) to (C, 1, 1), which broadcasts over pictures; folded into the weight when a session loads."""
        return self.Unsqueeze(vector, [1, 2])

    def constant(self, name: str, data: AnyArray) -> ir.Value:
        """An array under a name of its own, written once however often it is used."""
        return self.store(ir.tensor(data, name=name))


def sizes(parameter: Parameter) -> tuple[int, ...]:
    """A parameter's shape."""
    return tuple(parameter.shape.numpy()) if parameter.shape is not None else ()
