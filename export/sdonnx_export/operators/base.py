"""The operators that layers are written in: the one place where precision and target choose ONNX nodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.nn import Parameter

from sdonnx_export.checkpoint_model import Weight
from sdonnx_export.operators.layouts import sizes
from sdonnx_export.operators.precision import PrecisionLookup
from sdonnx_export.operators.stored import FLOAT, FLOAT16, StoredTensors

OPSET = 20
"""Every ONNX Runtime from 1.20 on supports it, DirectML's included."""

IR_VERSION = 9
"""The model format that came with opset 20."""

OPSET_4_BITS, IR_VERSION_4_BITS = 21, 10
"""The first with int4 and with a scale for each block."""

CONTRIB = "com.microsoft"


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


class Operators(StoredTensors):
    """Any ONNX operator by its name, and the compound ones of diffusion models by theirs.

    Values are sequences (N, S, C), and images or feature maps, which enter and leave the graph as float32
    (N, C, H, W). Their type and layout in between is this class's own affair: layers use `concat_channels`,
    `add_per_channel` and the like.

    Args:
        graph: the graph to write to.
        weights: the checkpoint's.
        find_precision: the precision that each weight is stored in.
        dtype: the type that layers compute in, see `StoredTensors`.
    """

    def __init__(
        self,
        graph: ir.Graph,
        weights: Mapping[str, Weight],
        find_precision: PrecisionLookup,
        dtype: ir.DataType = FLOAT,
    ) -> None:
        super().__init__(graph, weights, find_precision, dtype)
        self._image_stats: tuple[ir.Value, ir.Value] | None = None
        self._tile_stats: list[ir.Value] = []
        self._causal_mask: tuple[ir.Value, int] | None = None
        self.image_prompts: tuple[ir.Value, ir.Value] | None = None
        """The inputs IMAGE_KEYS and IMAGE_VALUES of a U-Net, which every cross-attention reads a part of."""

    def use_norm_stats(self, stats: ir.Value, use: ir.Value) -> None:
        """Treat feature maps as tiles of an image from here on: norms take the statistics of the whole image.

        They are ``stats`` (N, 2 K, groups), mean and mean square of each norm, if ``use`` () is 1; the tile's own if 0.
        """
        self._image_stats = stats, use

    def collect_norm_stats(self) -> ir.Value:
        """End `use_norm_stats`, and return the statistics (N, 2 K, groups) of the tile itself."""
        self._image_stats = None
        return self.Concat(*self._tile_stats, axis=1)

    def linear(self, x: ir.Value, weight: Parameter, bias: Parameter | None) -> ir.Value:
        """``x @ weight + bias``: weight (in_features, out_features), bias (out_features,)."""
        dtype = self.dtype_of(weight)
        y = self.MatMul(self.cast(x, dtype), self.matrix(weight))
        return y if bias is None else self.Add(y, self.parameter(bias, dtype))

    def embed(self, ids: ir.Value, table: Parameter) -> ir.Value:
        """Look up ``ids`` (N, S) in ``table`` (entries, C); the vectors are float32, whatever layers compute in."""
        precision = self.find_precision(str(table.name))
        if precision == "fp32":
            return self.Gather(table, ids)
        if precision == "fp16":
            table.type = ir.TensorType(FLOAT16)
            return self.Cast(self.Gather(table, ids), to=FLOAT)
        quantized, scale = self.store_quantized(str(table.name), self.stored_reader(table), sizes(table), axis=0)
        vectors = self.Cast(self.Gather(quantized, ids), to=FLOAT)
        return self.Mul(vectors, self.Unsqueeze(self.Gather(scale, ids), [-1]))

    def conv(self, x: ir.Value, spec: ConvSpec) -> ir.Value:
        """2-D convolution."""
        dtype = self.dtype_of(spec.weight)
        bias = [] if spec.bias is None else [self.parameter(spec.bias, dtype)]
        x = self.cast(self._conv_input(x, spec), dtype)
        return self.Conv(x, self.matrix(spec.weight), *bias, **spec.attributes)

    def _conv_input(self, x: ir.Value, spec: ConvSpec) -> ir.Value:
        return self.upsample(x, spec.like) if spec.upsample else x

    def attention(self, q: ir.Value, k: ir.Value, v: ir.Value, heads: int, *, upcast: bool = False) -> ir.Value:
        """Scaled dot-product attention over (N, S, heads * d); with ``upcast`` its scores are float32."""
        q, k, v = self.same_type(*((self.cast(each, FLOAT) for each in (q, k, v)) if upcast else (q, k, v)))
        return self._contrib("MultiHeadAttention", q, k, v, num_heads=heads)

    def decomposed_attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, heads: int, mask: ir.Value | None = None
    ) -> ir.Value:
        """Attention as two MatMul and a Softmax; ``mask`` is added to the scores (N, heads, S, T)."""
        width = channels_of(q)
        size = width // heads
        q, k, v = (self.Reshape(each, [0, 0, heads, size]) for each in self.same_type(q, k, v))
        scale = self.constant(f"attention_scale_{size}", np.array(size**-0.5, np.float32), q.dtype)
        q, k = self.Mul(self.Transpose(q, perm=[0, 2, 1, 3]), scale), self.Transpose(k, perm=[0, 2, 3, 1])
        scores = self.MatMul(q, k)
        weights = self.Softmax(scores if mask is None else self.Add(scores, mask), axis=-1)
        attended = self.MatMul(weights, self.Transpose(v, perm=[0, 2, 1, 3]))  # (N, heads, S, d)
        return self.Reshape(self.Transpose(attended, perm=[0, 2, 1, 3]), [0, 0, width])

    def use_causal_mask(self, length: int) -> None:
        """Prepare for `causal_attention` over sequences of ``length`` tokens."""
        lowest = np.full((1, 1, length, length), np.finfo(np.float32).min, np.float32)
        self._causal_mask = self.constant("causal_bias", np.triu(lowest, k=1)), length

    def causal_attention(self, q: ir.Value, k: ir.Value, v: ir.Value, heads: int) -> ir.Value:
        """Attention over (N, S, heads * d) in which no token sees a later one, after `use_causal_mask`.

        DirectML takes the bias at its full size (N, heads, S, S) alone.
        """
        if self._causal_mask is None:
            raise TypeError("causal_attention requires use_causal_mask before it")
        mask, length = self._causal_mask
        bias = self.Expand(mask, self.Concat(self.Shape(q, end=1), [heads, length, length], axis=0))
        bias.shape = ir.Shape([None, heads, length, length])
        return self._contrib("MultiHeadAttention", q, k, v, None, None, bias, num_heads=heads)

    def group_norm(
        self, x: ir.Value, weight: Parameter, bias: Parameter, *, groups: int, eps: float, silu: bool = False
    ) -> ir.Value:
        """Group normalization (arXiv:1803.08494), and SiLU after it if ``silu``: weight and bias (C,).

        Of a tile, with the statistics of the whole image.
        """
        normalize = self._instance_norm if self._image_stats is None else self._normalize_groups
        y = normalize(x, weight, bias, groups=groups, eps=eps)
        return self.silu(y) if silu else y

    def _instance_norm(self, x: ir.Value, weight: Parameter, bias: Parameter, *, groups: int, eps: float) -> ir.Value:
        """Instance normalization over (N, groups, C / groups * H * W), then the affine map per channel."""
        dtype = self.dtype_of(weight)
        x = self.cast(x, dtype)
        grouped = self.Reshape(x, [0, groups, -1])
        ones = self.constant(f"ones_{groups}", np.ones(groups, np.float32), dtype)
        zeros = self.constant(f"zeros_{groups}", np.zeros(groups, np.float32), dtype)
        normed = self.InstanceNormalization(grouped, ones, zeros, epsilon=eps)
        normed = self.Reshape(normed, self.Shape(x))
        scaled = self.Mul(normed, self._per_channel(self.norm_parameter(weight)))
        return self.Add(scaled, self._per_channel(self.norm_parameter(bias)))

    def norm_parameter(self, vector: Parameter) -> ir.Value:
        """A group norm's weight or bias, in the type that all variants of a component store it in."""
        return self.parameter(vector)

    def _normalize_groups(
        self, x: ir.Value, weight: Parameter, bias: Parameter, *, groups: int, eps: float
    ) -> ir.Value:
        """Group normalization from each group's mean and mean square, in float32."""
        dtype, x = self.dtype_of(weight), self.cast(x, FLOAT)
        scale, shift = (self.cast(self.norm_parameter(each), FLOAT) for each in (weight, bias))
        mean, square = (self._global_stat(each, groups) for each in self._group_stats(x, groups))
        variance = self.Relu(self.Sub(square, self.Mul(mean, mean)))  # rounding may leave less than 0
        deviation = self.Sqrt(self.Add(variance, self.constant(f"eps_{eps:g}", np.array(eps, np.float32))))
        scale = self.Div(self.Reshape(scale, [1, groups, -1]), deviation)  # (N, G, C / G)
        shift = self.Sub(self.Reshape(shift, [1, groups, -1]), self.Mul(mean, scale))
        scale, shift = (self.Reshape(each, self._per_channel_shape(sizes(weight)[0])) for each in (scale, shift))
        return self.cast(self.Add(self.Mul(x, scale), shift), dtype)

    def _group_stats(self, x: ir.Value, groups: int) -> tuple[ir.Value, ir.Value]:
        """Mean and mean square of each group, (N, G, 1)."""
        grouped = self.Reshape(x, [0, groups, -1])
        count = self.Cast(self.Shape(grouped, start=2), to=FLOAT)
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
        dtype = self.dtype_of(weight)
        affine = self.parameter(weight, dtype), self.parameter(bias, dtype)
        return self.LayerNormalization(self.cast(x, dtype), *affine, axis=-1, epsilon=eps)

    def silu(self, x: ir.Value) -> ir.Value:
        """``x * sigmoid(x)``, as one node."""
        return self._contrib("QuickGelu", x, alpha=1.0)

    def quick_gelu(self, x: ir.Value) -> ir.Value:
        """``x * sigmoid(1.702 x)``, the activation of OpenAI's CLIP."""
        return self._contrib("QuickGelu", x, alpha=1.702)

    def gelu(self, x: ir.Value) -> ir.Value:
        """``x * Phi(x)``, exact (arXiv:1606.08415)."""
        return self._contrib("Gelu", x)  # of which DirectML has a kernel, unlike ai.onnx' own

    def prelu(self, x: ir.Value, slopes: Parameter) -> ir.Value:
        """A feature map with what is below 0 multiplied by its channel's slope (C,), arXiv:1502.01852."""
        return self.PRelu(x, self._per_channel(self.parameter(slopes)))

    def geglu(self, x: ir.Value, weight: Parameter, bias: Parameter | None) -> ir.Value:
        """``a * gelu(b)`` of the two halves of ``x @ weight + bias`` (arXiv:2002.05202)."""
        hidden, gate = self.Split(self.linear(x, weight, bias), axis=-1, num_outputs=2, _outputs=2)
        return self.Mul(hidden, self.gelu(gate))

    def to_sequence(self, x: ir.Value, channels: int) -> ir.Value:
        """(N, C, H, W) to (N, H * W, C)."""
        return self.Reshape(self.Transpose(x, perm=[0, 2, 3, 1]), [0, -1, channels])

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
        """Convert an input of the graph, float32 (N, C, H, W), to the type and layout of feature maps."""
        return self.cast(x, self.dtype)

    def to_output(self, x: ir.Value) -> ir.Value:
        """Convert an output of the graph to float32 (N, C, H, W)."""
        return self.cast(x, FLOAT)

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

    def _per_channel(self, vector: ir.Value) -> ir.Value:
        """(C,) to (C, 1, 1), which broadcasts over feature maps; folded into the weight when a session loads."""
        return self.Unsqueeze(vector, [1, 2])


class UnidirectionalAttention(Operators):
    """`Operators` whose MultiHeadAttention masks later tokens by itself."""

    def use_causal_mask(self, length: int) -> None:
        """Prepare nothing: `causal_attention` needs no mask."""

    def causal_attention(self, q: ir.Value, k: ir.Value, v: ir.Value, heads: int) -> ir.Value:
        """Attention over (N, S, heads * d) in which no token sees a later one."""
        q, k, v = self.same_type(q, k, v)
        return self._contrib("MultiHeadAttention", q, k, v, num_heads=heads, unidirectional=1)


def channels_of(x: ir.Value) -> int:
    """Return the size of the last axis of a sequence."""
    channels = x.shape[-1] if x.shape is not None else None
    if not isinstance(channels, int):
        raise TypeError(f"{x.name} has shape {x.shape}; expected a known number of channels")
    return channels
