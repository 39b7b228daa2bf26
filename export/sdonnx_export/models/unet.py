"""The conditional U-Net of latent diffusion (arXiv:2112.10752), as diffusers names its weights.

The forward pass is a chain of stages, one for each residual block with its attention, whose deeper layers, where it has
several, are stages of their own: `Operators.begin_stage` marks where one ends and the next begins, and what crosses a
border is a named edge.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import onnx_ir as ir
from onnxscript.nn import Module, ModuleList

from sdonnx_export.models.configs import UNetConfig
from sdonnx_export.models.layers import Attention, Conv2d, GroupNorm, LayerNorm, Linear, ResnetBlock
from sdonnx_export.operators.base import Operators


class UNetDown(Module):
    """What a U-Net and a ControlNet have in common: all up to the middle, and what is told beside the picture."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__("")
        channels, temb = config.channels, 4 * config.channels[0]
        self.conv_in = Conv2d(config.in_channels, channels[0])
        self.time_embedding = TimeEmbedding(channels[0], temb, config.guidance_width)
        self.add_embedding = TimeEmbedding(config.added_width, temb) if config.added_width is not None else None
        self.down_blocks = ModuleList([DownBlock(config, level) for level in range(len(channels))])
        self.mid_block = MidBlock(config) if config.mid_block is not None else None
        self._config = config

    def embed(self, op: Operators, timestep: ir.Value, told: Sequence[ir.Value]) -> ir.Value:
        """The embedding (1, T) or (N, T) of the time and of what is ``told`` beside it, through the blocks' SiLU."""
        config = self._config
        guidance = told if self.add_embedding is None else told[2:]
        waves = sinusoids(op, op.Reshape(timestep, [1, 1]), config.channels[0], config)  # (1, C)
        temb = self.time_embedding(op, waves, *guidance)
        if self.add_embedding is not None:
            pooled, sizes = told[:2]
            waves = sinusoids(op, op.Unsqueeze(sizes, [-1]), config.id_width, config)  # (N, I, id_width)
            temb = op.Add(temb, self.add_embedding(op, op.Concat(pooled, op.Reshape(waves, [0, -1]), axis=-1)))
        return op.silu(temb)

    def down(
        self, op: Operators, x: ir.Value, temb: ir.Value, context: ir.Value, inside: Sequence[ir.Value] = ()
    ) -> list[ir.Value]:
        """The skip connections, of which the last goes on; ``inside`` is what is added at the end of each level."""
        x = x if self._config.shares_rows else op.match_rows(x, context, rank=4)
        skips = [x]
        for level, block in enumerate(cast("Iterable[DownBlock]", self.down_blocks)):
            for layer in block.layers():
                op.begin_stage(f"{block.name}.{layer}")
                x = block(op, layer, x, temb, context)
                x = op.add_residual(x, inside[level]) if inside and layer == block.adapted_layer else x
                skips.append(x)
        return skips

    def middle(self, op: Operators, x: ir.Value, temb: ir.Value, context: ir.Value) -> ir.Value:
        """What the mid block gives, where there is one."""
        if self.mid_block is None:
            return x
        op.begin_stage("mid_block")
        return self.mid_block(op, x, temb, context)


