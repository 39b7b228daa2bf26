"""The times of a generation."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Timings:
    """The times of a generation, in seconds."""

    load: Mapping[str, float] = field(default_factory=lambda: dict[str, float]())
    """Opening each component."""
    run: Mapping[str, float] = field(default_factory=lambda: dict[str, float]())
    """Running each component, over all its calls."""
    steps: tuple[float, ...] = ()
    """Each denoising step, image after image."""
