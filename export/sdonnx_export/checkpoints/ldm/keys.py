"""What reading the original single-file layout takes of weights' names."""

import re
from collections.abc import Iterable, Mapping

from sdonnx_export.checkpoint_model import Weight

Weights = Mapping[str, Weight]


def with_prefix(weights: Weights, prefix: str) -> dict[str, Weight]:
    """The weights whose names begin with ``prefix``, by the rest of them."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def count(names: Iterable[str], pattern: str) -> int:
    """How many numbers ``pattern`` finds, counting from 0."""
    found = (re.match(pattern, name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def apply_renames(name: str, replacements: Iterable[tuple[str, str]]) -> str:
    """A name after all replacements, one after another."""
    for pattern, new in replacements:
        name = re.sub(pattern, new, name)
    return name
