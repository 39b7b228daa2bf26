"""The operators that layers are written in: the one place where precision and target choose ONNX nodes."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder, OpBuilder
from onnxscript.nn import Parameter
from sdonnx_runtime.arrays import AnyArray

Precision: TypeAlias = Literal["fp32", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")

OPSET = 20
"""Every ONNX Runtime from 1.20 on runs it, DirectML's included; Gelu is in it since then."""

IR_VERSION = 9
"""The model format that came with opset 20."""

CONTRIB = "com.microsoft"


class Operators(OpBuilder):
    """Any ONNX operator by its name, and the compound ones of diffusion models by theirs.

    Values are float32, pictures (N, C, H, W), sequences (N, S, C).
    """

    def __init__(self, graph: ir.Graph, precision: Precision) -> None:
        super().__init__(GraphBuilder(graph), "", OPSET)
        self._precision = precision
        self._widened: dict[str, ir.Value] = {}
        self._stage = ""

    def begin_stage(self, name: str) -> None:
        """Everything from here to the next call belongs to the stage ``name`` (see `stages.cut`)."""
        self._stage = name

    def _call_op(self, op_type: str, inputs: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        result = super()._call_op(op_type, inputs, kwargs)
        node = (result if isinstance(result, ir.Value) else result[0]).producer()
        if node is not None:
            node.metadata_props.clear()
            node.metadata_props["stage"] = self._stage
        return result

    def matrix(self, weight: Parameter) -> ir.Value:
        """A weight matrix or kernel as float32; ``fp16`` stores it in half the space and casts where it is used."""
        if self._precision == "fp32":
            return weight
        name = str(weight.name)
        if name not in self._widened:
            weight.type = ir.TensorType(ir.DataType.FLOAT16)
            self._widened[name] = self.Cast(weight, to=ir.DataType.FLOAT)
        return self._widened[name]

    def linear(self, x: ir.Value, weight: Parameter, bias: Parameter | None) -> ir.Value:
        """``x @ weight + bias``: weight (in_features, out_features), bias (out_features,)."""
        y = self.MatMul(x, self.matrix(weight))
        return y if bias is None else self.Add(y, bias)

    def embed(self, ids: ir.Value, table: Parameter) -> ir.Value:
        """Rows of ``table`` (entries, C) at ``ids`` (N, S)."""
        if self._precision == "fp32":
            return self.Gather(table, ids)
        table.type = ir.TensorType(ir.DataType.FLOAT16)
        return self.Cast(self.Gather(table, ids), to=ir.DataType.FLOAT)

    def conv(
        self, x: ir.Value, weight: Parameter, bias: Parameter, *, stride: int = 1, pads: Sequence[int]
    ) -> ir.Value:
        """2-D convolution: weight (out_channels, in_channels, k, k), pads (top, left, bottom, right)."""
        return self.Conv(x, self.matrix(weight), bias, strides=[stride, stride], pads=list(pads))

    def attention(self, q: ir.Value, k: ir.Value, v: ir.Value, heads: int, bias: Any = None) -> ir.Value:
        """Scaled dot-product attention over (N, S, heads * d); ``bias`` (1, 1, S, S) is added to the scores."""
        mask = [None, None, bias] if bias is not None else []
        return self._contrib("MultiHeadAttention", q, k, v, *mask, num_heads=heads)

    def group_norm(self, x: ir.Value, weight: Parameter, bias: Parameter, *, groups: int, eps: float) -> ir.Value:
        """Group normalization (arXiv:1803.08494): weight and bias (C,).

        Instance normalization over (N, groups, C / groups * H * W), then the affine map per channel.
        """
        grouped = self.Reshape(x, [0, groups, -1])
        ones = self.constant(f"ones_{groups}", np.ones(groups, np.float32))
        zeros = self.constant(f"zeros_{groups}", np.zeros(groups, np.float32))
        normed = self.InstanceNormalization(grouped, ones, zeros, epsilon=eps)
        normed = self.Reshape(normed, self.Shape(x))
        return self.Add(self.Mul(normed, self._per_channel(weight)), self._per_channel(bias))

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

    def geglu(self, x: ir.Value) -> ir.Value:
        """``a * gelu(b)`` of the two halves of the last axis (arXiv:2002.05202)."""
        hidden, gate = self.Split(x, axis=-1, num_outputs=2, _outputs=2)
        return self.Mul(hidden, self.gelu(gate))

    def to_sequence(self, x: ir.Value, channels: int) -> ir.Value:
        """(N, C, H, W) to (N, H * W, C)."""
        return self.Transpose(self.Reshape(x, [0, channels, -1]), perm=[0, 2, 1])

    def to_picture(self, x: ir.Value, like: ir.Value) -> ir.Value:
        """(N, H * W, C) to (N, C, H, W), with the shape of ``like``."""
        return self.Reshape(self.Transpose(x, perm=[0, 2, 1]), self.Shape(like))

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
        initializers = self.builder.root.graph.initializers
        if name not in initializers:
            self.builder.initializer(ir.tensor(data, name=name), name=name, qualify=False)
        return initializers[name]
