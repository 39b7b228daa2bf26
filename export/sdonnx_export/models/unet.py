"""The conditional U-Net of latent diffusion (arXiv:2112.10752), as diffusers names its weights.

The forward pass is a chain of stages: each residual block with its attention is one, and each further transformer layer
of an attention is another. `Operators.begin_stage` begins a stage; values that a later stage reads are named edges.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import onnx_ir as ir
from onnxscript.nn import Module, ModuleList

from sdonnx_export.models.layers import Conv2d, Downsample, GroupNorm, Linear, ResnetBlock, Upsample
from sdonnx_export.models.transformer import CrossAttention, Transformer2DModel, TransformerBlock, substage_name
from sdonnx_export.models.unet_config import UNetConfig
from sdonnx_export.operators.base import Operators


class UNetDown(Module):
    """What a U-Net and a ControlNet have in common: the embeddings, the down path and the mid block."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__("")
        channels, added = config.block_out_channels, config.projection_class_embeddings_input_dim
        temb = config.time_embedding_dim
        self.conv_in = Conv2d(config.in_channels, channels[0])
        self.time_embedding = TimestepEmbedding(channels[0], temb, config.time_cond_proj_dim)
        self.add_embedding = TimestepEmbedding(added, temb) if added is not None else None
        self.down_blocks = ModuleList([DownBlock(config, level) for level in range(len(channels))])
        self.mid_block = MidBlock(config) if config.mid_block_type is not None else None
        self._config = config

    def embed(self, op: Operators, timestep: ir.Value, added_cond: Sequence[ir.Value]) -> ir.Value:
        """Embed the timestep and what is added to it, and apply SiLU: (1, T), or (N, T) with ``added_cond``."""
        config = self._config
        guidance = added_cond if self.add_embedding is None else added_cond[2:]
        waves = timestep_embedding(op, op.Reshape(timestep, [1, 1]), config.block_out_channels[0], config)  # (1, C)
        temb = self.time_embedding(op, waves, *guidance)
        if self.add_embedding is not None:
            text_embeds, time_ids = added_cond[:2]
            width = config.addition_time_embed_dim
            waves = timestep_embedding(op, op.Unsqueeze(time_ids, [-1]), width, config)  # (N, I, width)
            temb = op.Add(temb, self.add_embedding(op, op.Concat(text_embeds, op.Reshape(waves, [0, -1]), axis=-1)))
        return op.silu(temb)

    def down(
        self, op: Operators, x: ir.Value, temb: ir.Value, context: ir.Value, residuals: Sequence[ir.Value] = ()
    ) -> list[ir.Value]:
        """Run the down path and return the skip connections; ``residuals`` are added at the end of each level."""
        x = x if self._config.shares_batch_before_text else op.repeat_batch(x, context, rank=4)
        skips = [x]
        for level, block in enumerate(cast("Iterable[DownBlock]", self.down_blocks)):
            for layer in block.layers():
                op.begin_stage(f"{block.name}.{layer}")
                x = block(op, layer, x, temb, context)
                x = op.add_residual(x, residuals[level]) if residuals and layer == block.adapted_layer else x
                skips.append(x)
        return skips

    def mid(self, op: Operators, x: ir.Value, temb: ir.Value, context: ir.Value) -> ir.Value:
        """Run the mid block, if there is one."""
        if self.mid_block is None:
            return x
        op.begin_stage("mid_block")
        return self.mid_block(op, x, temb, context)


