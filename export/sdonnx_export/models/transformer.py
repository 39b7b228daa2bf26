"""The transformer blocks of a U-Net, as diffusers names their weights."""

import numpy as np
import onnx_ir as ir
from onnxscript.nn import Module, ModuleList

from sdonnx_export.models.layers import Attention, Conv2d, GroupNorm, LayerNorm, Linear
from sdonnx_export.models.unet_config import UNetConfig
from sdonnx_export.operators.base import Operators


class Transformer2DModel(Module):
    """Transformer blocks over the latent pixels (N, C, H, W), with a residual connection around all of them.

    The ``first`` of a U-Net repeats the batch of the latents to that of the text.
    """

    def __init__(self, config: UNetConfig, level: int, layers: int, *, first: bool = False) -> None:
        super().__init__()
        width = config.block_out_channels[level]
        self.norm = GroupNorm(config.norm_num_groups, width, 1e-6)
        project = Linear if config.use_linear_projection else _pointwise_conv
        self.proj_in = project(width, width)
        blocks: list[Module] = [TransformerBlock(config, level, first=first and index == 0) for index in range(layers)]
        self.transformer_blocks = ModuleList(blocks)
        self.proj_out = project(width, width)
        self._width, self._linear, self._first = width, config.use_linear_projection, first

    def forward(self, op: Operators, x: ir.Value, context: ir.Value) -> ir.Value:
        h = self.norm(op, x)
        if self._linear:
            h = self.proj_in(op, op.to_sequence(h, self._width))
        else:
            h = op.to_sequence(self.proj_in(op, h), self._width)
        stage = op.stage
        for index, block in enumerate(self.transformer_blocks):
            op.begin_stage(substage_name(stage, index))
            h = block(op, h, context, x)
        x = op.repeat_batch(x, context, rank=4) if self._first else x
        if self._linear:
            h = op.to_feature_map(self.proj_out(op, h), x)
        else:
            h = self.proj_out(op, op.to_feature_map(h, x))
        return op.Add(h, x)


def substage_name(stage: str, layer: int) -> str:
    """Return the name of a residual block's stage from transformer layer ``layer`` on; a few layers are gigabytes."""
    return stage if layer == 0 else f"{stage}.transformer_blocks.{layer}"


def _pointwise_conv(in_channels: int, out_channels: int) -> Conv2d:
    return Conv2d(in_channels, out_channels, 1)


class TransformerBlock(Module):
    """Self-attention, cross-attention to the text, feed-forward; each after a norm and added to its input.

    With token downsampling (ToDo, arXiv:2402.13573) keys and values of the self-attention come from every second row
    and column.
    """

    def __init__(self, config: UNetConfig, level: int, *, first: bool) -> None:
        super().__init__()
        width, heads = config.block_out_channels[level], config.num_attention_heads[level]
        self._first, self._width, self._downsampled = first, width, level == config.downsampled_level
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, heads, upcast=config.upcast_attention)
        self.norm2 = LayerNorm(width)
        self.attn2 = CrossAttention(width, heads, context=config.cross_attention_dim, upcast=config.upcast_attention)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, op: Operators, x: ir.Value, context: ir.Value, image: ir.Value) -> ir.Value:
        """Apply it to ``x`` (n, H * W, C); ``image`` (n, C, H, W) gives height and width."""
        normed = self.norm1(op, x)
        source = op.downsample_tokens(normed, image, self._width) if self._downsampled else None
        x = op.Add(self.attn1(op, normed, source), x)
        x = op.repeat_batch(x, context, rank=3) if self._first else x
        x = op.Add(self.attn2(op, self.norm2(op, x), context), x)
        return op.Add(self.ff(op, self.norm3(op, x)), x)


class CrossAttention(Attention):
    """Attention to the text and, if the graph has `Operators.image_prompts`, also to these."""

    def __init__(self, channels: int, heads: int, *, context: int, upcast: bool) -> None:
        super().__init__(channels, heads, context=context, upcast=upcast)
        self.channels = channels
        self.image_columns = slice(0, 0)
        """Its keys and values among those of all layers."""

    def attend(self, op: Operators, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """Attend to the text's keys and values, and add the attention to those of the images."""
        attended = super().attend(op, q, k, v)
        if op.image_prompts is None:
            return attended
        return op.Add(attended, self._attend_to_images(op, q, *op.image_prompts))

    def _attend_to_images(self, op: Operators, q: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        """Attend to each of A images of T tokens by itself, and sum over images: arXiv:2308.06721, equation 5."""
        heads, size = self._heads, self.channels // self._heads
        columns = [self.image_columns.start], [self.image_columns.stop], [3]
        k, v = (op.Reshape(op.Slice(each, *columns), [0, -1, heads, size]) for each in (keys, values))  # (N, A T, h, d)
        scale = op.constant(f"attention_scale_{size}", np.array(size**-0.5, np.float32), k.dtype)
        q = op.Transpose(op.Reshape(q, [0, 0, heads, size]), perm=[0, 2, 1, 3])  # (N, h, S, d)
        scores = op.MatMul(q, op.Mul(op.Transpose(k, perm=[0, 2, 3, 1]), scale))  # (N, h, S, A T)
        by_image = op.Concat([0, 0, 0], op.Shape(keys, start=1, end=3), axis=0)
        weights = op.Reshape(op.Softmax(op.Reshape(scores, by_image), axis=-1), [0, 0, 0, -1])
        attended = op.MatMul(weights, op.Transpose(v, perm=[0, 2, 1, 3]))  # (N, h, S, d)
        return op.Reshape(op.Transpose(attended, perm=[0, 2, 1, 3]), [0, 0, self.channels])


class FeedForward(Module):
    """A gated linear unit of four times the width; index 1 of the checkpoint's list is a dropout."""

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
    """A linear layer, one half of whose outputs gates the other."""

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        return op.geglu(x, self.weight, self.bias)
