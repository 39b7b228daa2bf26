"""What samplers share: the types they speak in, and the arithmetic of noise levels."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.sampling.sigmas import Sigmas, sigma_to_t

Denoise: TypeAlias = Callable[[Array, float, float], Array]
"""``denoise(x, sigma, t)``: what the model takes the clean x0 to be at noise level sigma, timestep t."""

NoiseSource: TypeAlias = Callable[[tuple[int, ...]], Array]
"""Standard normal numbers of a shape."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a sampler walks along."""

    timesteps: Sigmas
    """(n,): what the model is told at each step's first evaluation."""
    sigmas: Sigmas
    """(n + 1,): the noise level at which each step starts, and the last one that is reached."""
    targets: Sigmas
    """(n,): where each step ends; not ``sigmas[1:]`` where the next evaluation is at another timestep."""
    sources: Sigmas
    """(n,): for pndm, from where a first step is taken anew to reach the next of ``sigmas``."""
    prediction_type: str
    """epsilon, v_prediction or sample."""
    init_scale: float
    """What unit noise is multiplied by to make the first state."""
    final_scale: float
    """What the last state is multiplied by to make the latents."""
    trained: Sigmas
    """(num_train_timesteps,): the noise levels of training, lowest first."""
    skipped: int = 0
    """How many steps were left out at the start."""

    @property
    def steps(self) -> int:
        """How many steps are left to take: n."""
        return len(self.timesteps)

    @property
    def total(self) -> int:
        """How many steps there are with those left out."""
        return self.skipped + self.steps

    def starting_at(self, index: int) -> "Schedule":
        """Without the first ``index`` steps, 0 to `steps`; what starts there is x0 + ``sigmas[0]`` * noise."""
        if not 0 <= index <= self.steps:
            raise ValueError(f"there is no step {index} in a schedule of {self.steps}")
        return replace(
            self,
            timesteps=self.timesteps[index:],
            sigmas=self.sigmas[index:],
            targets=self.targets[index:],
            sources=self.sources[index:],
            skipped=self.skipped + index,
        )

    def timestep(self, sigma: float) -> float:
        """What the model is told at a noise level between those of the steps."""
        return float(sigma_to_t(np.array(sigma), self.trained))


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a sampler, of one evaluation of the model or two."""

    index: int
    """From 0."""
    total: int
    """Steps that are taken in all."""
    x: Array
    """The state after the step."""
    x0: Array
    """The clean state that the model predicted, at the step's first evaluation."""


Sampler: TypeAlias = Callable[..., Iterator[Step]]
"""``sampler(denoise, x, schedule, noise, **options)``; `sampler_options` gives the options."""


def iter_steps(schedule: Schedule) -> Iterator[tuple[int, float, float, float]]:
    """(index, timestep, sigma, next sigma) of each step."""
    for i, t in enumerate(schedule.timesteps):
        yield i, float(t), float(schedule.sigmas[i]), float(schedule.sigmas[i + 1])


def final_step(schedule: Schedule, index: int, x: Array, x0: Array) -> Step:
    """The step that led to x."""
    return Step(index=index, total=schedule.steps, x=x, x0=x0)


def get_ancestral_step(sigma: float, sigma_next: float, eta: float = 1.0) -> tuple[float, float]:
    """(down, up): go down to the first, add noise of the second, and be at ``sigma_next``.

    Equation 16 of arXiv:2010.02502 in terms of sigma; k-diffusion's get_ancestral_step.
    """
    up = eta * sigma_next * math.sqrt(max(1 - (sigma_next / sigma) ** 2, 0.0))
    up = min(up, sigma_next)
    return math.sqrt(sigma_next**2 - up**2), up


def rescale_to_sigma(x: Array, sigma: float, other: float) -> Array:
    """The same variance-preserving state sqrt(alpha) x taken to be at another noise level."""
    return x if sigma == other else x * (math.hypot(other, 1.0) / math.hypot(sigma, 1.0))


def log_midpoint(sigma: float, other: float) -> float:
    """The level half-way in log(sigma)."""
    return math.sqrt(sigma * other)


def euler_step(x: Array, x0: Array, sigma: float, target: float) -> Array:
    """From sigma to target along the slope (x - x0) / sigma; exact where x0 is constant."""
    ratio = target / sigma
    return ratio * x + (1 - ratio) * x0


def lagrange(nodes: Sequence[float], k: int) -> np.poly1d:
    """The polynomial that is 1 at node k and 0 at the others."""
    others = [node for j, node in enumerate(nodes) if j != k]
    basis = np.poly1d(others, r=True) if others else np.poly1d([1.0])
    return basis / math.prod(nodes[k] - node for node in others)


ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Weights of the latest slopes, latest first, by how many there are, for even steps."""


def adams_bashforth(slopes: Sequence[Array]) -> Array:
    """The mean slope of the next step from up to four of those before, latest first."""
    weights = ADAMS_BASHFORTH[len(slopes)]
    return sum((w * slope for w, slope in zip(weights, slopes, strict=True)), np.zeros_like(slopes[0]))