class UNet(UNetDown):
    """Latents (n, 4, h, w), timestep () and text (N, S, C) to the model's prediction (N, 4, h, w).

    N is a multiple of n: batch entries that differ only in their text, as in classifier-free guidance, share all
    computation before the first cross-attention. ``more`` are SDXL's text_embeds (N, P) and time_ids (N, I), with which
    nothing is shared; the embedded guidance scale (N, G), if the model has one; and, if ``controlled``, residuals in
    the order of `residual_names`, and IMAGE_KEYS and IMAGE_VALUES.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        channels, top = config.block_out_channels, len(config.block_out_channels) - 1
        self.up_blocks = ModuleList([UpBlock(config, level) for level in range(top, -1, -1)])
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = Conv2d(channels[0], config.out_channels)
        self.image_width = self._number_cross_attentions()
        """Columns of the keys and values of image prompts."""

    def _number_cross_attentions(self) -> int:
        """Give each cross-attention its columns, in the order of an IP-Adapter's layers; returns how many there are."""
        stop = 0
        mid = () if self.mid_block is None else (self.mid_block,)
        for block in cast("Iterable[_UNetBlock]", (*self.down_blocks, *self.up_blocks, *mid)):
            for attention in block.cross_attentions():
                attention.image_columns = slice(stop, stop := stop + attention.channels)
        return stop

    def forward(
        self,
        op: Operators,
        sample: ir.Value,
        timestep: ir.Value,
        context: ir.Value,
        *more: ir.Value,
    ) -> ir.Value:
        op.begin_stage("conv_in")
        context = op.cast(context, op.dtype)
        if self._config.controlled:
            op.image_prompts = op.cast(more[-2], op.dtype), op.cast(more[-1], op.dtype)
            more = more[:-2]
        split = len(more) - len(residual_names(self._config))
        added_cond, residuals = more[:split], more[split:]
        controlnet, adapter = residuals[: self._config.num_skips + 1], residuals[self._config.num_skips + 1 :]
        temb = self.embed(op, timestep, added_cond)
        skips = self.down(op, self.conv_in(op, op.from_input(sample)), temb, context, adapter)
        x = self.mid(op, skips[-1], temb, context)
        if residuals:
            *down, mid = controlnet
            skips = [op.add_residual(skip, residual) for skip, residual in zip(skips, down, strict=True)]
            x = op.add_residual(op.add_residual(x, adapter[-1]), mid)
        x = self._up(op, x, skips, temb, context)
        op.begin_stage("conv_out")
        return op.to_output(self.conv_out(op, self.conv_norm_out(op, x, silu=True)))

    def _up(self, op: Operators, x: ir.Value, skips: list[ir.Value], temb: ir.Value, context: ir.Value) -> ir.Value:
        shared = self._config.num_skips_before_text(len(skips))
        for block in cast("Iterable[UpBlock]", self.up_blocks):
            for layer in block.layers():
                op.begin_stage(f"{block.name}.{layer}")
                skip = skips[-1]
                if layer != "upsamplers":
                    skips.pop()
                    skip = skip if len(skips) >= shared else op.repeat_batch(skip, context, rank=4)
                x = block(op, layer, x, skip, temb, context)
        return x


def residual_names(config: UNetConfig) -> list[str]:
    """Return the names of a U-Net's residual inputs, as diffusers has them; none if it is not ``controlled``.

    A ControlNet (arXiv:2302.05543) adds to each skip connection and to the mid block's output; a T2I-Adapter
    (arXiv:2302.08453) adds at the end of each level and of the mid block.
    """
    if not config.controlled:
        return []
    return [
        *(f"down_block_additional_residuals.{index}" for index in range(config.num_skips)),
        "mid_block_additional_residual",
        *(f"down_intrablock_additional_residuals.{index}" for index in range(len(config.block_out_channels) + 1)),
    ]


def cache_stage(config: UNetConfig) -> str:
    """Return the stage whose output DeepCache keeps, branch 0 of arXiv:2312.00858: only the last up layer runs again.

    In Stable Diffusion 1.5 that leaves 8 % of a step. One more residual block would make it 22 %, for at most 0.5 dB
    on pictogram.
    """
    attends, layers = config.up_attention[-1], config.up_transformer_layers[-1][-2]
    stage = f"up_blocks.{len(config.block_out_channels) - 1}.{config.layers_per_block[0] - 1}"
    return substage_name(stage, layers - 1 if attends else 0)


def timestep_embedding(op: Operators, timesteps: ir.Value, width: int, config: UNetConfig) -> ir.Value:
    """Embed ``timesteps`` (..., 1) as sinusoids (..., width), arXiv:2006.11239 appendix B."""
    half = width // 2
    exponents = -np.log(10000.0) * np.arange(half, dtype=np.float32) / (half - config.freq_shift)
    angles = op.Mul(timesteps, op.constant(f"frequencies_{width}", np.exp(exponents).astype(np.float32)))
    waves = [op.Sin(angles), op.Cos(angles)]
    return op.Concat(*(waves[::-1] if config.flip_sin_to_cos else waves), axis=-1)


class TimestepEmbedding(Module):
    """Two linear layers with SiLU between them; ``cond_dim`` is the width of a condition added to their input."""

    def __init__(self, channels: int, width: int, cond_dim: int | None = None) -> None:
        super().__init__()
        self.cond_proj = Linear(cond_dim, channels, bias=False) if cond_dim is not None else None
        self.linear_1 = Linear(channels, width)
        self.linear_2 = Linear(width, width)

    def forward(self, op: Operators, x: ir.Value, condition: ir.Value | None = None) -> ir.Value:
        if self.cond_proj is not None:
            x = op.Add(x, self.cond_proj(op, condition))
        return self.linear_2(op, op.silu(self.linear_1(op, x)))


