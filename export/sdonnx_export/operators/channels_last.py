"""Operators whose feature maps are channels-last inside the graph."""

from dataclasses import replace

import onnx_ir as ir
from onnxscript.nn import Parameter

from sdonnx_export.operators.base import ConvSpec, Operators
from sdonnx_export.operators.stored import FLOAT


class ChannelsLast(Operators):
    """`Operators` whose feature maps are (N, H, W, C)."""

    def conv(self, x: ir.Value, spec: ConvSpec) -> ir.Value:
        """2-D convolution of (N, H, W, C), as one of (N, C, H, W)."""
        x = self.Transpose(self._conv_input(x, spec), perm=[0, 3, 1, 2])
        return self.Transpose(super().conv(x, replace(spec, upsample=False)), perm=[0, 2, 3, 1])

    def _instance_norm(self, x: ir.Value, weight: Parameter, bias: Parameter, *, groups: int, eps: float) -> ir.Value:
        """Group normalization (arXiv:1803.08494) of (N, H, W, C), from each channel's mean and mean square."""
        return self._normalize_groups(x, weight, bias, groups=groups, eps=eps)

    def _group_stats(self, x: ir.Value, groups: int) -> tuple[ir.Value, ir.Value]:
        """Mean and mean square of each group, (N, G, 1)."""
        sums = self.ReduceSum(x, [2], keepdims=0), self.ReduceSumSquare(x, [2], keepdims=0)  # of each row: in parallel
        width = self.Cast(self.Shape(x, start=2, end=3), to=FLOAT)
        means, squares = (self.ReduceMean(self.Div(each, width), [1]) for each in sums)  # (N, 1, C)
        mean, square = (
            self.ReduceMean(self.Reshape(each, [0, groups, -1]), [2], keepdims=1) for each in (means, squares)
        )
        return mean, square

    def _per_channel_shape(self, channels: int) -> list[int]:
        """The shape of one value per channel of a feature map."""
        return [0, 1, 1, channels]

    def _per_channel(self, vector: ir.Value) -> ir.Value:
        """(C,), which broadcasts over feature maps."""
        return vector

    def _spatial_shape(self, x: ir.Value) -> ir.Value:
        """Height and width."""
        return self.Shape(x, start=1, end=3)

    def from_input(self, x: ir.Value) -> ir.Value:
        """Float32 (N, C, H, W) to (N, H, W, C)."""
        return self.Transpose(self.cast(x, self.dtype), perm=[0, 2, 3, 1])

    def to_output(self, x: ir.Value) -> ir.Value:
        """(N, H, W, C) to float32 (N, C, H, W)."""
        return self.cast(self.Transpose(x, perm=[0, 3, 1, 2]), FLOAT)

    def concat_channels(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Concatenate the channels of two feature maps."""
        return self.Concat(x, y, axis=-1)

    def add_per_channel(self, x: ir.Value, vector: ir.Value) -> ir.Value:
        """Add ``vector`` (N, C) to every pixel of a feature map."""
        return self.Add(x, self.Unsqueeze(vector, [1, 2]))

    def to_sequence(self, x: ir.Value, channels: int) -> ir.Value:
        """(N, H, W, C) to (N, H * W, C)."""
        return self.Reshape(x, [0, -1, channels])

    def to_feature_map(self, x: ir.Value, like: ir.Value) -> ir.Value:
        """(N, H * W, C) to (N, H, W, C), with the shape of ``like``."""
        return self.Reshape(x, self.Shape(like))

    def upsample(self, x: ir.Value, like: ir.Value | None = None) -> ir.Value:
        """Nearest-neighbour upsampling of (N, H, W, C), by 2 or to the height and width of ``like``."""
        options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        if like is None:
            return self.Resize(x, None, [1.0, 2.0, 2.0, 1.0], **options)
        size = self.Concat(self.Shape(x, end=1), self.Shape(like, start=1, end=3), self.Shape(x, start=3), axis=0)
        return self.Resize(x, None, None, size, **options)
