"""The layers that bench/gpu.py tests one by one: as sdonnx writes them, and as diffusers has them in torch.

Widths, heads and kernels are those of Stable Diffusion and SDXL, so that a device's kernels are met at the sizes that
real models have, and so are the fallbacks beside them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
import torch
from checkpoint_sizes import TEXT
from diffusers.models.attention import FeedForward as TorchFeedForward
from diffusers.models.attention_processor import Attention as TorchAttention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from onnxscript.nn import Module
from sdonnx_export.models.clip import ClipLayer, ClipTextConfig
from sdonnx_export.models.components import COMPONENTS, ComponentSpec, Port
from sdonnx_export.models.layers import Attention, Conv2d, Downsample, GroupNorm, LayerNorm, ResnetBlock, Upsample
from sdonnx_export.models.transformer import FeedForward
from sdonnx_export.operators.base import Operators
from sdonnx_export.operators.stored import FLOAT
from torch import nn
from torch.nn import functional

TOKENS = 77


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A layer, in both worlds, with parameters of the same names."""

    name: str
    ours: Callable[[], Module]
    theirs: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...]
    """Shapes: a feature map (N, C, H, W) or a sequence (N, S, C), and what else the layer takes."""

    def register(self) -> None:
        """Make it the component ``piece`` of the exporter, with inputs x0, x1 and so on."""
        shapes = [("batch", *(shape[1:] if len(shape) < 4 else (shape[1], "height", "width"))) for shape in self.inputs]
        ports = tuple(Port(name=f"x{index}", dtype=FLOAT, shape=shape) for index, shape in enumerate(shapes))
        COMPONENTS["piece"] = ComponentSpec(
            part="piece", prefixes=(), module=lambda _config: (_Piece(self.ours()), ports), outputs=("y",)
        )


class _Piece(Module):
    """A layer between inputs and outputs of a graph."""

    def __init__(self, layer: Module) -> None:
        super().__init__("")
        self.layer = layer

    def forward(self, op: Operators, *inputs: ir.Value) -> ir.Value:
        is_map = inputs[0].shape is not None and len(inputs[0].shape) == 4
        y = self.layer(op, op.from_input(inputs[0]) if is_map else inputs[0], *inputs[1:])
        return op.to_output(y) if is_map else y


def pieces(side: int) -> Iterator[Piece]:
    """Yield the pieces; feature maps have ``side`` x ``side`` pixels, 64 in Stable Diffusion 1.5."""
    yield from _convolutions(side)
    yield from _norms(side)
    yield from _attentions(side)
    for width in (320, 640, 1280, 256):  # BiasSplitGelu has no kernel for the last
        yield Piece(
            name=f"GEGLU feed-forward {width}",
            ours=partial(FeedForward, width),
            theirs=partial(TorchFeedForward, width, activation_fn="geglu"),
            inputs=((2, side * side // 4, width),),
        )
    yield Piece(
        name="CLIP layer 768, causal",
        ours=lambda: _CausalLayer(ClipTextConfig.from_dict(TEXT)),
        theirs=_TorchClipLayer,
        inputs=((2, TOKENS, 768),),
    )


def _convolutions(side: int) -> Iterator[Piece]:
    for inputs, outputs, kernel in ((4, 320, 3), (320, 320, 3), (960, 640, 1), (320, 4, 3)):
        yield Piece(
            name=f"conv {kernel}x{kernel} {inputs} to {outputs}",
            ours=partial(Conv2d, inputs, outputs, kernel),
            theirs=partial(nn.Conv2d, inputs, outputs, kernel, padding=kernel // 2),
            inputs=((2, inputs, side, side),),
        )
    for padding in (1, 0):  # the U-Net's, the VAE's
        yield Piece(
            name=f"conv 3x3 stride 2, padding {padding}",
            ours=partial(Downsample, 320, padding),
            theirs=partial(Downsample2D, 320, use_conv=True, padding=padding, name="op"),
            inputs=((2, 320, side, side),),
        )
    yield Piece(
        name="resize by 2 and conv",
        ours=partial(Upsample, 320),
        theirs=partial(Upsample2D, 320, use_conv=True),
        inputs=((2, 320, side // 2, side // 2),),
    )


def _norms(side: int) -> Iterator[Piece]:
    for channels, eps in ((320, 1e-5), (2560, 1e-5), (128, 1e-6), (160, 1e-5)):  # the last has 5 channels per group
        yield Piece(
            name=f"group norm {channels} with SiLU",
            ours=partial(_NormSilu, channels, eps),
            theirs=partial(_TorchNormSilu, 32, channels, eps),
            inputs=((2, channels, side // 2, side // 2),),
        )
    yield Piece(
        name="layer norm 320",
        ours=partial(LayerNorm, 320),
        theirs=partial(nn.LayerNorm, 320),
        inputs=((2, side * side, 320),),
    )
    yield Piece(
        name="residual block 320 to 640",
        ours=partial(ResnetBlock, 320, 640, groups=32, eps=1e-5, temb=1280),
        theirs=partial(ResnetBlock2D, in_channels=320, out_channels=640, temb_channels=1280, eps=1e-5,
                       skip_time_act=True),
        inputs=((2, 320, side // 2, side // 2), (2, 1280)),
    )  # fmt: skip


def _attentions(side: int) -> Iterator[Piece]:
    for channels, heads, shrink in ((320, 8, 1), (640, 8, 2), (1280, 8, 4), (640, 10, 2)):
        for what, context in (("self", None), ("cross", 2048 if heads == 10 else 768)):
            tokens = (2, (side // shrink) ** 2, channels)
            yield Piece(
                name=f"{what}-attention, heads of {channels // heads}",
                ours=partial(Attention, channels, heads, context=context),
                theirs=partial(TorchAttention, channels, context, heads=heads, dim_head=channels // heads),
                inputs=(tokens,) if context is None else (tokens, (2, TOKENS, context)),
            )
    yield Piece(
        name="self-attention, a head of 512",
        ours=partial(Attention, 512, 1, bias=True),
        theirs=partial(TorchAttention, 512, heads=1, dim_head=512, bias=True),
        inputs=((1, side * side, 512),),
    )


class _NormSilu(GroupNorm):
    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(32, channels, eps)

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        return super().forward(op, x, silu=True)


class _TorchNormSilu(nn.GroupNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.silu(super().forward(x))


class _CausalLayer(ClipLayer):
    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        op.use_causal_mask(TOKENS)
        return super().forward(op, x)


class _TorchClipLayer(nn.Module):
    """A layer of CLIP's text encoder, as arXiv:2103.00020 has it, with transformers' names."""

    def __init__(self) -> None:
        super().__init__()
        width, inner = TEXT["hidden_size"], TEXT["intermediate_size"]
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        project, h = self.self_attn, self.layer_norm1(x)
        heads = TEXT["num_attention_heads"], -1
        q, k, v = (project[f"{name}_proj"](h).unflatten(-1, heads).transpose(1, 2) for name in "qkv")
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + project["out_proj"](attended.transpose(1, 2).flatten(2))
        h = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](h * torch.sigmoid(1.702 * h))
