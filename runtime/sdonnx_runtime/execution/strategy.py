"""How components are run, and what that sets for the whole process."""

from collections.abc import Mapping
from dataclasses import dataclass, field

VAE_TILES = (64, 48, 32, 24)
"""Sides of VAE tiles to choose from, in latent pixels."""

UPSCALER_TILES = (512, 384, 256, 192, 128)
"""Sides of an upscaler's tiles to choose from, in pixels of its input, what they overlap included."""


@dataclass(frozen=True, kw_only=True)
class ExecutionStrategy:
    """How a component is run; by default whole."""

    split_batch: bool = False
    """Run one batch entry at a time, if results are bit-identical."""
    staged: bool = False
    """Open and run one stage of the graph after another."""
    resident_stages: frozenset[tuple[str, int]] = frozenset()
    """The stages that stay open once they are: the names of their graphs' files, and their indices."""
    no_arena: bool = False
    """Take each buffer from the system and return it at once, instead of from the arena that sessions share."""
    tile: int | None = None
    """The side of tiles: of a VAE in latent pixels, where None runs it on the whole image; of an upscaler in pixels of
    its input, where None is the largest of UPSCALER_TILES."""
    one_size: bool = False
    """Keep the session of the last sizes alone, on a device that opens one for each size of its inputs."""
    circular: str = ""
    """The axes of images, x, y or xy, along which convolutions pad with the opposite border; empty pads with zeros."""


MIN_MEMORY = ExecutionStrategy(split_batch=True, staged=True, no_arena=True, tile=VAE_TILES[-1])
"""The least memory for graphs that can't be planned for, and the most time."""


@dataclass(frozen=True, kw_only=True)
class ExecutionPlan:
    """The strategies of all components, and the settings of the process and the device that go with them."""

    strategies: Mapping[str, ExecutionStrategy] = field(default_factory=lambda: dict[str, ExecutionStrategy]())
    """By component."""
    default: ExecutionStrategy = ExecutionStrategy()
    """Of components that are not in ``strategies``."""
    arena_region: int | None = None
    """Bytes that the CPU arena first asks the system for, for which memory was predicted; None if it wasn't."""
    return_buffers: bool = True
    """Whether glibc's malloc returns buffers of 256 KiB and more to the system as soon as they are free."""
    keep_loaded: bool = False
    """Whether components stay loaded for the next generation."""
    device_limit: int | None = None
    """Bytes that a device with memory of its own may use; None is no limit."""
    avoided: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
    """Why the device ``auto`` leaves out a device, by its name."""
