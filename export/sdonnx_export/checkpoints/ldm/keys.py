"""Helpers for the keys of the original single-file layout."""

import re
from collections.abc import Iterable, Mapping

from sdonnx_export.checkpoint_model import Weight

Weights = Mapping[str, Weight]


def with_prefix(weights: Weights, prefix: str) -> dict[str, Weight]:
    """Return the weights whose keys begin with ``prefix``, by the rest of the key."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def count(names: Iterable[str], pattern: str) -> int:
    """Count the items of a list among keys: one more than the highest index that group 1 of ``pattern`` matches."""
    matches = (re.match(pattern, name) for name in names)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def apply_renames(name: str, replacements: Iterable[tuple[str, str]]) -> str:
    """Apply all replacements to a key, one after another."""
    for pattern, new in replacements:
        name = re.sub(pattern, new, name)
    return name
