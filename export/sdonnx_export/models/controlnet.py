"""A ControlNet (arXiv:2302.05543), as diffusers names its weights: a U-Net's down path with a conditioning image."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import onnx_ir as ir
from onnxscript.nn import Module, ModuleList

from sdonnx_export.models.config_reader import ConfigReader
from sdonnx_export.models.layers import Conv2d
from sdonnx_export.models.unet import UNetDown
from sdonnx_export.models.unet_config import UNetConfig
from sdonnx_export.operators.base import Operators

_OWN = (
    "conditioning_channels", "conditioning_embedding_out_channels", "controlnet_conditioning_channel_order",
    "global_pool_conditions",
)  # fmt: skip
"""Keys that a U-Net's config doesn't have."""


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig:
    """A ControlNet."""

    unet: UNetConfig
    """The U-Net whose down path it copies."""
    conditioning_channels: int
    """Channels of the conditioning image."""
    conditioning_embedding_out_channels: tuple[int, ...]
    """Channels of the image's embedding; each change of them halves the size."""
    is_bgr: bool
    """Whether the image's channels are in the order blue, green, red."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ControlNetConfig":
        """Parse a diffusers ControlNetModel config.json; raises ExportError."""
        read = ConfigReader("controlnet", config)
        read.require_value("_class_name", "ControlNetModel")
        read.require_value("global_pool_conditions", False)
        down = read.value("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
        if not isinstance(down, (list, tuple)):
            raise read.invalid("down_block_types", down, "a list of names")
        unet = {
            **{key: value for key, value in config.items() if key not in _OWN},
            "_class_name": "UNet2DConditionModel",
            "down_block_types": list(down),
            "up_block_types": [str(name).replace("Down", "Up") for name in down[::-1]],
        }
        heads = unet.pop("num_attention_heads", None)
        unet["attention_head_dim"] = unet.get("attention_head_dim") if heads is None else heads
        return cls(
            unet=UNetConfig.from_dict(unet),
            conditioning_channels=read.integer("conditioning_channels", 3),
            conditioning_embedding_out_channels=read.integers(
                "conditioning_embedding_out_channels", default=(16, 32, 96, 256)
            ),
            is_bgr=read.one_of("controlnet_conditioning_channel_order", ("rgb", "bgr"), "rgb") == "bgr",
        )


class ControlNet(UNetDown):
    """A U-Net's latents, timestep and text, and a conditioning image (m, 3, H, W) in 0..1, to residuals of its skips.

    H and W are the latents' size times 2 ** (len(conditioning_embedding_out_channels) - 1). ``added_cond`` are SDXL's
    text_embeds and time_ids. The batch of a residual is that of the text, or of the latents before the first
    cross-attention.
    """

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.unet)
        unet, channels = config.unet, config.unet.block_out_channels
        widths = [width for width, count in zip(channels, unet.layers_per_block, strict=True) for _ in range(count + 1)]
        widths = [channels[0], *widths[:-1]]
        self.controlnet_cond_embedding = _Embedding(config, channels[0])
        self.controlnet_down_blocks = ModuleList([Conv2d(width, width, 1) for width in widths])
        self.controlnet_mid_block = Conv2d(channels[-1], channels[-1], 1)
        self.outputs = (*(f"down_block_res_samples.{index}" for index in range(unet.num_skips)), "mid_block_res_sample")
        self._is_bgr = config.is_bgr

    def forward(
        self,
        op: Operators,
        sample: ir.Value,
        timestep: ir.Value,
        context: ir.Value,
        image: ir.Value,
        *added_cond: ir.Value,
    ) -> tuple[ir.Value, ...]:
        op.begin_stage("conv_in")
        context = op.cast(context, op.dtype)
        image = op.Gather(image, [2, 1, 0], axis=1) if self._is_bgr else image
        temb = self.embed(op, timestep, added_cond)
        embedded = self.controlnet_cond_embedding(op, op.from_input(image))
        x = op.Add(self.conv_in(op, op.from_input(sample)), embedded)
        skips = self.down(op, x, temb, context)
        mid = self.mid(op, skips[-1], temb, context)
        op.begin_stage("residuals")
        residuals = [layer(op, skip) for layer, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return tuple(op.to_output(each) for each in (*residuals, self.controlnet_mid_block(op, mid)))


class _Embedding(Module):
    """The conditioning image embedded at the size of the latents."""

    def __init__(self, config: ControlNetConfig, channels: int) -> None:
        super().__init__()
        widths = config.conditioning_embedding_out_channels
        self.conv_in = Conv2d(config.conditioning_channels, widths[0])
        blocks: list[Module] = []
        for in_channels, out_channels in pairwise(widths):
            blocks += [Conv2d(in_channels, in_channels), Conv2d(in_channels, out_channels, stride=2)]
        self.blocks = ModuleList(blocks)
        self.conv_out = Conv2d(widths[-1], channels)

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        x = op.silu(self.conv_in(op, x))
        for block in self.blocks:
            x = op.silu(block(op, x))
        return self.conv_out(op, x)
