"""Operators for WebGPU: what its execution provider of ONNX Runtime computes fastest."""

import onnx_ir as ir

from sdonnx_export.operators.base import UnidirectionalAttention, channels_of
from sdonnx_export.operators.stored import FLOAT

_WIDEST_HEAD = 256
"""Wider heads in float32 take MultiHeadAttention more workgroup memory than most adapters have."""


class WebGpuOperators(UnidirectionalAttention):
    """`Operators` whose causal attention is one node without a bias, and whose widest heads are written in MatMul."""

    def attention(self, q: ir.Value, k: ir.Value, v: ir.Value, heads: int, *, upcast: bool = False) -> ir.Value:
        """Scaled dot-product attention over (N, S, heads * d); with ``upcast`` its scores are float32."""
        is_float32 = upcast or FLOAT in {each.dtype for each in (q, k, v)}
        if is_float32 and channels_of(q) // heads > _WIDEST_HEAD:
            q, k, v = (self.cast(each, FLOAT) for each in (q, k, v))
            return self.decomposed_attention(q, k, v, heads)
        return super().attention(q, k, v, heads, upcast=upcast)
