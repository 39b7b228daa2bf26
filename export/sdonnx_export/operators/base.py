"""The operators that layers are written in: the one place where precision and target choose ONNX nodes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder
from onnxscript.nn import Parameter
from sdonnx_runtime.adapters.quantization import BLOCK
from sdonnx_runtime.arrays import AnyArray

from sdonnx_export.checkpoint_model import Weight
from sdonnx_export.operators.inference import InferringBuilder
from sdonnx_export.operators.precision import PrecisionLookup
from sdonnx_export.operators.quantized import quantized_tensors

OPSET = 20
"""Every ONNX Runtime from 1.20 on supports it, DirectML's included; it is the first with Gelu."""

IR_VERSION = 9
"""The model format that came with opset 20."""

OPSET_4_BITS, IR_VERSION_4_BITS = 21, 10
"""The first with int4 and with a scale for each block."""

CONTRIB = "com.microsoft"


class TransposedWeight(Parameter):
    """A linear weight, stored (in_features, out_features): the transpose of the checkpoint's."""


def checkpoint_shape(weight: ir.Value) -> tuple[int, ...]:
    """Return the shape of a weight of the graph in the checkpoint."""
    return sizes(weight)[::-1] if isinstance(weight, TransposedWeight) else sizes(weight)


def transpose_linear(weight: ir.Value, data: AnyArray) -> AnyArray:
    """Transpose a linear weight from the checkpoint's layout to the graph's or back; others stay as they are."""
    return data.T if isinstance(weight, TransposedWeight) else data


@dataclass(frozen=True, kw_only=True)
class ConvSpec:
    """A 2-D convolution."""

    weight: Parameter
    """(out_channels, in_channels, k, k)."""
    bias: Parameter | None
    """(out_channels,)."""
    stride: int = 1
    pads: Sequence[int]
    """Top, left, bottom, right."""
    upsample: bool = False
    """Whether the input is upsampled first, see `Operators.upsample`."""
    like: ir.Value | None = None
    """The value whose height and width the upsampled input gets."""

    @property
    def name(self) -> str:
        """The weight's."""
        return str(self.weight.name)

    @property
    def is_pointwise(self) -> bool:
        """Whether the kernel is 1x1."""
        return sizes(self.weight)[2] == 1

    @property
    def attributes(self) -> dict[str, Any]:
        """Those of the ONNX operator."""
        return {"strides": [self.stride, self.stride], "pads": list(self.pads)}


