"""How a component is run: whole, split by batch, in stages, in tiles."""

from dataclasses import dataclass

VAE_TILES = (64, 48, 32, 24)
"""Latent cells of the sides of the tiles that a VAE may work on."""


@dataclass(frozen=True, kw_only=True)
class ExecutionStrategy:
    """How a component is run."""

    rows: bool = False
    """One row of what it is given at a time, such as of guidance."""
    staged: bool = False
    """A stage at a time, instead of all of it."""
    kept: frozenset[tuple[str, int]] = frozenset()
    """The stages that stay open, by their graph's file and their place in it."""
    frugal: bool = False
    """Letting go of every buffer at once."""
    tile: int | None = None
    """Latent cells of the sides of what it works on at a time, but in `open_model` places; None is all."""


MIN_MEMORY = ExecutionStrategy(rows=True, staged=True, frugal=True, tile=VAE_TILES[-1])
"""What takes the least memory of what there is no plan for, and the most time."""