class UNet(UNetDown):
    """Latents (n, 4, h, w), timestep () and text (N, S, C) to the model's prediction (N, 4, h, w).

    N is a multiple of n: where rows differ in their text alone, as in classifier-free guidance, all that comes before
    the first cross-attention is computed for one of them. ``more`` are SDXL's pooled text (N, P) and sizes (N, I), with
    which rows differ from the first block on; the embedded guidance scale (N, G) of a model that takes one; and, where
    it is controlled, residuals by the names of `residual_names`.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        channels, top = config.channels, len(config.channels) - 1
        self.up_blocks = ModuleList([UpBlock(config, level) for level in range(top, -1, -1)])
        self.conv_norm_out = GroupNorm(config.groups, channels[0], config.eps)
        self.conv_out = Conv2d(channels[0], config.out_channels)

    def forward(
        self,
        op: Operators,
        sample: ir.Value,
        timestep: ir.Value,
        context: ir.Value,
        *more: ir.Value,
    ) -> ir.Value:
        count = len(residual_names(self._config))
        told, residuals = more[: len(more) - count], more[len(more) - count :]
        beside, inside = residuals[: self._config.skips + 1], residuals[self._config.skips + 1 :]
        op.begin_stage("conv_in")
        temb = self.embed(op, timestep, told)
        skips = self.down(op, self.conv_in(op, op.from_input(sample)), temb, context, inside)
        x = self.middle(op, skips[-1], temb, context)
        if residuals:
            *added, last = beside
            skips = [op.add_residual(skip, residual) for skip, residual in zip(skips, added, strict=True)]
            x = op.add_residual(op.add_residual(x, inside[-1]), last)
        x = self._up(op, x, skips, temb, context)
        op.begin_stage("conv_out")
        return op.to_output(self.conv_out(op, op.silu(self.conv_norm_out(op, x))))

    def _up(self, op: Operators, x: ir.Value, skips: list[ir.Value], temb: ir.Value, context: ir.Value) -> ir.Value:
        shared = self._config.skips_before_text(len(skips))
        for block in cast("Iterable[UpBlock]", self.up_blocks):
            for layer in block.layers():
                op.begin_stage(f"{block.name}.{layer}")
                skip = skips[-1]
                if layer != "upsamplers":
                    skips.pop()
                    skip = skip if len(skips) >= shared else op.match_rows(skip, context, rank=4)
                x = block(op, layer, x, skip, temb, context)
        return x


def residual_names(config: UNetConfig) -> list[str]:
    """The inputs through which a U-Net is controlled, as diffusers calls them; none if it is not.

    What is added to each skip connection and behind the middle (ControlNet, arXiv:2302.05543), and what is added
    inside, at the end of each level and of the middle (T2I-Adapter, arXiv:2302.08453).
    """
    if not config.controlled:
        return []
    return [
        *(f"down_block_additional_residuals.{index}" for index in range(config.skips)),
        "mid_block_additional_residual",
        *(f"down_intrablock_additional_residuals.{index}" for index in range(len(config.channels) + 1)),
    ]


def cache_stage(config: UNetConfig) -> str:
    """The stage whose output step reuse keeps: all but the last on the way up is skipped, branch 0 of arXiv:2312.00858.

    In Stable Diffusion 1.5 that leaves 8 % of a step. A second residual block outside would make it 22 %, and brings
    pictogram 0.5 dB at most.
    """
    attends, layers = config.up_attention[-1], config.up_transformers[-1][-2]
    return _deeper(f"up_blocks.{len(config.channels) - 1}.{config.layers[0] - 1}", layers - 1 if attends else 0)


def sinusoids(op: Operators, numbers: ir.Value, width: int, config: UNetConfig) -> ir.Value:
    """The sinusoidal embedding (..., width) of ``numbers`` (..., 1), arXiv:2006.11239 section B after 1706.03762."""
    half = width // 2
    exponents = -np.log(10000.0) * np.arange(half, dtype=np.float32) / (half - config.frequency_shift)
    angles = op.Mul(numbers, op.constant(f"frequencies_{width}", np.exp(exponents).astype(np.float32)))
    waves = [op.Sin(angles), op.Cos(angles)]
    return op.Concat(*(waves[::-1] if config.cosine_first else waves), axis=-1)


class TimeEmbedding(Module):
    """Two linear layers with SiLU between them; ``guided`` is the width of what may be added to their input."""

    def __init__(self, channels: int, width: int, guided: int | None = None) -> None:
        super().__init__()
        self.cond_proj = Linear(guided, channels, bias=False) if guided is not None else None
        self.linear_1 = Linear(channels, width)
        self.linear_2 = Linear(width, width)

    def forward(self, op: Operators, x: ir.Value, guidance: ir.Value | None = None) -> ir.Value:
        if self.cond_proj is not None:
            x = op.Add(x, self.cond_proj(op, guidance))
        return self.linear_2(op, op.silu(self.linear_1(op, x)))


class _Level(Module):
    """A resolution's residual blocks, attentions and the sampler after them, each of which is a stage."""

    def __init__(self, resnets: list[Module], attentions: list[Module]) -> None:
        super().__init__()
        self.resnets = ModuleList(resnets)
        if attentions:
            self.attentions = ModuleList(attentions)
        self._count, self._attends = len(resnets), bool(attentions)

    def _block(self, op: Operators, index: int, x: ir.Value, temb: ir.Value, context: ir.Value) -> ir.Value:
        x = self.resnets[index](op, x, temb)
        return self.attentions[index](op, x, context) if self._attends else x


