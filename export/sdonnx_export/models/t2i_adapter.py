"""A T2I-Adapter (arXiv:2302.08453), as diffusers names its weights: a conditioning image to residuals in a U-Net."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import onnx_ir as ir
from onnxscript.nn import Module, ModuleList
from sdonnx_runtime.denoising.control import adapter_levels

from sdonnx_export.models.config_reader import ConfigReader
from sdonnx_export.models.layers import Conv2d, pixel_unshuffle
from sdonnx_export.operators.base import Operators

_TYPES = ("full_adapter", "full_adapter_xl", "light_adapter")


@dataclass(frozen=True, kw_only=True)
class T2IAdapterConfig:
    """A T2I-Adapter."""

    adapter_type: str
    in_channels: int
    levels: tuple[tuple[int, int], ...]
    """Channels of each level's residual, and by how much it is smaller than the image per axis."""
    num_res_blocks: int
    """On each level."""
    downscale_factor: int
    """Image pixels for each pixel of the first level, per axis."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "T2IAdapterConfig":
        """Parse a diffusers T2IAdapter config.json; raises ExportError."""
        read = ConfigReader("adapter", config)
        read.require_value("_class_name", "T2IAdapter")
        kind = read.one_of("adapter_type", _TYPES, "full_adapter")
        channels = read.integers("channels", default=(320, 640, 1280, 1280))
        downscale = read.integer("downscale_factor", 8)
        if kind == "full_adapter_xl" and len(channels) != 4:
            raise read.invalid("channels", channels, "a list of 4, for full_adapter_xl")
        if kind == "light_adapter" and any(width < 4 for width in channels):
            raise read.invalid("channels", channels, "numbers of at least 4, for light_adapter")
        parsed = cls(
            adapter_type=kind,
            in_channels=read.integer("in_channels", 3),
            levels=adapter_levels(kind, channels, downscale),
            num_res_blocks=read.integer("num_res_blocks", 2),
            downscale_factor=downscale,
        )
        read.finish()
        return parsed


class T2IAdapter(Module):
    """An image (N, C, H, W) in 0..1 to a residual for each level; H and W are multiples of the downscale factor."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__("")
        self.adapter = _Body(config)
        self.outputs = tuple(f"down_intrablock_additional_residuals.{index}" for index in range(len(config.levels)))

    def forward(self, op: Operators, image: ir.Value) -> tuple[ir.Value, ...]:
        return tuple(op.to_output(each) for each in self.adapter(op, image))


class _Body(Module):
    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        inputs, light = config.in_channels * config.downscale_factor**2, config.adapter_type == "light_adapter"
        first = config.levels[0][0]
        self.conv_in = None if light else Conv2d(inputs, first)
        widths = [inputs if light else first, *(width for width, _ in config.levels)]
        scales = [config.downscale_factor, *(scale for _, scale in config.levels)]
        downs = [after > before for before, after in pairwise(scales)]
        blocks: list[Module] = [
            _Block(before, after, config.num_res_blocks, down, light=light)
            for (before, after), down in zip(pairwise(widths), downs, strict=True)
        ]
        self.body = ModuleList(blocks)
        self._config = config

    def forward(self, op: Operators, image: ir.Value) -> list[ir.Value]:
        op.begin_stage("adapter")
        x = op.from_input(pixel_unshuffle(op, image, self._config.in_channels, self._config.downscale_factor))
        x = x if self.conv_in is None else self.conv_in(op, x)
        levels = []
        for block in self.body:
            x = block(op, x)
            levels.append(x)
        return levels


class _Block(Module):
    """The residual blocks of one level, at a quarter of the width if ``light``; ``down`` halves the size first."""

    def __init__(self, in_channels: int, out_channels: int, count: int, down: bool, *, light: bool) -> None:
        super().__init__()
        width = out_channels // 4 if light else out_channels
        self.in_conv = Conv2d(in_channels, width, 1) if light or in_channels != out_channels else None
        self.resnets = ModuleList([_Resnet(width, 3 if light else 1) for _ in range(count)])
        self.out_conv = Conv2d(width, out_channels, 1) if light else None
        self._down = down

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        if self._down:
            pooled = op.AveragePool(op.to_output(x), kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
            x = op.from_input(pooled)
        x = x if self.in_conv is None else self.in_conv(op, x)
        for resnet in self.resnets:
            x = resnet(op, x)
        return x if self.out_conv is None else self.out_conv(op, x)


class _Resnet(Module):
    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.block1 = Conv2d(width, width)
        self.block2 = Conv2d(width, width, kernel)

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        return op.Add(self.block2(op, op.Relu(self.block1(op, x))), x)
