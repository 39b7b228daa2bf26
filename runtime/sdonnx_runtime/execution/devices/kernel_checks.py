"""What an adapter's kernels can't do: each is found out once in a process, by running a graph of one operator."""

from collections.abc import Callable
from functools import cached_property
from typing import TypeAlias

import numpy as np

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.graphs.initializers import FLOAT16
from sdonnx_runtime.graphs.onnx_proto import single_node_model

RunModel: TypeAlias = Callable[[bytes, AnyArray], AnyArray]
"""Runs an encoded graph on an adapter: the input x to the output y. Raises whatever ONNX Runtime does."""

_TOKENS = 64
"""Up to 32, the WebGPU provider takes other kernels."""
_HEADS, _HEAD_SIZE = 2, 16
_VAE_HEAD_SIZE = 512
"""Of the one head of Stable Diffusion's VAEs."""
_TOLERANCE = 1e-2
"""Relative; a wrong kernel is off by 0.1 and more, a right one by 1e-3 at most."""


class KernelChecks:
    """Which operators an adapter runs right.

    The WebGPU provider's attention exchanges keys among the threads of a subgroup, and counts some twice where it has
    less than 8: those of software adapters have 4. In float32, the keys of a head over 256 wide don't fit into the
    memory that many GPUs have for a workgroup. Some adapters don't compute in fp16.
    """

    def __init__(self, run: RunModel) -> None:
        self._run = run

    def attends(self, heads: int) -> bool:
        """Whether MultiHeadAttention is right with so many heads; a single one may be as wide as a VAE's."""
        return self._attends_narrowly and (heads > 1 or self._attends_widely)

    @cached_property
    def has_float16(self) -> bool:
        """Whether it computes in fp16."""
        model = single_node_model("Add", 2, 2, data_type=FLOAT16)
        return self._equals(model, np.ones(2, np.float16), np.full(2, 2, np.float16))

    @cached_property
    def _attends_widely(self) -> bool:
        return self._check_attention(1, _VAE_HEAD_SIZE)

    @cached_property
    def _attends_narrowly(self) -> bool:
        return self._check_attention(_HEADS, _HEAD_SIZE)

    def _check_attention(self, heads: int, size: int) -> bool:
        sizes = 1, _TOKENS, heads * size
        x = np.random.default_rng(0).standard_normal(sizes, np.float32)
        model = single_node_model("MultiHeadAttention", 3, *sizes, domain="com.microsoft", num_heads=heads)
        return self._equals(model, x, _attend_to_itself(x, heads))

    def _equals(self, model: bytes, x: AnyArray, expected: AnyArray) -> bool:
        try:
            found = self._run(model, x)
        except Exception:  # whatever the provider raises where it can't compile a kernel
            return False
        return bool(np.linalg.norm(found - expected) <= _TOLERANCE * np.linalg.norm(expected))


def _attend_to_itself(x: AnyArray, heads: int) -> AnyArray:
    """Scaled dot-product attention (arXiv:1706.03762) of (1, S, heads * d) to itself."""
    split = x.reshape(x.shape[1], heads, -1).transpose(1, 0, 2)  # (heads, S, d)
    weights = np.exp(split @ split.transpose(0, 2, 1) / np.sqrt(split.shape[-1]))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights @ split).transpose(1, 0, 2).reshape(x.shape)
