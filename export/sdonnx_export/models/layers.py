"""Layers that several components use; parameter names are the checkpoint's keys."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript.nn import Module, ModuleList, Parameter

from sdonnx_export.operators.base import ConvSpec, Operators
from sdonnx_export.operators.layouts import TransposedWeight


class Linear(Module):
    """``y = x W + b`` over the last axis."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = TransposedWeight([in_features, out_features])
        self.bias = Parameter([out_features]) if bias else None

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        return op.linear(x, self.weight, self.bias)


class Conv2d(Module):
    """A square convolution; the default ``pads`` keep the size at stride 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        pads: Sequence[int] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.weight = Parameter([out_channels, in_channels, kernel, kernel])
        self.bias = Parameter([out_channels]) if bias else None
        self._stride = stride
        self._pads = pads if pads is not None else [kernel // 2] * 4

    def forward(self, op: Operators, x: ir.Value, *, upsample: bool = False, like: ir.Value | None = None) -> ir.Value:
        """Convolve ``x``, with ``upsample`` after upsampling it by 2 or to the size of ``like``."""
        geometry: dict[str, Any] = {"stride": self._stride, "pads": self._pads, "upsample": upsample, "like": like}
        return op.conv(x, ConvSpec(weight=self.weight, bias=self.bias, **geometry))


class GroupNorm(Module):
    """Group normalization with an affine map per channel."""

    def __init__(self, groups: int, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = Parameter([channels])
        self.bias = Parameter([channels])
        self._groups, self._eps = groups, eps

    def forward(self, op: Operators, x: ir.Value, *, silu: bool = False) -> ir.Value:
        """Normalize ``x``, with ``silu`` followed by SiLU."""
        return op.group_norm(x, self.weight, self.bias, groups=self._groups, eps=self._eps, silu=silu)


class LayerNorm(Module):
    """Layer normalization over the last axis."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = Parameter([channels])
        self.bias = Parameter([channels])
        self._eps = eps

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        return op.layer_norm(x, self.weight, self.bias, eps=self._eps)


class ResnetBlock(Module):
    """Two convolutions, each after norm and SiLU, with the timestep embedding between them and a shortcut."""

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, eps: float, temb: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels)
        self.time_emb_proj = Linear(temb, out_channels) if temb is not None else None
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels)
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, op: Operators, x: ir.Value, temb: ir.Value | None = None) -> ir.Value:
        """Apply it to ``x`` (N, C, H, W); the caller has applied SiLU to ``temb`` (N, T), once for all blocks."""
        h = self.conv1(op, self.norm1(op, x, silu=True))
        if self.time_emb_proj is not None:
            h = op.add_per_channel(h, self.time_emb_proj(op, temb))
        h = self.conv2(op, self.norm2(op, h, silu=True))
        return op.Add(h, x if self.conv_shortcut is None else self.conv_shortcut(op, x))


class Attention(Module):
    """Multi-head attention; keys and values come from ``context``, if any, else from ``x``."""

    def __init__(
        self, channels: int, heads: int, *, context: int | None = None, bias: bool = False, upcast: bool = False
    ) -> None:
        super().__init__()
        self.to_q = Linear(channels, channels, bias=bias)
        self.to_k = Linear(context if context is not None else channels, channels, bias=bias)
        self.to_v = Linear(context if context is not None else channels, channels, bias=bias)
        self.to_out = ModuleList([Linear(channels, channels)])
        self._heads, self._upcast = heads, upcast

    def forward(self, op: Operators, x: ir.Value, context: ir.Value | None = None) -> ir.Value:
        source = x if context is None else context
        q, k, v = self.to_q(op, x), self.to_k(op, source), self.to_v(op, source)
        return self.to_out[0](op, self.attend(op, q, k, v))

    def attend(self, op: Operators, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """Attend with queries (N, S, C) to keys and values (N, T, C)."""
        return op.attention(q, k, v, self._heads, upcast=self._upcast)


class Downsample(Module):
    """A convolution of stride 2; padding 0 adds a row of zeros below and a column on the right."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        pads = [padding] * 4 if padding > 0 else [0, 0, 1, 1]
        self.conv = Conv2d(channels, channels, stride=2, pads=pads)

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        return self.conv(op, x)


def pixel_unshuffle(op: Operators, image: ir.Value, channels: int, factor: int) -> ir.Value:
    """Turn squares of pixels into channels in torch's order: all of the first channel, then of the second."""
    rows, columns = (op.Div(op.Shape(image, start=axis, end=axis + 1), factor) for axis in (2, 3))
    squares = op.Reshape(image, op.Concat([0, channels], rows, [factor], columns, [factor], axis=0))
    by_pixel = op.Transpose(squares, perm=[0, 1, 3, 5, 2, 4])
    return op.Reshape(by_pixel, op.Concat([0, channels * factor**2], rows, columns, axis=0))


class Upsample(Module):
    """Nearest-neighbour upsampling, by 2 or to the size of the next skip connection, and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels)

    def forward(self, op: Operators, x: ir.Value, like: ir.Value | None = None) -> ir.Value:
        return self.conv(op, x, upsample=True, like=like)
