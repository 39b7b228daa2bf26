"""The CLIP text encoder (arXiv:2103.00020), as transformers' CLIPTextModel names its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir
from onnxscript.nn import Module, ModuleList, Parameter
from sdonnx_runtime.packages.variant import EMBEDS

from sdonnx_export.models.config_reader import ConfigReader
from sdonnx_export.models.layers import LayerNorm, Linear
from sdonnx_export.operators.base import Operators
from sdonnx_export.operators.stored import FLOAT


@dataclass(frozen=True, kw_only=True)
class ClipLayerConfig:
    """The layers of a CLIP encoder of texts or images, with transformers' keys as names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    """quick_gelu or gelu."""
    layer_norm_eps: float
    is_causal: ClassVar[bool] = False
    """Whether no token attends to a later one."""


@dataclass(frozen=True, kw_only=True)
class ClipTextConfig(ClipLayerConfig):
    """A CLIP text encoder, with transformers' keys as names."""

    is_causal: ClassVar[bool] = True

    vocab_size: int
    max_position_embeddings: int
    """Tokens of a prompt; 77 in every published model."""
    eos_token_id: int
    """2 means "the largest id", as in configs written before transformers 4.30."""
    projection_dim: int | None
    """Width of the projected pooled state; None without a projection."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, projected: bool = False) -> "ClipTextConfig":
        """Parse a transformers config.json, ``projected`` if the encoder has a projection; raises ExportError."""
        nested = config.get("text_config")  # of a whole CLIP model
        config = nested if isinstance(nested, Mapping) else config
        read = ConfigReader("text_encoder_2" if projected else "text_encoder", config)
        read.require_value("model_type", "clip_text_model", "clip")
        read.require_value("use_attention_mask", False)
        # No finish(): transformers writes its general settings here too, which don't change the graph.
        parsed = cls(
            vocab_size=read.integer("vocab_size", 49408),
            max_position_embeddings=read.integer("max_position_embeddings", 77),
            hidden_size=read.integer("hidden_size", 512),
            intermediate_size=read.integer("intermediate_size", 2048),
            num_hidden_layers=read.integer("num_hidden_layers", 12),
            num_attention_heads=read.integer("num_attention_heads", 8),
            hidden_act=read.one_of("hidden_act", ("quick_gelu", "gelu"), "quick_gelu"),
            layer_norm_eps=read.number("layer_norm_eps", 1e-5),
            eos_token_id=read.integer("eos_token_id", 49407, low=0),
            projection_dim=read.integer("projection_dim", 512) if projected else None,
        )
        check_heads(read, parsed)
        return parsed


def check_heads(read: ConfigReader, config: ClipLayerConfig) -> None:
    """Raise ExportError unless the hidden state can be split into the attention heads."""
    heads, width = config.num_attention_heads, config.hidden_size
    if width % heads != 0:
        raise read.invalid("num_attention_heads", heads, f"a divisor of hidden_size {width}")


class ClipTextEncoder(Module):
    """Token ids (N, 77) to last_hidden_state (N, 77, C) and pooler_output (N, C).

    With a projection, to text_embeds (N, P) and last_hidden_state. Further outputs are the hidden states (N, 77, C):
    each layer's input, and the output of the last.
    """

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__("")
        self.text_model = ClipTextTransformer(config)
        self.text_projection = (
            Linear(config.hidden_size, config.projection_dim, bias=False) if config.projection_dim is not None else None
        )

    def forward(self, op: Operators, input_ids: ir.Value) -> tuple[ir.Value, ...]:
        hidden, pooled, states = self.text_model(op, input_ids)
        if self.text_projection is None:
            return hidden, pooled, *states
        return self.text_projection(op, pooled), hidden, *states


class ClipTextTransformer(Module):
    """Embeddings, layers and the final norm."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.embeddings = ClipEmbeddings(config)
        self.encoder = ClipEncoder(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self._config = config

    def forward(self, op: Operators, input_ids: ir.Value) -> tuple[ir.Value, ir.Value, list[ir.Value]]:
        op.begin_stage("embeddings")
        x = self.embeddings(op, input_ids)  # (N, 77, C)
        op.use_causal_mask(self._config.max_position_embeddings)
        states = self.encoder(op, x)
        op.begin_stage("final_layer_norm")
        hidden = self.final_layer_norm(op, states[-1])
        return hidden, self._pool(op, hidden, input_ids), states

    def _pool(self, op: Operators, hidden: ir.Value, input_ids: ir.Value) -> ir.Value:
        """Return the hidden state (N, C) at the first end-of-text token."""
        eos = self._config.eos_token_id
        marks = op.Cast(input_ids if eos == 2 else op.Equal(input_ids, eos), to=FLOAT)  # CUDA has no ArgMax of integers
        index = op.ArgMax(marks, axis=1, keepdims=0)  # (N,)
        return op.GatherND(hidden, op.Unsqueeze(index, [1]), batch_dims=1)  # (N, C)


class ClipEmbeddings(Module):
    """Sum of token and position embeddings."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)
        self._config = config

    def forward(self, op: Operators, input_ids: ir.Value) -> ir.Value:
        tokens = self.token_embedding(op, input_ids)
        tokens.name, tokens.type = EMBEDS, ir.TensorType(ir.DataType.FLOAT)
        tokens.shape = ir.Shape(["batch", self._config.max_position_embeddings, self._config.hidden_size])
        return op.Add(op.cast(tokens, op.dtype), self.position_embedding(op))


class Embedding(Module):
    """A table of vectors."""

    def __init__(self, entries: int, width: int) -> None:
        super().__init__()
        self.weight = Parameter([entries, width])

    def forward(self, op: Operators, ids: ir.Value | None = None) -> ir.Value:
        """Return the vectors of ``ids`` (N, S), or the whole table."""
        return op.matrix(self.weight) if ids is None else op.embed(ids, self.weight)


class ClipEncoder(Module):
    """The stack of layers, with its input and the output of each."""

    def __init__(self, config: ClipLayerConfig) -> None:
        super().__init__()
        self.layers = ModuleList([ClipLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, op: Operators, x: ir.Value) -> list[ir.Value]:
        states = [x]
        for index, layer in enumerate(self.layers):
            op.begin_stage(f"layers.{index}")
            states.append(layer(op, states[-1]))
        return states


class ClipLayer(Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, config: ClipLayerConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = ClipAttention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = ClipMlp(config)

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        x = op.Add(x, self.self_attn(op, self.layer_norm1(op, x)))
        return op.Add(x, self.mlp(op, self.layer_norm2(op, x)))


class ClipAttention(Module):
    """Multi-head self-attention; of texts causal."""

    def __init__(self, config: ClipLayerConfig) -> None:
        super().__init__()
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)
        self._heads, self._causal = config.num_attention_heads, config.is_causal

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        q, k, v = self.q_proj(op, x), self.k_proj(op, x), self.v_proj(op, x)
        attend = op.causal_attention if self._causal else op.attention
        return self.out_proj(op, attend(q, k, v, self._heads))


class ClipMlp(Module):
    """Two linear layers around the activation."""

    def __init__(self, config: ClipLayerConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)
        self._activation = config.hidden_act

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        activation = {"quick_gelu": op.quick_gelu, "gelu": op.gelu}[self._activation]
        return self.fc2(op, activation(self.fc1(op, x)))