class Operators(OpBuilder):
    """Any ONNX operator by its name, and the compound ones of diffusion models by theirs.

    Values are float32: sequences (N, S, C), and images or feature maps, which enter and leave the graph as
    (N, C, H, W). Their layout in between is this class's own affair: layers use `concat_channels`, `add_per_channel`
    and the like.

    Args:
        graph: the graph to write to.
        weights: the checkpoint's.
        find_precision: the precision that each weight is stored in.
    """

    def __init__(self, graph: ir.Graph, weights: Mapping[str, Weight], find_precision: PrecisionLookup) -> None:
        super().__init__(InferringBuilder(graph), "", graph.opset_imports[""])
        self.find_precision = find_precision
        self._weights = weights
        self._float32: dict[str, ir.Value] = {}
        self._image_stats: tuple[ir.Value, ir.Value] | None = None
        self._tile_stats: list[ir.Value] = []
        self.stage = ""
        self.image_prompts: tuple[ir.Value, ir.Value] | None = None
        """The inputs IMAGE_KEYS and IMAGE_VALUES of a U-Net, which every cross-attention reads a part of."""

    def begin_stage(self, name: str) -> None:
        """Begin the stage ``name``, which all operators up to the next call belong to (see `partition.cut`)."""
        self.stage = name

    def use_norm_stats(self, stats: ir.Value, use: ir.Value) -> None:
        """Treat feature maps as tiles of an image from here on: norms take the statistics of the whole image.

        They are ``stats`` (N, 2 K, groups), mean and mean square of each norm, if ``use`` () is 1; the tile's own if 0.
        """
        self._image_stats = stats, use

    def collect_norm_stats(self) -> ir.Value:
        """End `use_norm_stats`, and return the statistics (N, 2 K, groups) of the tile itself."""
        self._image_stats = None
        return self.Concat(*self._tile_stats, axis=1)

    def _call_op(self, op_type: str, inputs: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        result = super()._call_op(op_type, inputs, kwargs)
        node = (result if isinstance(result, ir.Value) else result[0]).producer()
        if node is not None:
            node.metadata_props.clear()
            node.metadata_props["stage"] = self.stage
        return result

    def to_float32(self, weight: Parameter) -> ir.Value:
        """Return a linear or conv weight as float32: cast or dequantized where it is stored in another type."""
        name = str(weight.name)
        precision = self.find_precision(name)
        if precision == "fp32":
            return weight
        if name not in self._float32:
            if precision == "fp16":
                weight.type = ir.TensorType(ir.DataType.FLOAT16)
                self._float32[name] = self.Cast(weight, to=ir.DataType.FLOAT)
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
        return lambda: transpose_linear(weight, self._weights[name].read().astype(np.float32))

    def linear(self, x: ir.Value, weight: Parameter, bias: Parameter | None) -> ir.Value:
        """``x @ weight + bias``: weight (in_features, out_features), bias (out_features,)."""
        y = self.MatMul(x, self.to_float32(weight))
        return y if bias is None else self.Add(y, bias)

    def embed(self, ids: ir.Value, table: Parameter) -> ir.Value:
        """Look up ``ids`` (N, S) in ``table`` (entries, C)."""
        precision = self.find_precision(str(table.name))
        if precision == "fp32":
            return self.Gather(table, ids)
        if precision == "fp16":
            table.type = ir.TensorType(ir.DataType.FLOAT16)
            return self.Cast(self.Gather(table, ids), to=ir.DataType.FLOAT)
        quantized, scale = self.store_quantized(str(table.name), self.stored_reader(table), sizes(table), axis=0)
        vectors = self.Cast(self.Gather(quantized, ids), to=ir.DataType.FLOAT)
        return self.Mul(vectors, self.Unsqueeze(self.Gather(scale, ids), [-1]))

    def conv(self, x: ir.Value, spec: ConvSpec) -> ir.Value:
        """2-D convolution."""
        bias = [] if spec.bias is None else [spec.bias]
        return self.Conv(self._conv_input(x, spec), self.to_float32(spec.weight), *bias, **spec.attributes)

    def _conv_input(self, x: ir.Value, spec: ConvSpec) -> ir.Value:
        return self.upsample(x, spec.like) if spec.upsample else x

    def attention(self, q: ir.Value, k: ir.Value, v: ir.Value, heads: int, bias: Any = None) -> ir.Value:
        """Scaled dot-product attention over (N, S, heads * d); ``bias`` (1, 1, S, S) is added to the scores."""
        mask = [None, None, bias] if bias is not None else []
        return self._contrib("MultiHeadAttention", q, k, v, *mask, num_heads=heads)

    def group_norm(self, x: ir.Value, weight: Parameter, bias: Parameter, *, groups: int, eps: float) -> ir.Value:
        """Group normalization (arXiv:1803.08494): weight and bias (C,).

        Instance normalization over (N, groups, C / groups * H * W), then the affine map per channel; of a tile, with
        the statistics of the whole image.
        """
        if self._image_stats is not None:
            return self._normalize_groups(x, weight, bias, groups=groups, eps=eps)
        grouped = self.Reshape(x, [0, groups, -1])
        ones = self.constant(f"ones_{groups}", np.ones(groups, np.float32))
        zeros = self.constant(f"zeros_{groups}", np.zeros(groups, np.float32))
        normed = self.InstanceNormalization(grouped, ones, zeros, epsilon=eps)
        normed = self.Reshape(normed, self.Shape(x))
        return self.Add(self.Mul(normed, self._per_channel(weight)), self._per_channel(bias))

    def _normalize_groups(
        self, x: ir.Value, weight: Parameter, bias: Parameter, *, groups: int, eps: float
    ) -> ir.Value:
        """Group normalization from each group's mean and mean square."""
        mean, square = (self._global_stat(each, groups) for each in self._group_stats(x, groups))
        variance = self.Relu(self.Sub(square, self.Mul(mean, mean)))  # rounding may leave less than 0
        deviation = self.Sqrt(self.Add(variance, self.constant(f"eps_{eps:g}", np.array(eps, np.float32))))
        scale = self.Div(self.Reshape(weight, [1, groups, -1]), deviation)  # (N, G, C / G)
        shift = self.Sub(self.Reshape(bias, [1, groups, -1]), self.Mul(mean, scale))
        scale, shift = (self.Reshape(each, self._per_channel_shape(sizes(weight)[0])) for each in (scale, shift))
        return self.Add(self.Mul(x, scale), shift)

    def _group_stats(self, x: ir.Value, groups: int) -> tuple[ir.Value, ir.Value]:
        """Mean and mean square of each group, (N, G, 1)."""
        grouped = self.Reshape(x, [0, groups, -1])
        count = self.Cast(self.Shape(grouped, start=2), to=ir.DataType.FLOAT)
        return self.ReduceMean(grouped, [2], keepdims=1), self.Div(
            self.ReduceSumSquare(grouped, [2], keepdims=1), count
        )

    def _global_stat(self, stat: ir.Value, groups: int) -> ir.Value:
        """The statistic of the whole image where ``stat`` is a tile's."""
        if self._image_stats is None:
            return stat
        own = self.Reshape(stat, [0, 1, groups])
        stats, use = self._image_stats
        whole = self.Gather(stats, [len(self._tile_stats)], axis=1)
        self._tile_stats.append(own)
        return self.Reshape(self.Add(own, self.Mul(use, self.Sub(whole, own))), [0, groups, 1])

    def _per_channel_shape(self, channels: int) -> list[int]:
        """The shape of one value per channel of a feature map."""
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

    def prelu(self, x: ir.Value, slopes: Parameter) -> ir.Value:
        """A feature map with what is below 0 multiplied by its channel's slope (C,), arXiv:1502.01852."""
        return self.PRelu(x, self._per_channel(slopes))

    def geglu(self, x: ir.Value, weight: Parameter, bias: Parameter | None) -> ir.Value:
        """``a * gelu(b)`` of the two halves of ``x @ weight + bias`` (arXiv:2002.05202)."""
        hidden, gate = self.Split(self.linear(x, weight, bias), axis=-1, num_outputs=2, _outputs=2)
        return self.Mul(hidden, self.gelu(gate))

    def to_sequence(self, x: ir.Value, channels: int) -> ir.Value:
        """(N, C, H, W) to (N, H * W, C)."""
        return self.Transpose(self.Reshape(x, [0, channels, -1]), perm=[0, 2, 1])

    def to_feature_map(self, x: ir.Value, like: ir.Value) -> ir.Value:
        """(N, H * W, C) to (N, C, H, W), with the shape of ``like``."""
        return self.Reshape(self.Transpose(x, perm=[0, 2, 1]), self.Shape(like))

    def downsample_tokens(self, x: ir.Value, like: ir.Value, channels: int) -> ir.Value:
        """Keep every second row and column of the tokens (N, H * W, C) of the feature map ``like``, from the first."""
        grid = self.Reshape(x, self.Concat([0], self._spatial_shape(like), [channels], axis=0))  # (N, H, W, C)
        return self.Reshape(self.Slice(grid, [0, 0], [2**31, 2**31], [1, 2], [2, 2]), [0, -1, channels])

    def _spatial_shape(self, x: ir.Value) -> ir.Value:
        """Height and width."""
        return self.Shape(x, start=2)

    def from_input(self, x: ir.Value) -> ir.Value:
        """Convert an input of the graph from (N, C, H, W) to the layout of feature maps."""
        return x

    def to_output(self, x: ir.Value) -> ir.Value:
        """Convert an output of the graph to (N, C, H, W)."""
        return x

    def concat_channels(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Concatenate the channels of two feature maps."""
        return self.Concat(x, y, axis=1)

    def add_per_channel(self, x: ir.Value, vector: ir.Value) -> ir.Value:
        """Add ``vector`` (N, C) to every pixel of a feature map."""
        return self.Add(x, self.Unsqueeze(vector, [2, 3]))

    def add_residual(self, x: ir.Value, residual: ir.Value) -> ir.Value:
        """Add an input of the graph, (N, C, H, W) or of sizes of 1, to a feature map; the larger batch size counts."""
        y = self.Add(x, self.from_input(residual))
        y.type, y.shape = x.type, None if x.shape is None else ir.Shape([None, *x.shape[1:]])
        return y

    def repeat_batch(self, x: ir.Value, like: ir.Value, *, rank: int) -> ir.Value:
        """Repeat (n, …) as a whole to the batch size N of ``like``; N is a multiple of n."""
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
        """One of ONNX Runtime's own operators, whose output has the shape of its first input."""
        y = self._call_op(op_type, [x, *inputs], {**attributes, "_domain": CONTRIB, "_version": 1})
        y.type, y.shape = x.type, x.shape
        return y

    def _per_channel(self, vector: Parameter) -> ir.Value:
        """(C,) to (C, 1, 1), which broadcasts over feature maps; folded into the weight when a session loads."""
        return self.Unsqueeze(vector, [1, 2])

    def constant(self, name: str, data: AnyArray) -> ir.Value:
        """Store an array under its own name, once however often it is used."""
        return self.store(ir.tensor(data, name=name))


def sizes(parameter: ir.Value) -> tuple[int, ...]:
    """Return a parameter's shape in the graph."""
    return tuple(parameter.shape.numpy()) if parameter.shape is not None else ()
