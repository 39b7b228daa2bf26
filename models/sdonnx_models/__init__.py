"""The bundled model, and recipes for exporting well-known published checkpoints."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT = "pictogram"
"""The bundled model that ``sdonnx run`` uses by default."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to export and use a published checkpoint: ``recipes/NAME.toml``."""

    name: str
    title: str
    source: str
    """Hub id."""
    vae: str | None = None
    """Hub id of a VAE that replaces the checkpoint's own."""
    family: str
    licence: str
    size: int
    """Width and height, pixels."""
    num_inference_steps: int
    guidance_scale: float
    sampler: str | None = None
    """None is the sampler of the checkpoint's scheduler config."""
    package_gb: Mapping[str, float]
    """Size of the package by precision, 10**9 bytes."""
    memory_gb: Mapping[str, float] = field(default_factory=dict[str, float])
    """Peak memory of generating an image on a CPU by precision, 2**30 bytes, if measured."""

    @property
    def defaults(self) -> dict[str, Any]:
        """The ``defaults`` of the package's manifest."""
        names = ("size", "num_inference_steps", "guidance_scale", "sampler")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def bundled() -> dict[str, Path]:
    """Return the directories of the bundled packages by name."""
    return {path.parent.name: path.parent for path in sorted(_root().glob("*/sdonnx.json"))}


def recipes() -> dict[str, Recipe]:
    """Read the recipes, by name."""
    return {
        path.stem: Recipe(name=path.stem, **tomllib.loads(path.read_text(encoding="utf-8")))
        for path in sorted(_root().glob("recipes/*.toml"))
    }


def _root() -> Path:
    return Path(str(files(__name__)))
