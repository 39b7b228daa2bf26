"""Upscalers: RRDBNet (ESRGAN, Real-ESRGAN) and SRVGGNetCompact, as BasicSR names their weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

import onnx_ir as ir
from onnxscript.nn import Module, ModuleList, Parameter

from sdonnx_export.models.config_reader import ConfigReader
from sdonnx_export.models.layers import Conv2d, pixel_unshuffle
from sdonnx_export.operators.base import Operators

_CHANNELS = 3
"""Of the image: red, green and blue."""

_SCALES = (1, 2, 3, 4, 8)


@dataclass(frozen=True, kw_only=True)
class RRDBNetConfig:
    """An RRDBNet (arXiv:1809.00219, arXiv:2107.10833)."""

    num_feat: int
    """Channels between the blocks."""
    num_block: int
    num_grow_ch: int
    """Channels that each convolution of a dense block adds."""
    scale: int
    multiple: int
    """Squares of so many pixels become channels of the first convolution; 1 leaves the image as it is."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "RRDBNetConfig":
        """Parse the config.json of the component; raises ExportError."""
        read = ConfigReader("upscaler", config)
        read.ignore("receptive_field")
        parsed = cls(
            num_feat=read.integer("num_feat", 64),
            num_block=read.integer("num_block", 23),
            num_grow_ch=read.integer("num_grow_ch", 32),
            scale=read.one_of("scale", _SCALES),
            multiple=read.one_of("multiple", (1, 2, 4), 1),
        )
        if parsed.scale * parsed.multiple not in (1, 2, 4, 8):
            raise read.invalid("scale", parsed.scale, "a power of 2, of which the network makes 8 at most")
        read.finish()
        return parsed

    @property
    def upsamples(self) -> int:
        """How often the network doubles the size."""
        return int(log2(self.scale * self.multiple))

    @property
    def receptive_field(self) -> int:
        """Pixels of the image to each side that a pixel of the result depends on; `_RRDB` has 15 convolutions."""
        last = sum(0.5**level for level in range(1, self.upsamples + 1)) + 2 * 0.5**self.upsamples
        return self.multiple * ceil(2 + 15 * self.num_block + last)


@dataclass(frozen=True, kw_only=True)
class SRVGGNetConfig:
    """An SRVGGNetCompact (arXiv:2107.10833)."""

    num_feat: int
    num_conv: int
    """Convolutions between the first and the last."""
    scale: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "SRVGGNetConfig":
        """Parse the config.json of the component; raises ExportError."""
        read = ConfigReader("upscaler", config)
        read.require_value("act_type", "prelu")
        read.require_value("multiple", 1)
        read.ignore("receptive_field")
        parsed = cls(
            num_feat=read.integer("num_feat", 64),
            num_conv=read.integer("num_conv", 16),
            scale=read.one_of("scale", _SCALES),
        )
        read.finish()
        return parsed

    @property
    def receptive_field(self) -> int:
        """Pixels of the image to each side that a pixel of the result depends on."""
        return self.num_conv + 2


class RRDBNet(Module):
    """Images (N, 3, H, W) in 0..1 to (N, 3, scale * H, scale * W); H and W are multiples of ``multiple``."""

    def __init__(self, config: RRDBNetConfig) -> None:
        super().__init__("")
        width = config.num_feat
        self.conv_first = Conv2d(_CHANNELS * config.multiple**2, width)
        self.body = ModuleList([_RRDB(width, config.num_grow_ch) for _ in range(config.num_block)])
        self.conv_body = Conv2d(width, width)
        for index in range(1, config.upsamples + 1):
            setattr(self, f"conv_up{index}", Conv2d(width, width))
        self.conv_hr = Conv2d(width, width)
        self.conv_last = Conv2d(width, _CHANNELS)
        self._config = config

    def forward(self, op: Operators, image: ir.Value) -> ir.Value:
        op.begin_stage("conv_first")
        if self._config.multiple > 1:
            image = pixel_unshuffle(op, image, _CHANNELS, self._config.multiple)
        first = x = self.conv_first(op, op.from_input(image))
        for index, block in enumerate(self.body):
            op.begin_stage(f"body.{index}")
            x = block(op, x)
        op.begin_stage("conv_last")
        x = op.Add(first, self.conv_body(op, x))
        for index in range(1, self._config.upsamples + 1):
            x = _leaky_relu(op, getattr(self, f"conv_up{index}")(op, x, upsample=True))
        return op.to_output(self.conv_last(op, _leaky_relu(op, self.conv_hr(op, x))))


class _RRDB(Module):
    """Three dense blocks with a residual connection."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.rdb1 = _DenseBlock(width, growth)
        self.rdb2 = _DenseBlock(width, growth)
        self.rdb3 = _DenseBlock(width, growth)

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        y = self.rdb3(op, self.rdb2(op, self.rdb1(op, x)))
        return op.Add(op.Mul(y, 0.2), x)


class _DenseBlock(Module):
    """Five convolutions, each of all that came before it, with a residual connection."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        for index in range(4):
            setattr(self, f"conv{index + 1}", Conv2d(width + index * growth, growth))
        self.conv5 = Conv2d(width + 4 * growth, width)

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        features = x
        for index in range(1, 5):
            features = op.concat_channels(features, _leaky_relu(op, getattr(self, f"conv{index}")(op, features)))
        return op.Add(op.Mul(self.conv5(op, features), 0.2), x)


def _leaky_relu(op: Operators, x: ir.Value) -> ir.Value:
    return op.LeakyRelu(x, alpha=0.2)


class SRVGGNet(Module):
    """Images (N, 3, H, W) in 0..1 to (N, 3, scale * H, scale * W): what is added to the enlarged pixels."""

    def __init__(self, config: SRVGGNetConfig) -> None:
        super().__init__("")
        width, layers = config.num_feat, list[Module]()
        for inputs in (_CHANNELS, *[width] * config.num_conv):
            layers += [Conv2d(inputs, width), _PReLU(width)]
        self.body = ModuleList([*layers, Conv2d(width, _CHANNELS * config.scale**2)])
        self._scale = config.scale

    def forward(self, op: Operators, image: ir.Value) -> ir.Value:
        x = op.from_input(image)
        for layer in self.body:
            x = layer(op, x)
        details = op.DepthToSpace(op.to_output(x), blocksize=self._scale, mode="CRD")
        sizes, how = [1.0, 1.0, *[float(self._scale)] * 2], {"mode": "nearest", "nearest_mode": "floor"}
        enlarged = op.Resize(image, None, sizes, coordinate_transformation_mode="asymmetric", **how)
        return op.Add(details, enlarged)


class _PReLU(Module):
    """``max(x, 0) + weight * min(x, 0)`` with a weight per channel (arXiv:1502.01852)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = Parameter([channels])

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        return op.prelu(x, self.weight)
