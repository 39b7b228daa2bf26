"""A ControlNet (arXiv:2302.05543) as diffusers names its weights: a U-Net's way down, steered by a picture."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.nn import Module, ModuleList

from sdonnx_export.models.configs import ConfigReader, UNetConfig
from sdonnx_export.models.layers import Conv2d
from sdonnx_export.models.unet import UNetDown
from sdonnx_export.operators.base import Operators

SIZES = 6
"""Numbers that SDXL is told of sizes."""

_OWN = (
    "conditioning_channels", "conditioning_embedding_out_channels", "controlnet_conditioning_channel_order",
    "global_pool_conditions",
)  # fmt: skip
"""Keys that a U-Net's config has not."""


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig:
    """A ControlNet."""

    unet: UNetConfig
    """Of the U-Net whose way down it is a copy of."""
    picture_channels: int
    embedding: tuple[int, ...]
    """Channels of the picture's embedding; each but the last is halved in size behind it."""
    reverses: bool
    """Whether it wants the picture's channels in the order blue, green, red."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ControlNetConfig":
        """Parse a diffusers ControlNetModel config.json; raises ExportError."""
        read = ConfigReader("controlnet", config)
        read.fixed("_class_name", "ControlNetModel")
        read.fixed("global_pool_conditions", False)
        down = read.value("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
        if not isinstance(down, (list, tuple)):
            raise read.refusal("down_block_types", down, "a list of names")
        other = {
            **{key: value for key, value in config.items() if key not in _OWN},
            "_class_name": "UNet2DConditionModel",
            "down_block_types": list(down),
            "up_block_types": [str(name).replace("Down", "Up") for name in down[::-1]],
        }
        return cls(
            unet=UNetConfig.from_dict(other),
            picture_channels=read.integer("conditioning_channels", 3),
            embedding=read.integers("conditioning_embedding_out_channels", default=(16, 32, 96, 256)),
            reverses=read.one_of("controlnet_conditioning_channel_order", ("rgb", "bgr"), "rgb") == "bgr",
        )


class ControlNet(UNetDown):
    """Latents, timestep and text as a U-Net takes them, and a picture (m, 3, H, W) in 0..1, to its skips' residuals.

    H and W are the latents' times 2 to the power of one less than the embedding has channels. ``told`` is SDXL's pooled
    text and sizes. Residuals come out in N rows, or in those of the latents before the first attention to the text.
    """

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.unet)
        unet = config.unet
        widths = [width for width, count in zip(unet.channels, unet.layers, strict=True) for _ in range(count + 1)]
        widths = [unet.channels[0], *widths[:-1]]
        self.controlnet_cond_embedding = _Embedding(config, unet.channels[0])
        self.controlnet_down_blocks = ModuleList([Conv2d(width, width, 1) for width in widths])
        self.controlnet_mid_block = Conv2d(unet.channels[-1], unet.channels[-1], 1)
        self.outputs = (*(f"down_block_res_samples.{index}" for index in range(unet.skips)), "mid_block_res_sample")
        self._reverses = config.reverses

    def forward(
        self,
        op: Operators,
        sample: ir.Value,
        timestep: ir.Value,
        context: ir.Value,
        picture: ir.Value,
        *told: ir.Value,
    ) -> tuple[ir.Value, ...]:
        op.begin_stage("conv_in")
        picture = op.Gather(picture, [2, 1, 0], axis=1) if self._reverses else picture
        temb = self.embed(op, timestep, told)
        embedded = self.controlnet_cond_embedding(op, op.from_input(picture))
        x = op.Add(self.conv_in(op, op.from_input(sample)), embedded)
        skips = self.down(op, x, temb, context)
        middle = self.middle(op, skips[-1], temb, context)
        op.begin_stage("residuals")
        residuals = [layer(op, skip) for layer, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return tuple(op.to_output(each) for each in (*residuals, self.controlnet_mid_block(op, middle)))


class _Embedding(Module):
    """A picture's, of the latents' size."""

    def __init__(self, config: ControlNetConfig, channels: int) -> None:
        super().__init__()
        first, *others = config.embedding
        self.conv_in = Conv2d(config.picture_channels, first)
        blocks: list[Module] = []
        for narrow, wide in zip(config.embedding, others, strict=False):
            blocks += [Conv2d(narrow, narrow), Conv2d(narrow, wide, stride=2)]
        self.blocks = ModuleList(blocks)
        self.conv_out = Conv2d(config.embedding[-1], channels)

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        x = op.silu(self.conv_in(op, x))
        for block in self.blocks:
            x = op.silu(block(op, x))
        return self.conv_out(op, x)
