"""What samplers share: the types they speak in, and the arithmetic of noise levels."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.schedule import Schedule

Denoise: TypeAlias = Callable[[Array, float, float], Array]
"""``denoise(x, sigma, t)``: what the model takes the clean x0 to be at noise level sigma, timestep t."""

NoiseSource: TypeAlias = Callable[[tuple[int, ...]], Array]
"""Standard normal numbers of a shape."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a sampler, of one evaluation of the model or two."""

    index: int
    """From 0."""
    total: int
    """Steps in all."""
    x: Array
    """The state after the step."""
    x0: Array
    """The clean state that the model predicted, at the step's first evaluation."""


Sampler: TypeAlias = Callable[[Denoise, Array, Schedule, NoiseSource], Iterator[Step]]


def levels(schedule: Schedule) -> Iterator[tuple[int, float, float, float]]:
    """(index, timestep, sigma, next sigma) of each step."""
    for i, t in enumerate(schedule.timesteps):
        yield i, float(t), float(schedule.sigmas[i]), float(schedule.sigmas[i + 1])


def finish(schedule: Schedule, index: int, x: Array, x0: Array) -> Step:
    """The step that led to x."""
    return Step(index=index, total=len(schedule.timesteps), x=x, x0=x0)


def ancestral(sigma: float, sigma_next: float) -> tuple[float, float]:
    """(down, up): go down to the first, add noise of the second, and be at ``sigma_next``; k-diffusion, eta 1."""
    up = math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)
    return math.sqrt(sigma_next**2 - up**2), up


def relevel(x: Array, sigma: float, other: float) -> Array:
    """The same variance-preserving state sqrt(alpha) x taken to be at another noise level."""
    return x if sigma == other else x * (math.hypot(other, 1.0) / math.hypot(sigma, 1.0))


def log_midpoint(sigma: float, other: float) -> float:
    """The level half-way in log(sigma)."""
    return math.sqrt(sigma * other)


def exponential_step(x: Array, x0: Array, sigma: float, target: float) -> Array:
    """From sigma to target along constant x0: exact where x0 is; DPM-Solver++ of order 1, arXiv:2211.01095."""
    ratio = target / sigma
    return np.float32(ratio) * x + np.float32(1 - ratio) * x0
