"""Helpers for the keys of the original single-file layout."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from sdonnx_export.checkpoint_model import Weight

Weights = Mapping[str, Weight]


def with_prefix(weights: Weights, prefix: str) -> dict[str, Weight]:
    """Return the weights whose keys begin with ``prefix``, by the rest of the key."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


_CLIP_G = "text_encoders.clip_g."
_FIRST, _SECOND = "cond_stage_model.transformer.", "cond_stage_model.1.transformer."
"""Prefixes of the text encoders that stable-diffusion.cpp writes for every family."""

_PREFIXES = {
    "vae.": "first_stage_model.",
    f"{_CLIP_G}transformer.": "conditioner.embedders.1.model.",
    _CLIP_G: "conditioner.embedders.1.model.",
    _SECOND: "conditioner.embedders.1.model.",
}
"""Prefixes that diffusers reads and ComfyUI or stable-diffusion.cpp write, and those of the original layout."""

CLIP_WIDTH = 768
"""Channels of OpenAI's CLIP, the text encoder of Stable Diffusion 1; OpenCLIP's are wider."""


def original_prefixes(weights: Weights) -> dict[str, Weight]:
    """Return a file's weights under the prefixes of the original layout.

    The first text encoder's is that of Stable Diffusion XL if the file has a second one, else of Stable Diffusion 1.
    """
    is_xl = any(name.startswith((_CLIP_G, _SECOND)) for name in weights)
    first = "conditioner.embedders.0." if is_xl else "cond_stage_model."
    prefixes = {**_PREFIXES, "text_encoders.clip_l.": first, _FIRST: _first_prefix(weights, is_xl=is_xl)}
    renamed: dict[str, Weight] = {}
    for name, weight in weights.items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        renamed[prefixes.get(old, "") + name.removeprefix(old)] = weight
    return renamed


def _first_prefix(weights: Weights, *, is_xl: bool) -> str:
    """Return the original layout's prefix of what lies under `_FIRST`: there it is that of Stable Diffusion 1."""
    if is_xl:
        return "conditioner.embedders.0.transformer."
    embedding = weights.get(f"{_FIRST}text_model.embeddings.token_embedding.weight")
    if embedding is None or embedding.shape[-1:] <= (CLIP_WIDTH,):
        return _FIRST
    is_refiner = "model.diffusion_model.label_emb.0.0.weight" in weights
    return "conditioner.embedders.0.model." if is_refiner else "cond_stage_model.model."


def count(names: Iterable[str], pattern: str) -> int:
    """Count the items of a list among keys: one more than the highest index that group 1 of ``pattern`` matches."""
    matches = (re.match(pattern, name) for name in names)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def as_linear(weight: Weight) -> Weight:
    """Return the weight of a 1x1 convolution as a linear layer's; any other as it is."""
    shape = weight.shape[:2]
    if len(weight.shape) < 3 or math.prod(weight.shape[2:]) != 1:
        return weight
    return replace(weight, shape=shape, read=lambda: weight.read().reshape(shape))


def apply_renames(name: str, replacements: Iterable[tuple[str, str]]) -> str:
    """Apply all replacements to a key, one after another."""
    for pattern, new in replacements:
        name = re.sub(pattern, new, name)
    return name