class DownBlock(_Level):
    """One resolution of the down path; its last stage halves the size, but for the lowest."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        width = config.channels[level]
        inputs = [config.channels[max(level - 1, 0)], *[width] * (config.layers[level] - 1)]
        first = config.shares_rows and level == config.first_attention
        attentions: list[Module] = [
            Transformer(config, level, count, first=first and index == 0)
            for index, count in enumerate(config.down_transformers[level])
        ]
        super().__init__(
            [_resnet(config, channels, width) for channels in inputs],
            attentions if config.down_attention[level] else [],
        )
        self._downsamples = level < len(config.channels) - 1
        self.adapted_layer = self._count - 1 if self._attends else self.layers()[-1]
        """Behind which diffusers adds what a T2I-Adapter gives."""
        if self._downsamples:
            self.downsamplers = ModuleList([Downsample(width, config.downsample_padding)])

    def layers(self) -> list[int | str]:
        """The stages, by index or name."""
        return [*range(self._count), *(["downsamplers"] if self._downsamples else [])]

    def forward(self, op: Operators, layer: int | str, x: ir.Value, temb: ir.Value, context: ir.Value) -> ir.Value:
        if layer == "downsamplers":
            return self.downsamplers[0](op, x)
        return self._block(op, int(layer), x, temb, context)


class UpBlock(_Level):
    """One resolution of the up path; its last stage doubles the size, but for the highest."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        width, lowest = config.channels[level], len(config.channels) - 1
        count = config.layers[level] + 1
        above = config.channels[max(level - 1, 0)]
        skips = [width] * (count - 1) + [above]
        inputs = [config.channels[min(level + 1, lowest)], *[width] * (count - 1)]
        attends = config.up_attention[lowest - level]
        super().__init__(
            [_resnet(config, a + b, width) for a, b in zip(inputs, skips, strict=True)],
            [Transformer(config, level, count) for count in config.up_transformers[lowest - level]] if attends else [],
        )
        self._upsamples = level > 0
        if self._upsamples:
            self.upsamplers = ModuleList([Upsample(width)])

    def layers(self) -> list[int | str]:
        """The stages, by index or name."""
        return [*range(self._count), *(["upsamplers"] if self._upsamples else [])]

    def forward(
        self, op: Operators, layer: int | str, x: ir.Value, skip: ir.Value, temb: ir.Value, context: ir.Value
    ) -> ir.Value:
        if layer == "upsamplers":
            return self.upsamplers[0](op, x, skip)
        return self._block(op, int(layer), op.join(x, skip), temb, context)


class MidBlock(_Level):
    """At the lowest resolution residual block with attention, and residual block, two stages; or one residual block."""

    def __init__(self, config: UNetConfig) -> None:
        level, width, attends = len(config.channels) - 1, config.channels[-1], config.attends_in_the_middle
        first = config.shares_rows and config.first_attention is None
        super().__init__(
            [_resnet(config, width, width) for _ in range(2 if attends else 1)],
            [Transformer(config, level, config.mid_transformer, first=first)] if attends else [],
        )

    def forward(self, op: Operators, x: ir.Value, temb: ir.Value, context: ir.Value) -> ir.Value:
        x = self._block(op, 0, x, temb, context)
        if not self._attends:
            return x
        op.begin_stage("mid_block.resnets.1")
        return self.resnets[1](op, x, temb)


