"""Operators for DirectML: what its execution provider of ONNX Runtime computes fastest."""

import numpy as np
import onnx_ir as ir
from onnxscript.nn import Parameter

from sdonnx_export.operators.base import Operators

_MASKED = -1e4
"""Far below any score, and within float16."""


class DirectMlOperators(Operators):
    """`Operators` with group normalization and SiLU as one node, and CLIP's attention of single nodes.

    DirectML's MultiHeadAttention knows no causal mask but as a bias of the size of all scores.
    """

    def use_causal_mask(self, length: int) -> None:
        """Prepare for `causal_attention` over sequences of ``length`` tokens."""
        masked = np.full((length, length), _MASKED, np.float32)
        self._causal_mask = self.constant("causal_bias", np.triu(masked, k=1), self.dtype), length

    def causal_attention(self, q: ir.Value, k: ir.Value, v: ir.Value, heads: int) -> ir.Value:
        """Attention over (N, S, heads * d) in which no token sees a later one, after `use_causal_mask`."""
        if self._causal_mask is None:
            raise TypeError("causal_attention requires use_causal_mask before it")
        return self.decomposed_attention(q, k, v, heads, self._causal_mask[0])

    def group_norm(
        self, x: ir.Value, weight: Parameter, bias: Parameter, *, groups: int, eps: float, silu: bool = False
    ) -> ir.Value:
        """Group normalization (arXiv:1803.08494), and SiLU after it if ``silu``: one node, but for tiles."""
        if self._image_stats is not None:
            return super().group_norm(x, weight, bias, groups=groups, eps=eps, silu=silu)
        x = self.cast(x, self.dtype_of(weight))
        affine = self.norm_parameter(weight), self.norm_parameter(bias)
        options = {"groups": groups, "epsilon": eps, "activation": int(silu), "channels_last": 0}
        return self._contrib("GroupNorm", x, *affine, **options)
