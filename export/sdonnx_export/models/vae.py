"""The KL autoencoder's two halves (arXiv:2112.10752), as diffusers' AutoencoderKL names their weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.nn import Module, ModuleList
from sdonnx_runtime.packages.families import FAMILIES
from sdonnx_runtime.packages.variant import MEASURED_STATS

from sdonnx_export.models.config_reader import ConfigReader
from sdonnx_export.models.layers import Attention, Conv2d, Downsample, GroupNorm, ResnetBlock, Upsample
from sdonnx_export.operators.base import Operators

_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """A KL autoencoder, with diffusers' keys as names."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    """One entry per level, from the highest resolution to the lowest."""
    layers_per_block: int
    norm_num_groups: int
    mid_block_add_attention: bool
    use_quant_conv: bool
    use_post_quant_conv: bool
    scaling_factor: float
    """The U-Net's latents are (the encoder's - shift_factor) * scaling_factor."""
    shift_factor: float
    force_upcast: bool
    """Whether activations overflow float16, where its model computes in that."""
    tiled: bool = False
    """Whether it runs on tiles, with norms over the whole image."""

    @property
    def float32_layers(self) -> tuple[str, ...]:
        """Patterns of the layers whose activations overflow float16: the encoder, the decoder after its mid block.

        As in diffusers, whose pipelines of Stable Diffusion 1 and 2 run their VAE in float16 whatever ``force_upcast``
        says.
        """
        if not self.force_upcast or self.scaling_factor == FAMILIES["sd1"].scaling_factor:
            return ()
        return "encoder", "quant_conv", "decoder.up_blocks", "decoder.conv_norm_out", "decoder.conv_out"

    @property
    def downscale(self) -> int:
        """Image pixels for each latent pixel, per axis."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VaeConfig":
        """Parse a diffusers AutoencoderKL config.json; raises ExportError."""
        read = ConfigReader("vae", config)
        read.require_value("_class_name", "AutoencoderKL")
        channels = read.integers("block_out_channels", default=(64,))
        read.enum_list("down_block_types", ("DownEncoderBlock2D",), len(channels), ("DownEncoderBlock2D",))
        read.enum_list("up_block_types", ("UpDecoderBlock2D",), len(channels), ("UpDecoderBlock2D",))
        read.require_value("act_fn", "silu", "swish")
        read.require_value("latents_mean", None)
        read.require_value("latents_std", None)
        read.ignore("sample_size")
        parsed = cls(
            in_channels=read.integer("in_channels", 3),
            out_channels=read.integer("out_channels", 3),
            latent_channels=read.integer("latent_channels", 4),
            block_out_channels=channels,
            layers_per_block=read.integer("layers_per_block", 1),
            norm_num_groups=read.integer("norm_num_groups", 32),
            mid_block_add_attention=read.boolean("mid_block_add_attention", True),
            use_quant_conv=read.boolean("use_quant_conv", True),
            use_post_quant_conv=read.boolean("use_post_quant_conv", True),
            scaling_factor=read.number("scaling_factor", 0.18215),
            shift_factor=read.number("shift_factor", 0.0),
            force_upcast=read.boolean("force_upcast", True),
        )
        for width in channels:
            if width % parsed.norm_num_groups != 0:
                raise read.invalid("norm_num_groups", parsed.norm_num_groups, f"a divisor of {width} channels")
        read.finish()
        return parsed


class VaeDecoder(Module):
    """Unscaled latents (N, 4, h, w) to images (N, 3, 8 h, 8 w) in about -1..1.

    Tiled, it has two stages: the mid block on the whole, and the rest on a tile of the mid block's output.
    """

    def __init__(self, config: VaeConfig) -> None:
        super().__init__("")
        latent = config.latent_channels
        self.post_quant_conv = Conv2d(latent, latent, 1) if config.use_post_quant_conv else None
        self.decoder = _Decoder(config)
        self.outputs = ("sample", MEASURED_STATS) if config.tiled else ("sample",)
        self.norm_stats_shape = _norm_stats_shape(config, layers=config.layers_per_block + 1, more=1)

    def forward(self, op: Operators, latents: ir.Value, *norms: ir.Value) -> tuple[ir.Value, ...]:
        def begin_tiles(x: ir.Value) -> ir.Value:
            edge = op.to_output(x)
            op.begin_stage("tile")
            op.use_norm_stats(*norms)
            return op.from_input(edge)

        if norms:
            op.begin_stage("middle")
        x = op.from_input(latents)
        x = x if self.post_quant_conv is None else self.post_quant_conv(op, x)
        image = op.to_output(self.decoder(op, x, begin_tiles if norms else _identity))
        return (image, op.collect_norm_stats()) if norms else (image,)


class VaeEncoder(Module):
    """Images (N, 3, H, W) in -1..1 to the posterior's means and log variances (N, 8, H / 8, W / 8).

    Tiled, it has two stages: the down path on a tile, and the mid block on the whole.
    """

    def __init__(self, config: VaeConfig) -> None:
        super().__init__("")
        moments = 2 * config.latent_channels
        self.encoder = _Encoder(config)
        self.quant_conv = Conv2d(moments, moments, 1) if config.use_quant_conv else None
        self.outputs = ("latent_parameters", MEASURED_STATS) if config.tiled else ("latent_parameters",)
        self.norm_stats_shape = _norm_stats_shape(config, layers=config.layers_per_block)

    def forward(self, op: Operators, image: ir.Value, *norms: ir.Value) -> tuple[ir.Value, ...]:
        stats = list[ir.Value]()

        def end_tiles(x: ir.Value) -> ir.Value:
            edge = op.to_output(x)
            stats.append(op.collect_norm_stats())
            op.begin_stage("middle")
            return op.from_input(edge)

        if norms:
            op.begin_stage("tile")
            op.use_norm_stats(*norms)
        x = self.encoder(op, op.from_input(image), end_tiles if norms else _identity)
        return op.to_output(x if self.quant_conv is None else self.quant_conv(op, x)), *stats


def _identity(x: ir.Value) -> ir.Value:
    return x


def _norm_stats_shape(config: VaeConfig, *, layers: int, more: int = 0) -> tuple[int, int] | None:
    """Return the shape (2 K, groups) of the statistics of a tile's K norms: two per residual block, and ``more``."""
    if not config.tiled:
        return None
    return 2 * (2 * layers * len(config.block_out_channels) + more), config.norm_num_groups


