"""Prompt weighting of hidden states: AUTOMATIC1111's, ComfyUI's and compel's."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.text.chunks import Chunk
from sdonnx_runtime.text.prompt_syntax import Sections

Encode: TypeAlias = Callable[[Chunk], Array]
"""Encodes a chunk to hidden states, (S, C)."""

Split: TypeAlias = Callable[[Sections], Sequence[Chunk]]
"""Splits a text into chunks; a text without words is one empty chunk."""

Weighting: TypeAlias = Callable[[Sections, Split, Encode], list[Array]]
"""Makes the weighted states of each chunk of a text, (S, C)."""


def _a1111(text: Sections, split: Split, encode: Encode) -> list[Array]:
    """AUTOMATIC1111's: multiply states by weights, then restore their mean."""

    def weigh(plain: Array, weights: Array) -> Array:
        weighted = plain * weights
        mean = weighted.mean()
        return weighted if mean == 0 else weighted * (plain.mean() / mean)

    return _weigh_chunks(split(text), encode, weigh)


def _comfyui(text: Sections, split: Split, encode: Encode) -> list[Array]:
    """ComfyUI's: interpolate by weight between the states of the empty text and of the text."""

    def weigh(plain: Array, weights: Array) -> Array:
        empty = encode(split(((),))[0])
        return np.where(weights == 1, plain, empty + (plain - empty) * weights)

    return _weigh_chunks(split(text), encode, weigh)


def _weigh_chunks(chunks: Sequence[Chunk], encode: Encode, weigh: Callable[[Array, Array], Array]) -> list[Array]:
    """Encode chunks, with ``weigh(states, weights (S, 1))`` those that have weights."""
    pairs = [(encode(chunk), np.array(chunk.weights, np.float32)[:, None]) for chunk in chunks]
    return [plain if (weights == 1).all() else weigh(plain, weights) for plain, weights in pairs]


def _compel(text: Sections, split: Split, encode: Encode) -> list[Array]:
    """compel's, with DownweightMode.REMOVE: ComfyUI's, blended with the text without fragments of weight below 1."""
    whole = _comfyui(text, split, encode)
    empty = encode(split(((),))[0])
    blend, total_weight = np.stack(whole), 1.0
    for position, section in enumerate(text):
        for index, fragment in enumerate(section):
            if fragment.weight < 1:
                blend_weight = math.tan((1 - max(fragment.weight, 1e-5)) * math.pi / 2)  # 1 at a weight of 0.5
                rest = (*text[:position], (*section[:index], *section[index + 1 :]), *text[position + 1 :])
                without = _comfyui(rest, split, encode)
                without += [empty] * (len(whole) - len(without))  # fewer words never need more chunks
                blend = blend + np.float32(blend_weight) * np.stack(without)
                total_weight += blend_weight
    return whole if total_weight == 1 else list(blend / np.float32(total_weight))


WEIGHTINGS: Mapping[str, Weighting] = {"a1111": _a1111, "comfy": _comfyui, "compel": _compel}
