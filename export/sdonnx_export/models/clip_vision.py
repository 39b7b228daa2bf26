"""The CLIP image encoder (arXiv:2103.00020), as transformers' CLIPVisionModel names its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.nn import Module, Parameter

from sdonnx_export.models.clip import ClipEncoder, ClipLayerConfig, Embedding, check_heads
from sdonnx_export.models.config_reader import ConfigReader
from sdonnx_export.models.layers import LayerNorm, Linear
from sdonnx_export.operators.base import Operators


@dataclass(frozen=True, kw_only=True)
class ClipVisionConfig(ClipLayerConfig):
    """A CLIP image encoder, with transformers' keys as names."""

    num_channels: int
    image_size: int
    """Width and height of its images in pixels."""
    patch_size: int
    """Width and height of a patch in pixels."""
    projection_dim: int
    """Width of the projected pooled state."""

    @property
    def patches(self) -> int:
        """The patches of an image; a rest at the right and below is left out."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], component: str = "image_encoder") -> "ClipVisionConfig":
        """Parse a transformers config.json, of a vision model or of a whole CLIP model.

        Raises:
            ExportError: a value has no graph; ``component`` is what the message calls the model.
        """
        nested = config.get("vision_config")  # of a whole CLIP model
        if isinstance(nested, Mapping):
            older = config.get("vision_config_dict")  # written by transformers before 4.30, and read first
            outer = {"projection_dim": config.get("projection_dim")}
            config = {**nested, **(older if isinstance(older, Mapping) else {}), **outer}
        read = ConfigReader(component, config)
        read.require_value("model_type", "clip_vision_model", "clip")
        # No finish(): transformers writes its general settings here too, which don't change the graph.
        parsed = cls(
            hidden_size=read.integer("hidden_size", 768),
            intermediate_size=read.integer("intermediate_size", 3072),
            num_hidden_layers=read.integer("num_hidden_layers", 12),
            num_attention_heads=read.integer("num_attention_heads", 12),
            hidden_act=read.one_of("hidden_act", ("quick_gelu", "gelu"), "quick_gelu"),
            layer_norm_eps=read.number("layer_norm_eps", 1e-5),
            num_channels=read.integer("num_channels", 3),
            image_size=read.integer("image_size", 224),
            patch_size=read.integer("patch_size", 32),
            projection_dim=read.integer("projection_dim", 512),
        )
        check_heads(read, parsed)
        if parsed.patch_size > parsed.image_size:
            raise read.invalid("patch_size", parsed.patch_size, f"at most image_size {parsed.image_size}")
        return parsed


class ClipVisionEncoder(Module):
    """Normalized images (N, 3, size, size) to image_embeds (N, P) and last_hidden_state (N, 1 + patches, C).

    Further outputs are the hidden states (N, 1 + patches, C): each layer's input, and the output of the last, which
    last_hidden_state is too. transformers' CLIPVisionModelWithProjection.
    """

    outputs = ("image_embeds", "last_hidden_state")

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__("")
        self.vision_model = ClipVisionTransformer(config)
        self.visual_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, op: Operators, pixel_values: ir.Value) -> tuple[ir.Value, ...]:
        pooled, states = self.vision_model(op, pixel_values)
        return self.visual_projection(op, pooled), op.Identity(states[-1]), *states


class ClipVisionTransformer(Module):
    """Images (N, 3, size, size) to the pooled state (N, C) and the hidden states (N, 1 + patches, C)."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.embeddings = ClipVisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps)  # spelled so by transformers
        self.encoder = ClipEncoder(config)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, op: Operators, pixel_values: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        op.begin_stage("embeddings")
        x = self.embeddings(op, pixel_values)
        states = self.encoder(op, self.pre_layrnorm(op, x))
        op.begin_stage("post_layernorm")
        first = op.Gather(states[-1], 0, axis=1)  # (N, C): the class embedding's place
        return self.post_layernorm(op, first), states


class ClipVisionEmbeddings(Module):
    """The class embedding and the patches' embeddings, each with its position's: (N, 1 + patches, C)."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.class_embedding = Parameter([config.hidden_size])
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = Embedding(1 + config.patches, config.hidden_size)
        self._width = config.hidden_size

    def forward(self, op: Operators, pixel_values: ir.Value) -> ir.Value:
        patches = self.patch_embedding(op, pixel_values)
        first = op.Reshape(op.parameter(self.class_embedding), [1, 1, self._width])
        first = op.repeat_batch(first, pixel_values, rank=3)
        return op.Add(op.Concat(first, patches, axis=1), self.position_embedding(op))


class PatchEmbedding(Module):
    """A convolution whose stride is its kernel: (N, 3, size, size) to (N, patches, C).

    Its input is an image whose range no calibration has recorded, so that it is computed in float32 in every precision.
    """

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.weight = Parameter([config.hidden_size, config.num_channels, config.patch_size, config.patch_size])
        self._config = config

    def forward(self, op: Operators, pixel_values: ir.Value) -> ir.Value:
        stride = [self._config.patch_size] * 2
        grid = op.Conv(op.cast(pixel_values, op.dtype), op.matrix(self.weight), strides=stride)  # (N, C, rows, columns)
        return op.Transpose(op.Reshape(grid, [0, self._config.hidden_size, -1]), perm=[0, 2, 1])
