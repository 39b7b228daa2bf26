"""What weights do to a text's hidden states: as AUTOMATIC1111 has it, ComfyUI, or compel."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.text.chunks import Chunk
from sdonnx_runtime.text.prompt_syntax import Sections

States: TypeAlias = Callable[[Chunk], Array]
"""A text encoder's hidden states of a chunk, (S, C)."""

Chunked: TypeAlias = Callable[[Sections], Sequence[Chunk]]
"""The chunks of a text; of one without any words the one empty chunk."""

Weighting: TypeAlias = Callable[[Sections, Chunked, States], list[Array]]
"""The weighted states of each chunk of a text, (S, C)."""


def _multiplied(text: Sections, chunked: Chunked, states: States) -> list[Array]:
    """AUTOMATIC1111's: states times weights, then times what brings back the mean that they had."""

    def of(chunk: Chunk) -> Array:
        plain = states(chunk)
        if not _weighted(chunk):
            return plain
        weighted = plain * _column(chunk)
        mean = weighted.mean()
        return weighted if mean == 0 else weighted * (plain.mean() / mean)

    return [of(chunk) for chunk in chunked(text)]


def _interpolated(text: Sections, chunked: Chunked, states: States) -> list[Array]:
    """ComfyUI's: from the states of the empty text by as much as the weights say."""

    def of(chunk: Chunk) -> Array:
        plain = states(chunk)
        if not _weighted(chunk):
            return plain
        nothing, weights = states(chunked(((),))[0]), _column(chunk)
        return np.where(weights == 1, plain, nothing + (plain - nothing) * weights)

    return [of(chunk) for chunk in chunked(text)]


def _blended(text: Sections, chunked: Chunked, states: States) -> list[Array]:
    """compel's, with DownweightMode.REMOVE: ComfyUI's, blended with the text without what has a weight below 1."""
    whole = _interpolated(text, chunked, states)
    nothing = states(chunked(((),))[0])
    blend, shares = np.stack(whole), 1.0
    for place, section in enumerate(text):
        for index, fragment in enumerate(section):
            if fragment.weight < 1:
                share = math.tan((1 - max(fragment.weight, 1e-5)) * math.pi / 2)  # 1 at a weight of 0.5
                rest = (*text[:place], (*section[:index], *section[index + 1 :]), *text[place + 1 :])
                without = _interpolated(rest, chunked, states)
                without += [nothing] * (len(whole) - len(without))  # fewer words never take more chunks
                blend = blend + np.float32(share) * np.stack(without)
                shares += share
    return whole if shares == 1 else list(blend / np.float32(shares))


def _weighted(chunk: Chunk) -> bool:
    return any(weight != 1 for weight in chunk.weights)


def _column(chunk: Chunk) -> Array:
    return np.array(chunk.weights, np.float32)[:, None]


WEIGHTINGS: Mapping[str, Weighting] = {"a1111": _multiplied, "comfy": _interpolated, "compel": _blended}
