"""The CLIP text encoder (arXiv:2103.00020), as transformers' CLIPTextModel names its weights."""

import numpy as np
import onnx_ir as ir
from onnxscript.nn import Module, ModuleList, Parameter
from sdonnx_runtime.packages.manifest import EMBEDS

from sdonnx_export.models.configs import ClipTextConfig
from sdonnx_export.models.layers import LayerNorm, Linear
from sdonnx_export.operators.base import Operators


class ClipTextEncoder(Module):
    """Token ids (N, 77) to last_hidden_state (N, 77, C) and pooler_output (N, C); or to text_embeds (N, P) and that.

    Then come the hidden states (N, 77, C): what goes into each layer, and what comes out of the last.
    """

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__("")
        self.text_model = ClipTextTransformer(config)
        self.text_projection = (
            Linear(config.width, config.projection, bias=False) if config.projection is not None else None
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
        self.final_layer_norm = LayerNorm(config.width, config.eps)
        self._config = config

    def forward(self, op: Operators, input_ids: ir.Value) -> tuple[ir.Value, ir.Value, list[ir.Value]]:
        op.begin_stage("embeddings")
        x = self.embeddings(op, input_ids)  # (N, 77, C)
        states = self.encoder(op, x, causal_bias(op, self._config.positions))
        op.begin_stage("final_layer_norm")
        hidden = self.final_layer_norm(op, states[-1])
        return hidden, self._pool(op, hidden, input_ids), states

    def _pool(self, op: Operators, hidden: ir.Value, input_ids: ir.Value) -> ir.Value:
        """The hidden state at the end-of-text token, the first where there are several."""
        eos = self._config.eos_token_id
        marks = input_ids if eos == 2 else op.Cast(op.Equal(input_ids, eos), to=ir.DataType.INT32)
        place = op.ArgMax(marks, axis=1, keepdims=0)  # (N,)
        return op.GatherND(hidden, op.Unsqueeze(place, [1]), batch_dims=1)  # (N, C)


def causal_bias(op: Operators, length: int) -> ir.Value:
    """Added to attention scores so that no token sees a later one: (1, 1, length, length)."""
    lowest = np.finfo(np.float32).min
    bias = np.triu(np.full((1, 1, length, length), lowest, np.float32), k=1)
    return op.constant("causal_bias", bias)


class ClipEmbeddings(Module):
    """Token plus position embeddings."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = Embedding(config.vocab_size, config.width)
        self.position_embedding = Embedding(config.positions, config.width)
        self._config = config

    def forward(self, op: Operators, input_ids: ir.Value) -> ir.Value:
        tokens = self.token_embedding(op, input_ids)
        tokens.name, tokens.type = EMBEDS, ir.TensorType(ir.DataType.FLOAT)
        tokens.shape = ir.Shape(["batch", self._config.positions, self._config.width])
        return op.Add(tokens, self.position_embedding(op))


class Embedding(Module):
    """A table of vectors."""

    def __init__(self, entries: int, width: int) -> None:
        super().__init__()
        self.weight = Parameter([entries, width])

    def forward(self, op: Operators, ids: ir.Value | None = None) -> ir.Value:
        """The rows at ``ids``, or the whole table."""
        return op.matrix(self.weight) if ids is None else op.embed(ids, self.weight)


class ClipEncoder(Module):
    """The stack of layers."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.layers = ModuleList([ClipLayer(config) for _ in range(config.layers)])

    def forward(self, op: Operators, x: ir.Value, bias: ir.Value) -> list[ir.Value]:
        states = [x]
        for index, layer in enumerate(self.layers):
            op.begin_stage(f"layers.{index}")
            states.append(layer(op, states[-1], bias))
        return states


class ClipLayer(Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.width, config.eps)
        self.self_attn = ClipAttention(config)
        self.layer_norm2 = LayerNorm(config.width, config.eps)
        self.mlp = ClipMlp(config)

    def forward(self, op: Operators, x: ir.Value, bias: ir.Value) -> ir.Value:
        x = op.Add(x, self.self_attn(op, self.layer_norm1(op, x), bias))
        return op.Add(x, self.mlp(op, self.layer_norm2(op, x)))


class ClipAttention(Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.q_proj = Linear(config.width, config.width)
        self.k_proj = Linear(config.width, config.width)
        self.v_proj = Linear(config.width, config.width)
        self.out_proj = Linear(config.width, config.width)
        self._heads = config.heads

    def forward(self, op: Operators, x: ir.Value, bias: ir.Value) -> ir.Value:
        q, k, v = self.q_proj(op, x), self.k_proj(op, x), self.v_proj(op, x)
        return self.out_proj(op, op.attention(q, k, v, self._heads, bias))


class ClipMlp(Module):
    """Two linear layers around the activation."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.width, config.inner_width)
        self.fc2 = Linear(config.inner_width, config.width)
        self._activation = config.activation

    def forward(self, op: Operators, x: ir.Value) -> ir.Value:
        activation = {"quick_gelu": op.quick_gelu, "gelu": op.gelu}[self._activation]
        return self.fc2(op, activation(self.fc1(op, x)))
