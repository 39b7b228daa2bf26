"""The KL autoencoder's two halves (arXiv:2112.10752), as diffusers' AutoencoderKL names their weights."""

from collections.abc import Callable

import onnx_ir as ir
from onnxscript.nn import Module, ModuleList
from sdonnx_runtime.packages.manifest import MEASURED_STATS

from sdonnx_export.models.configs import VaeConfig
from sdonnx_export.models.layers import Attention, Conv2d, GroupNorm, ResnetBlock
from sdonnx_export.models.unet import Downsample, Upsample
from sdonnx_export.operators.base import Operators

_EPS = 1e-6


class VaeDecoder(Module):
    """Latents (N, 4, h, w), unscaled, to pictures (N, 3, 8 h, 8 w) in about -1..1.

    Tiled, it is two stages: the middle of the whole, and the rest of a tile of what that gives.
    """

    def __init__(self, config: VaeConfig) -> None:
        super().__init__("")
        latent = config.latent_channels
        self.post_quant_conv = Conv2d(latent, latent, 1) if config.post_quant_conv else None
        self.decoder = _Decoder(config)
        self.outputs = ("sample", MEASURED_STATS) if config.tiled else ("sample",)
        self.moments = _moments(config, layers=config.layers + 1, more=1)

    def forward(self, op: Operators, latents: ir.Value, *norms: ir.Value) -> tuple[ir.Value, ...]:
        def into_tiles(x: ir.Value) -> ir.Value:
            edge = op.to_output(x)
            op.begin_stage("tile")
            op.begin_tile(*norms)
            return op.from_input(edge)

        if norms:
            op.begin_stage("middle")
        x = op.from_input(latents)
        x = x if self.post_quant_conv is None else self.post_quant_conv(op, x)
        picture = op.to_output(self.decoder(op, x, into_tiles if norms else _as_it_is))
        return (picture, op.end_tile()) if norms else (picture,)


class VaeEncoder(Module):
    """Pictures (N, 3, H, W) in -1..1 to the posterior's means and log variances (N, 8, H / 8, W / 8).

    Tiled, it is two stages: all down to the smallest size of a tile, and the middle of the whole.
    """

    def __init__(self, config: VaeConfig) -> None:
        super().__init__("")
        moments = 2 * config.latent_channels
        self.encoder = _Encoder(config)
        self.quant_conv = Conv2d(moments, moments, 1) if config.quant_conv else None
        self.outputs = ("latent_parameters", MEASURED_STATS) if config.tiled else ("latent_parameters",)
        self.moments = _moments(config, layers=config.layers)

    def forward(self, op: Operators, picture: ir.Value, *norms: ir.Value) -> tuple[ir.Value, ...]:
        measured = list[ir.Value]()

        def from_tiles(x: ir.Value) -> ir.Value:
            edge = op.to_output(x)
            measured.append(op.end_tile())
            op.begin_stage("middle")
            return op.from_input(edge)

        if norms:
            op.begin_stage("tile")
            op.begin_tile(*norms)
        x = self.encoder(op, op.from_input(picture), from_tiles if norms else _as_it_is)
        return op.to_output(x if self.quant_conv is None else self.quant_conv(op, x)), *measured


def _as_it_is(x: ir.Value) -> ir.Value:
    return x


def _moments(config: VaeConfig, *, layers: int, more: int = 0) -> tuple[int, int] | None:
    """How many moments the norms of a tile have, and of how many groups: two each, two norms to a residual block."""
    return (2 * (2 * layers * len(config.channels) + more), config.groups) if config.tiled else None


class _Decoder(Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = config.channels[::-1]
        self.conv_in = Conv2d(config.latent_channels, widths[0])
        self.mid_block = VaeMidBlock(config)
        blocks: list[Module] = [
            VaeLevel(config, widths[max(i - 1, 0)], width, config.layers + 1, up=i < len(widths) - 1)
            for i, width in enumerate(widths)
        ]
        self.up_blocks = ModuleList(blocks)
        self.conv_norm_out = GroupNorm(config.groups, widths[-1], _EPS)
        self.conv_out = Conv2d(widths[-1], config.out_channels)

    def forward(self, op: Operators, x: ir.Value, between: Callable[[ir.Value], ir.Value]) -> ir.Value:
        """``between`` is done to what the middle gives."""
        x = between(self.mid_block(op, self.conv_in(op, x)))
        for block in self.up_blocks:
            x = block(op, x)
        return self.conv_out(op, op.silu(self.conv_norm_out(op, x)))


class _Encoder(Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = config.channels
        self.conv_in = Conv2d(config.in_channels, widths[0])
        blocks: list[Module] = [
            VaeLevel(config, widths[max(i - 1, 0)], width, config.layers, down=i < len(widths) - 1)
            for i, width in enumerate(widths)
        ]
        self.down_blocks = ModuleList(blocks)
        self.mid_block = VaeMidBlock(config)
        self.conv_norm_out = GroupNorm(config.groups, widths[-1], _EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels)

    def forward(self, op: Operators, x: ir.Value, between: Callable[[ir.Value], ir.Value]) -> ir.Value:
        """``between`` is done to what the middle is given."""
        x = self.conv_in(op, x)
        for block in self.down_blocks:
            x = block(op, x)
        x = self.mid_block(op, between(x))
        return self.conv_out(op, op.silu(self.conv_norm_out(op, x)))


class VaeLevel(Module):
    """One resolution: residual blocks, then a change of size where ``up`` or ``down`` says so."""

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
    """Residual block, attention of one head where the config has it, residual block."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        width = config.channels[-1]
        self.resnets = ModuleList([_resnet(config, width, width) for _ in range(2)])
        if config.mid_attention:
            self.attentions = ModuleList([VaeAttention(config, width)])
        self._attends = config.mid_attention

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        x = self.resnets[0](op, x)
        if self._attends:
            x = self.attentions[0](op, x)
        return self.resnets[1](op, x)


class VaeAttention(Attention):
    """Self-attention of one head over a picture's positions, with a residual connection."""

    def __init__(self, config: VaeConfig, width: int) -> None:
        super().__init__(width, heads=1, bias=True)
        self.group_norm = GroupNorm(config.groups, width, _EPS)
        self._width = width

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        h = op.to_sequence(self.group_norm(op, x), self._width)
        return op.Add(op.to_picture(super().forward(op, h), x), x)


def _resnet(config: VaeConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, groups=config.groups, eps=_EPS)
