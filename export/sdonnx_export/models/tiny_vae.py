"""The tiny autoencoder's two halves (TAESD), as diffusers' AutoencoderTiny names their weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.nn import Module, ModuleList

from sdonnx_export.models.config_reader import ConfigReader
from sdonnx_export.models.layers import Conv2d
from sdonnx_export.operators.base import Operators

_NUM_BLOCKS = {"encoder": (1, 3, 3, 3), "decoder": (3, 3, 3, 1)}
"""TAESD's."""


@dataclass(frozen=True, kw_only=True)
class TinyVaeConfig:
    """A tiny autoencoder; tuples have one entry per level, in the order of running."""

    in_channels: int
    out_channels: int
    latent_channels: int
    encoder_width: int
    """Channels on every level; diffusers runs no other models."""
    decoder_width: int
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "TinyVaeConfig":
        """Parse a diffusers AutoencoderTiny config.json; raises ExportError."""
        read = ConfigReader("vae", config)
        read.require_value("_class_name", "AutoencoderTiny")
        read.require_value("act_fn", "relu")
        read.require_value("upsample_fn", "nearest")
        read.require_value("upsampling_scaling_factor", 2)
        for key in ("scaling_factor", "shift_factor"):  # which the manifest has
            read.number(key, 0)
        # block_out_channels repeat the decoder's; neither half uses the latents' magnitude and shift.
        read.ignore("block_out_channels", "force_upcast", "latent_magnitude", "latent_shift")
        widths, counts = read.integers("decoder_block_out_channels", default=(64,) * 4), {}
        levels = len(widths)
        for half in ("encoder", "decoder"):
            key = f"{half}_block_out_channels"
            if len(set(read.integers(key, levels, 64))) > 1:
                raise read.invalid(key, config[key], "the same number for every resolution")
            counts[half] = read.integers(f"num_{half}_blocks", levels, _NUM_BLOCKS[half])
        parsed = cls(
            in_channels=read.integer("in_channels", 3),
            out_channels=read.integer("out_channels", 3),
            latent_channels=read.integer("latent_channels", 4),
            encoder_width=read.integers("encoder_block_out_channels", levels, 64)[0],
            decoder_width=widths[0],
            encoder_blocks=counts["encoder"],
            decoder_blocks=counts["decoder"],
        )
        read.finish()
        return parsed


class TinyVaeDecoder(Module):
    """Unscaled latents (N, 4, h, w) to images (N, 3, 8 h, 8 w) in about -1..1."""

    def __init__(self, config: TinyVaeConfig) -> None:
        super().__init__("")
        width, layers = config.decoder_width, [Conv2d(config.latent_channels, config.decoder_width), _Relu()]
        for level, blocks in enumerate(config.decoder_blocks):
            layers += [_Identity(), _UpsampleConv2d(width, width, bias=False)] if level > 0 else []
            layers += [_Block(width) for _ in range(blocks)]
        self.decoder = _Layers([*layers, Conv2d(width, config.out_channels)])

    def forward(self, op: Operators, latents: ir.Value) -> ir.Value:
        clamped = op.Mul(op.Tanh(op.Div(latents, 3.0)), 3.0)
        image = op.to_output(self.decoder(op, op.from_input(clamped)))
        return op.Sub(op.Mul(image, 2.0), 1.0)


class TinyVaeEncoder(Module):
    """Images (N, 3, H, W) in -1..1 to latents (N, 4, H / 8, W / 8); there is no posterior distribution."""

    outputs = ("latent_sample",)

    def __init__(self, config: TinyVaeConfig) -> None:
        super().__init__("")
        width, layers = config.encoder_width, list[Module]()
        for level, blocks in enumerate(config.encoder_blocks):
            first = Conv2d(config.in_channels, width) if level == 0 else Conv2d(width, width, stride=2, bias=False)
            layers += [first, *(_Block(width) for _ in range(blocks))]
        self.encoder = _Layers([*layers, Conv2d(width, config.latent_channels)])

    def forward(self, op: Operators, image: ir.Value) -> ir.Value:
        return op.to_output(self.encoder(op, op.from_input(op.Div(op.Add(image, 1.0), 2.0))))


class _Layers(Module):
    def __init__(self, layers: list[Module]) -> None:
        super().__init__()
        self.layers = ModuleList(layers)

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        for layer in self.layers:
            x = layer(op, x)
        return x


class _Block(Module):
    """Three convolutions with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = ModuleList([Conv2d(width, width), _Relu(), Conv2d(width, width), _Relu(), Conv2d(width, width)])

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        h = x
        for layer in self.conv:
            h = layer(op, h)
        return op.Relu(op.Add(h, x))


class _UpsampleConv2d(Conv2d):
    """A convolution after upsampling by 2."""

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        return super().forward(op, x, upsample=True)


class _Relu(Module):
    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        return op.Relu(x)


class _Identity(Module):
    """A placeholder for torch's upsampling layer, which has an index of its own."""

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        return x
