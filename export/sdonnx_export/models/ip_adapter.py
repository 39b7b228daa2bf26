"""An IP-Adapter (arXiv:2308.06721), as its published files name the weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import onnx_ir as ir
from onnxscript.nn import Module, ModuleList, Parameter

from sdonnx_export.models.config_reader import ConfigReader
from sdonnx_export.models.layers import LayerNorm, Linear
from sdonnx_export.operators.base import Operators

HEAD_SIZE = 64
"""Channels of each head of a resampler; its published code has no other."""


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig:
    """The resampler of IP-Adapter Plus."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int


@dataclass(frozen=True, kw_only=True)
class IPAdapterConfig:
    """An IP-Adapter."""

    image_state: str
    """The output of its image encoder that it reads: ``image_embeds``, or a hidden state."""
    image_width: int
    """Width of that output."""
    cross_attention_dim: int
    """Width of the U-Net's text."""
    num_tokens: int
    """Tokens of an image."""
    layer_widths: tuple[int, ...]
    """Channels of the U-Net's cross-attentions: on the way down, on the way up, in the middle."""
    resampler: ResamplerConfig | None
    """Of a Plus; None projects one vector to all tokens."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "IPAdapterConfig":
        """Parse the config.json of a package; raises ExportError."""
        read = ConfigReader("ip_adapter", config)
        read.require_value("_class_name", "IPAdapter")
        kind = read.one_of("image_projection", ("linear", "resampler"))
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        resampler = ResamplerConfig(**{key: read.integer(key) for key in keys}) if kind == "resampler" else None
        state = read.value("image_state")
        if not isinstance(state, str):
            raise read.invalid("image_state", state, "the name of an output")
        return cls(
            image_state=state,
            image_width=read.integer("image_width"),
            cross_attention_dim=read.integer("cross_attention_dim"),
            num_tokens=read.integer("num_tokens"),
            layer_widths=read.integers("layer_widths"),
            resampler=resampler,
        )


class IPAdapter(Module):
    """What an image encoder says of images, (N, C) or (N, S, C), to IMAGE_KEYS and IMAGE_VALUES (N, T, W).

    They have the keys and values of all the U-Net's cross-attentions side by side.
    """

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__("")
        self.image_proj = ImageProjection(config) if config.resampler is None else Resampler(config, config.resampler)
        layers = [ImageKeysValues(config.cross_attention_dim, width) for width in config.layer_widths]
        self.ip_adapter = ModuleList([each for layer in layers for each in (Module(), layer)])  # self-attentions: none
        self._layers = layers

    def forward(self, op: Operators, state: ir.Value) -> tuple[ir.Value, ir.Value]:
        op.begin_stage("image_proj")
        tokens = self.image_proj(op, state)  # (N, T, C)
        op.begin_stage("ip_adapter")
        keys, values = zip(*(layer(op, tokens) for layer in self._layers), strict=True)
        return op.Concat(*keys, axis=-1), op.Concat(*values, axis=-1)


class ImageKeysValues(Module):
    """The linear layers of one cross-attention, without biases."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.to_k_ip = Linear(in_features, out_features, bias=False)
        self.to_v_ip = Linear(in_features, out_features, bias=False)

    def forward(self, op: Operators, tokens: ir.Value) -> tuple[ir.Value, ir.Value]:
        return self.to_k_ip(op, tokens), self.to_v_ip(op, tokens)


class ImageProjection(Module):
    """The pooled, projected state (N, C) to tokens (N, T, width) by one linear layer and a norm."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.proj = Linear(config.image_width, config.num_tokens * config.cross_attention_dim)
        self.norm = LayerNorm(config.cross_attention_dim)
        self._shape = [0, config.num_tokens, config.cross_attention_dim]

    def forward(self, op: Operators, state: ir.Value) -> ir.Value:
        return self.norm(op, op.Reshape(self.proj(op, state), self._shape))


class Resampler(Module):
    """A hidden state (N, S, C) to tokens (N, T, width): queries that attend to it (arXiv:2204.14198)."""

    def __init__(self, config: IPAdapterConfig, own: ResamplerConfig) -> None:
        super().__init__()
        self.latents = Parameter([1, config.num_tokens, own.hidden_size])
        self.proj_in = Linear(config.image_width, own.hidden_size)
        self.layers = ModuleList(
            [ModuleList([PerceiverAttention(own), _feed_forward(own)]) for _ in range(own.num_hidden_layers)]
        )
        self.proj_out = Linear(own.hidden_size, config.cross_attention_dim)
        self.norm_out = LayerNorm(config.cross_attention_dim)

    def forward(self, op: Operators, state: ir.Value) -> ir.Value:
        x = self.proj_in(op, state)
        latents = op.repeat_batch(op.parameter(self.latents), x, rank=3)
        for attention, (norm, widen, _, narrow) in cast("Iterable[tuple[Module, Iterable[Module]]]", self.layers):
            latents = op.Add(attention(op, x, latents), latents)
            latents = op.Add(narrow(op, op.gelu(widen(op, norm(op, latents)))), latents)
        return self.norm_out(op, self.proj_out(op, latents))


def _feed_forward(config: ResamplerConfig) -> ModuleList:
    """The layers around an activation, which has index 2 in the checkpoint's list."""
    width, inner = config.hidden_size, config.intermediate_size
    linear = Linear(width, inner, bias=False), Module(), Linear(inner, width, bias=False)
    return ModuleList([LayerNorm(width), *linear])


class PerceiverAttention(Module):
    """Queries attend to an image and to themselves."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.num_attention_heads * HEAD_SIZE
        self.norm1 = LayerNorm(width)
        self.norm2 = LayerNorm(width)
        self.to_q = Linear(width, inner, bias=False)
        self.to_kv = Linear(width, 2 * inner, bias=False)
        self.to_out = Linear(inner, width, bias=False)
        self._heads = config.num_attention_heads

    def forward(self, op: Operators, x: ir.Value, latents: ir.Value) -> ir.Value:
        """Apply it to ``x`` (N, S, C) and ``latents`` (N, T, C)."""
        latents = self.norm2(op, latents)
        both = op.Concat(self.norm1(op, x), latents, axis=1)
        k, v = op.Split(self.to_kv(op, both), axis=-1, num_outputs=2, _outputs=2)
        return self.to_out(op, op.attention(self.to_q(op, latents), k, v, self._heads))
