"""Types and sigma arithmetic that the samplers share."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.sampling.sigmas import Sigmas, sigma_to_t

Denoise: TypeAlias = Callable[[Array, float, float], Array]
"""``denoise(x, sigma, t)``: the x0 that the model predicts for x at sigma and timestep t."""

NoiseSource: TypeAlias = Callable[[tuple[int, ...]], Array]
"""``noise(shape)``: standard normal numbers, float32."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The timesteps and sigmas of a sampling loop of n steps."""

    timesteps: Sigmas
    """(n,): the model's timestep at each step's first evaluation."""
    sigmas: Sigmas
    """(n + 1,): the sigma at which each step starts, and the last one that is reached."""
    sigmas_to: Sigmas
    """(n,): the sigma at which each step ends; not ``sigmas[1:]`` where the next evaluation is at another timestep."""
    repeat_sigmas: Sigmas
    """(n,): for pndm, the sigma from which a first step is repeated to reach the next of ``sigmas``."""
    prediction_type: str = "epsilon"
    """epsilon, v_prediction or sample."""
    init_scale: float = 1.0
    """Factor from unit noise to the first state."""
    output_scale: float = 1.0
    """Factor from the last state to the latents."""
    train_sigmas: Sigmas
    """(num_train_timesteps,): the sigmas of training, lowest first."""
    start_index: int = 0
    """How many steps img2img skips at the start."""

    @classmethod
    def from_sigmas(cls, sigmas: Sigmas, **fields: Any) -> "Schedule":
        """Make a schedule in which each step ends where the next begins; ``fields`` are the others."""
        return cls(sigmas=sigmas, sigmas_to=sigmas[1:], repeat_sigmas=sigmas[:-1], **fields)

    @property
    def steps(self) -> int:
        """The number of steps to take: n."""
        return len(self.timesteps)

    @property
    def total(self) -> int:
        """The number of steps, skipped ones included."""
        return self.start_index + self.steps

    def starting_at(self, index: int) -> "Schedule":
        """Skip the first ``index`` steps, 0 to `steps`; the state there is x0 + ``sigmas[0]`` * noise."""
        if not 0 <= index <= self.steps:
            raise ValueError(f"step {index} is not in a schedule of {self.steps} steps")
        return replace(
            self,
            timesteps=self.timesteps[index:],
            sigmas=self.sigmas[index:],
            sigmas_to=self.sigmas_to[index:],
            repeat_sigmas=self.repeat_sigmas[index:],
            start_index=self.start_index + index,
        )

    def timestep(self, sigma: float) -> float:
        """The model's timestep for a sigma between those of the steps."""
        return float(sigma_to_t(np.array(sigma), self.train_sigmas))


@dataclass(frozen=True, kw_only=True)
class Step:
    """One sampler step, of one or two model evaluations."""

    index: int
    """From 0."""
    total: int
    """The number of steps in all."""
    x: Array
    """The state after the step."""
    x0: Array
    """The x0 predicted at the step's first evaluation."""


Sampler: TypeAlias = Callable[..., Iterator[Step]]
"""``sampler(denoise, x, schedule, noise, **options)``; `sampler_options` gives the options."""


def iter_steps(schedule: Schedule) -> Iterator[tuple[int, float, float, float]]:
    """Yield (index, timestep, sigma, next sigma) of each step."""
    for i, t in enumerate(schedule.timesteps):
        yield i, float(t), float(schedule.sigmas[i]), float(schedule.sigmas[i + 1])


def make_step(schedule: Schedule, index: int, x: Array, x0: Array) -> Step:
    """Make the `Step` that ended in x."""
    return Step(index=index, total=schedule.steps, x=x, x0=x0)


def get_ancestral_step(sigma: float, sigma_next: float, eta: float = 1.0) -> tuple[float, float]:
    """Get (sigma_down, sigma_up): a step to the first plus noise of the second arrives at ``sigma_next``.

    Equation 16 of arXiv:2010.02502 in terms of sigma; k-diffusion's get_ancestral_step.
    """
    up = eta * sigma_next * math.sqrt(max(1 - (sigma_next / sigma) ** 2, 0.0))
    up = min(up, sigma_next)
    return math.sqrt(sigma_next**2 - up**2), up


def rescale_to_sigma(x: Array, sigma: float, other: float) -> Array:
    """Rescale x so that the variance-preserving state sqrt(alpha) x stays the same at another sigma."""
    return x if sigma == other else x * (math.hypot(other, 1.0) / math.hypot(sigma, 1.0))


def log_midpoint(sigma: float, other: float) -> float:
    """The sigma half-way in log(sigma)."""
    return math.sqrt(sigma * other)


def euler_step(x: Array, x0: Array, sigma: float, target: float) -> Array:
    """Step from sigma to target along the slope (x - x0) / sigma; exact where x0 is constant."""
    ratio = target / sigma
    return ratio * x + (1 - ratio) * x0


def lagrange(nodes: Sequence[float], k: int) -> np.poly1d:
    """The Lagrange basis polynomial: 1 at node k, 0 at the other nodes."""
    others = [node for j, node in enumerate(nodes) if j != k]
    basis = np.poly1d(others, r=True) if others else np.poly1d([1.0])
    return basis / math.prod(nodes[k] - node for node in others)


ADAMS_BASHFORTH = {
    1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}  # fmt: skip
"""Weights of the latest slopes, latest first, by the number of slopes, for even steps."""


def adams_bashforth(slopes: Sequence[Array]) -> Array:
    """The mean slope of the next step from the last one to four slopes, latest first."""
    weights = ADAMS_BASHFORTH[len(slopes)]
    return sum((w * slope for w, slope in zip(weights, slopes, strict=True)), np.zeros_like(slopes[0]))