class _Decoder(Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = Conv2d(config.latent_channels, widths[0])
        self.mid_block = VaeMidBlock(config)
        blocks: list[Module] = [
            VaeBlock(config, widths[max(i - 1, 0)], width, config.layers_per_block + 1, up=i < len(widths) - 1)
            for i, width in enumerate(widths)
        ]
        self.up_blocks = ModuleList(blocks)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], _EPS)
        self.conv_out = Conv2d(widths[-1], config.out_channels)

    def forward(self, op: Operators, x: ir.Value, between: Callable[[ir.Value], ir.Value]) -> ir.Value:
        """Decode ``x``; ``between`` is applied to the output of the mid block."""
        x = between(self.mid_block(op, self.conv_in(op, x)))
        for block in self.up_blocks:
            x = block(op, x)
        return self.conv_out(op, self.conv_norm_out(op, x, silu=True))


class _Encoder(Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = Conv2d(config.in_channels, widths[0])
        blocks: list[Module] = [
            VaeBlock(config, widths[max(i - 1, 0)], width, config.layers_per_block, down=i < len(widths) - 1)
            for i, width in enumerate(widths)
        ]
        self.down_blocks = ModuleList(blocks)
        self.mid_block = VaeMidBlock(config)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], _EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels)

    def forward(self, op: Operators, x: ir.Value, between: Callable[[ir.Value], ir.Value]) -> ir.Value:
        """Encode ``x``; ``between`` is applied to the input of the mid block."""
        x = self.conv_in(op, x)
        for block in self.down_blocks:
            x = block(op, x)
        x = self.mid_block(op, between(x))
        return self.conv_out(op, self.conv_norm_out(op, x, silu=True))


class VaeBlock(Module):
    """The residual blocks of one level, and upsampling or downsampling after them."""

    def __init__(
        self,
        config: VaeConfig,
        in_channels: int,
        out_channels: int,
        layers: int,
        *,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        inputs = [in_channels, *[out_channels] * (layers - 1)]
        self.resnets = ModuleList([_resnet(config, channels, out_channels) for channels in inputs])
        if up:
            self.upsamplers = ModuleList([Upsample(out_channels)])
        if down:
            self.downsamplers = ModuleList([Downsample(out_channels, padding=0)])
        self._up, self._down = up, down

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        for resnet in self.resnets:
            x = resnet(op, x)
        if self._up:
            x = self.upsamplers[0](op, x)
        if self._down:
            x = self.downsamplers[0](op, x)
        return x


class VaeMidBlock(Module):
    """Residual block, attention of one head if the config has it, residual block."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = ModuleList([_resnet(config, width, width) for _ in range(2)])
        if config.mid_block_add_attention:
            self.attentions = ModuleList([VaeAttention(config, width)])
        self._attends = config.mid_block_add_attention

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        x = self.resnets[0](op, x)
        if self._attends:
            x = self.attentions[0](op, x)
        return self.resnets[1](op, x)


class VaeAttention(Attention):
    """Self-attention of one head over the latent pixels, with a residual connection."""

    def __init__(self, config: VaeConfig, width: int) -> None:
        super().__init__(width, heads=1, bias=True)
        self.group_norm = GroupNorm(config.norm_num_groups, width, _EPS)
        self._width = width

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        h = op.to_sequence(self.group_norm(op, x), self._width)
        return op.Add(op.to_feature_map(super().forward(op, h), x), x)


def _resnet(config: VaeConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, groups=config.norm_num_groups, eps=_EPS)
