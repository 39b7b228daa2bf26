"""Helpers for the keys of the original single-file layout."""

import re
from collections.abc import Iterable, Mapping

from sdonnx_export.checkpoint_model import Weight

Weights = Mapping[str, Weight]


def with_prefix(weights: Weights, prefix: str) -> dict[str, Weight]:
    """Return the weights whose keys begin with ``prefix``, by the rest of the key."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


_CLIP_G = "text_encoders.clip_g."
_PREFIXES = {
    "vae.": "first_stage_model.",
    f"{_CLIP_G}transformer.": "conditioner.embedders.1.model.",
    _CLIP_G: "conditioner.embedders.1.model.",
}
"""Prefixes that diffusers reads and ComfyUI writes, and those of the original layout."""


def original_prefixes(weights: Weights) -> dict[str, Weight]:
    """Return a file's weights under the prefixes of the original layout.

    The first text encoder's is that of Stable Diffusion XL if the file has a second one, else of Stable Diffusion 1.
    """
    is_xl = any(name.startswith(_CLIP_G) for name in weights)
    first = "conditioner.embedders.0." if is_xl else "cond_stage_model."
    prefixes = {**_PREFIXES, "text_encoders.clip_l.": first}
    renamed: dict[str, Weight] = {}
    for name, weight in weights.items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        renamed[prefixes.get(old, "") + name.removeprefix(old)] = weight
    return renamed


def count(names: Iterable[str], pattern: str) -> int:
    """Count the items of a list among keys: one more than the highest index that group 1 of ``pattern`` matches."""
    matches = (re.match(pattern, name) for name in names)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def apply_renames(name: str, replacements: Iterable[tuple[str, str]]) -> str:
    """Apply all replacements to a key, one after another."""
    for pattern, new in replacements:
        name = re.sub(pattern, new, name)
    return name