class _UNetBlock(Module):
    """The residual blocks and attentions of one level; each pair is a stage, and so is the resampling after them."""

    def __init__(self, resnets: list[Module], attentions: list[Module]) -> None:
        super().__init__()
        self.resnets = ModuleList(resnets)
        if attentions:
            self.attentions = ModuleList(attentions)
        self._count, self._attends = len(resnets), bool(attentions)

    def cross_attentions(self) -> Iterable[CrossAttention]:
        """Return the cross-attentions of all transformer layers."""
        attentions = cast("Iterable[Transformer2DModel]", self.attentions if self._attends else ())
        layers = (cast("Iterable[TransformerBlock]", each.transformer_blocks) for each in attentions)
        return [layer.attn2 for each in layers for layer in each]

    def _layer(self, op: Operators, index: int, x: ir.Value, temb: ir.Value, context: ir.Value) -> ir.Value:
        x = self.resnets[index](op, x, temb)
        return self.attentions[index](op, x, context) if self._attends else x


class DownBlock(_UNetBlock):
    """One level of the down path; all but the lowest end with downsampling."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        channels = config.block_out_channels
        width = channels[level]
        inputs = [channels[max(level - 1, 0)], *[width] * (config.layers_per_block[level] - 1)]
        first = config.shares_batch_before_text and level == config.first_attention_level
        attentions: list[Module] = [
            Transformer2DModel(config, level, count, first=first and index == 0)
            for index, count in enumerate(config.down_transformer_layers[level])
        ]
        super().__init__(
            [_resnet(config, in_channels, width) for in_channels in inputs],
            attentions if config.down_attention[level] else [],
        )
        self._downsamples = level < len(channels) - 1
        self.adapted_layer = self._count - 1 if self._attends else self.layers()[-1]
        """The stage after which diffusers adds a T2I-Adapter's residual."""
        if self._downsamples:
            self.downsamplers = ModuleList([Downsample(width, config.downsample_padding)])

    def layers(self) -> list[int | str]:
        """Return the stages by index or name."""
        return [*range(self._count), *(["downsamplers"] if self._downsamples else [])]

    def forward(self, op: Operators, layer: int | str, x: ir.Value, temb: ir.Value, context: ir.Value) -> ir.Value:
        if layer == "downsamplers":
            return self.downsamplers[0](op, x)
        return self._layer(op, int(layer), x, temb, context)


class UpBlock(_UNetBlock):
    """One level of the up path; all but the highest end with upsampling."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        channels, lowest = config.block_out_channels, len(config.block_out_channels) - 1
        width, count, depths = channels[level], config.layers_per_block[level] + 1, config.up_transformer_layers
        skips = [width] * (count - 1) + [channels[max(level - 1, 0)]]
        inputs = [channels[min(level + 1, lowest)], *[width] * (count - 1)]
        attends = config.up_attention[lowest - level]
        super().__init__(
            [_resnet(config, a + b, width) for a, b in zip(inputs, skips, strict=True)],
            [Transformer2DModel(config, level, layers) for layers in depths[lowest - level]] if attends else [],
        )
        self._upsamples = level > 0
        if self._upsamples:
            self.upsamplers = ModuleList([Upsample(width)])

    def layers(self) -> list[int | str]:
        """Return the stages by index or name."""
        return [*range(self._count), *(["upsamplers"] if self._upsamples else [])]

    def forward(
        self, op: Operators, layer: int | str, x: ir.Value, skip: ir.Value, temb: ir.Value, context: ir.Value
    ) -> ir.Value:
        if layer == "upsamplers":
            return self.upsamplers[0](op, x, skip)
        return self._layer(op, int(layer), op.concat_channels(x, skip), temb, context)


class MidBlock(_UNetBlock):
    """The block at the lowest resolution: residual block with attention, and residual block; or one residual block."""

    def __init__(self, config: UNetConfig) -> None:
        level, width = len(config.block_out_channels) - 1, config.block_out_channels[-1]
        attends, layers = config.mid_block_has_attention, config.mid_transformer_layers
        first = config.shares_batch_before_text and config.first_attention_level is None
        super().__init__(
            [_resnet(config, width, width) for _ in range(2 if attends else 1)],
            [Transformer2DModel(config, level, layers, first=first)] if attends else [],
        )

    def forward(self, op: Operators, x: ir.Value, temb: ir.Value, context: ir.Value) -> ir.Value:
        x = self._layer(op, 0, x, temb, context)
        if not self._attends:
            return x
        op.begin_stage("mid_block.resnets.1")
        return self.resnets[1](op, x, temb)


def _resnet(config: UNetConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    temb = config.time_embedding_dim
    return ResnetBlock(in_channels, out_channels, groups=config.norm_num_groups, eps=config.norm_eps, temb=temb)