def _resnet(config: UNetConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    temb = 4 * config.channels[0]
    return ResnetBlock(in_channels, out_channels, groups=config.groups, eps=config.eps, temb=temb)


class Downsample(Module):
    """A convolution of stride 2; without padding, a row and a column of zeros go below and to the right."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        pads = [padding] * 4 if padding > 0 else [0, 0, 1, 1]
        self.conv = Conv2d(channels, channels, stride=2, pads=pads)

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        return self.conv(op, x)


class Upsample(Module):
    """Nearest-neighbour upsampling, by 2 or to the size of the next skip connection, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels)

    def forward(self, op: Operators, x: ir.Value, like: ir.Value | None = None) -> ir.Value:
        return self.conv(op, x, enlarged=True, like=like)


class Transformer(Module):
    """Transformer blocks over a picture's positions, with a residual connection around all.

    The ``first`` in a U-Net gives as many rows as the text has.
    """

    def __init__(self, config: UNetConfig, level: int, layers: int, *, first: bool = False) -> None:
        super().__init__()
        width = config.channels[level]
        self.norm = GroupNorm(config.groups, width, 1e-6)
        project = Linear if config.linear_projection else _pointwise
        self.proj_in = project(width, width)
        blocks: list[Module] = [TransformerBlock(config, level, first=first and index == 0) for index in range(layers)]
        self.transformer_blocks = ModuleList(blocks)
        self.proj_out = project(width, width)
        self._width, self._linear, self._first = width, config.linear_projection, first

    def forward(self, op: Operators, x: ir.Value, context: ir.Value) -> ir.Value:
        h = self.norm(op, x)
        if self._linear:
            h = self.proj_in(op, op.to_sequence(h, self._width))
        else:
            h = op.to_sequence(self.proj_in(op, h), self._width)
        stage = op.stage
        for index, block in enumerate(self.transformer_blocks):
            op.begin_stage(_deeper(stage, index))
            h = block(op, h, context, x)
        x = op.match_rows(x, context, rank=4) if self._first else x
        if self._linear:
            h = op.to_picture(self.proj_out(op, h), x)
        else:
            h = self.proj_out(op, op.to_picture(h, x))
        return op.Add(h, x)


def _deeper(stage: str, layer: int) -> str:
    """What the stage of a residual block is called from its attention's layer ``layer`` on: a few are gigabytes."""
    return stage if layer == 0 else f"{stage}.transformer_blocks.{layer}"


def _pointwise(in_channels: int, out_channels: int) -> Conv2d:
    return Conv2d(in_channels, out_channels, 1)


class TransformerBlock(Module):
    """Self-attention, cross-attention to the text, feed-forward; each after a norm and added to its input.

    With token downsampling (ToDo, arXiv:2402.13573) keys and values of the self-attention come from every other row
    and column of the picture.
    """

    def __init__(self, config: UNetConfig, level: int, *, first: bool) -> None:
        super().__init__()
        width, heads, context = config.channels[level], config.heads[level], config.context_width
        self._first, self._width, self._downsampled = first, width, level == config.downsampled_level
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, heads, context=context)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, op: Operators, x: ir.Value, context: ir.Value, picture: ir.Value) -> ir.Value:
        """``x`` (n, H * W, C), whose height and width are those of ``picture``."""
        normed = self.norm1(op, x)
        source = op.every_other(normed, picture, self._width) if self._downsampled else None
        x = op.Add(self.attn1(op, normed, source), x)
        x = op.match_rows(x, context, rank=3) if self._first else x
        x = op.Add(self.attn2(op, self.norm2(op, x), context), x)
        return op.Add(self.ff(op, self.norm3(op, x)), x)


class FeedForward(Module):
    """A gated linear unit of four times the width; the checkpoint's list has a dropout between its layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = ModuleList([GatedLinear(width, 4 * width), Module(), Linear(4 * width, width)])

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        return self.net[2](op, self.net[0](op, x))


class GatedLinear(Module):
    """GEGLU (arXiv:2002.05202)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = GegluLinear(width, 2 * inner)

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        return self.proj(op, x)


class GegluLinear(Linear):
    """A linear layer whose one half of outputs gates the other."""

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        return op.geglu(x, self.weight, self.bias)
