"""Samplers: generators that take a state from noise to a picture, a step at a time.

Each is a function ``sampler(denoise, x, schedule, noise)`` over states x = x0 + sigma * noise, (B, C, h, w) in
float32, and yields a `Step` after each evaluation of the model. Whoever stops iterating has cancelled.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.schedule import Schedule

Denoise: TypeAlias = Callable[[Array, float, float], Array]
"""``denoise(x, sigma, t)``: what the model takes the clean x0 to be at noise level sigma, timestep t."""

NoiseSource: TypeAlias = Callable[[tuple[int, ...]], Array]
"""Standard normal numbers of a shape."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One evaluation of the model and what became of the state."""

    index: int
    """From 0."""
    total: int
    """Evaluations in all."""
    x: Array
    """The state after the step."""
    x0: Array
    """The clean state that the model predicted before it."""


Sampler: TypeAlias = Callable[[Denoise, Array, Schedule, NoiseSource], Iterator[Step]]


def euler(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """Euler's method, Karras et al. 2022, arXiv:2206.00364, algorithm 2 without churn."""
    for i, t, sigma, sigma_next in _levels(schedule):
        x0 = denoise(x, sigma, t)
        x = x + (sigma_next - sigma) * ((x - x0) / sigma)
        yield _step(schedule, i, x, x0)


def euler_ancestral(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """Euler's method to a lower level, then noise up to the next; k-diffusion's sample_euler_ancestral."""
    for i, t, sigma, sigma_next in _levels(schedule):
        x0 = denoise(x, sigma, t)
        up = math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)
        down = math.sqrt(sigma_next**2 - up**2)
        x = x + (down - sigma) * ((x - x0) / sigma) + up * noise(x.shape)
        yield _step(schedule, i, x, x0)


def lms(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """Linear multistep of order 4 in sigma; k-diffusion's sample_lms."""
    slopes: list[Array] = []  # latest first
    for i, t, sigma, sigma_next in _levels(schedule):
        x0 = denoise(x, sigma, t)
        slopes = [(x - x0) / sigma, *slopes[:3]]
        nodes = [float(schedule.sigmas[i - k]) for k in range(len(slopes))]
        for k, slope in enumerate(slopes):
            x = x + _lagrange_integral(nodes, k, sigma, sigma_next) * slope
        yield _step(schedule, i, x, x0)


def ddim(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """Denoising diffusion implicit models, arXiv:2010.02502, equation 12 with eta 0."""
    for i, t, sigma, sigma_next in _levels(schedule):
        x0 = denoise(x, sigma, t)
        target = float(schedule.targets[i])
        x = _relevel(x0 + target * ((x - x0) / sigma), target, sigma_next)
        yield _step(schedule, i, x, x0)


def pndm(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """Pseudo linear multistep, arXiv:2202.09778, equation 13, as published with Stable Diffusion (PLMS)."""
    outputs: list[Array] = []  # latest first
    start = x
    for i, t, sigma, sigma_next in _levels(schedule):
        x0 = denoise(x, sigma, t)
        output = _model_output(schedule, x, x0, sigma)
        if i == 1:  # the first step once more, with the mean of the slopes at its ends
            x, output = start, (output + outputs[0]) / 2
        else:
            outputs = [output, *outputs[:3]]
            weights = _ADAMS_BASHFORTH[len(outputs)]
            output = sum((w * o for w, o in zip(weights, outputs, strict=True)), np.zeros_like(x))
        source, target = float(schedule.sources[i]), float(schedule.targets[i])
        x = _relevel(x, sigma if i != 1 else float(schedule.sigmas[0]), source)
        x = x + (target - source) * _epsilon(schedule, x, output, source)
        x = _relevel(x, target, sigma_next)
        yield _step(schedule, i, x, x0)


_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def dpmpp_2m(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """DPM-Solver++(2M), arXiv:2211.01095, algorithm 2; the last step is of first order where few are taken."""
    total = len(schedule.timesteps)
    before: Array | None = None
    for i, t, sigma, sigma_next in _levels(schedule):
        x0 = denoise(x, sigma, t)
        ratio = sigma_next / sigma
        x = ratio * x + (1 - ratio) * x0
        if before is not None and sigma_next > 0 and not (i == total - 1 and total < 15):
            h, h_before = math.log(sigma / sigma_next), math.log(float(schedule.sigmas[i - 1]) / sigma)
            x = x + 0.5 * (1 - ratio) * (h / h_before) * (x0 - before)
        before = x0
        yield _step(schedule, i, x, x0)


SAMPLERS: Mapping[str, Sampler] = {
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "lms": lms,
    "pndm": pndm,
}


def resolve_sampler(name: str) -> str:
    """The key of SAMPLERS that ``name`` is.

    Raises:
        RequestError: it is none; the nearest is offered.
    """
    if name in SAMPLERS:
        return name
    nearest = difflib.get_close_matches(str(name), SAMPLERS, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise RequestError(f"there is no sampler '{name}'; {hint}choose from {', '.join(SAMPLERS)}")


def _levels(schedule: Schedule) -> Iterator[tuple[int, float, float, float]]:
    """(index, timestep, sigma, next sigma) of each evaluation."""
    for i, t in enumerate(schedule.timesteps):
        yield i, float(t), float(schedule.sigmas[i]), float(schedule.sigmas[i + 1])


def _step(schedule: Schedule, index: int, x: Array, x0: Array) -> Step:
    return Step(index=index, total=len(schedule.timesteps), x=x, x0=x0)


def _relevel(x: Array, sigma: float, other: float) -> Array:
    """The same variance-preserving state sqrt(alpha) x taken to be at another noise level."""
    return x if sigma == other else x * (math.hypot(other, 1.0) / math.hypot(sigma, 1.0))


def _model_output(schedule: Schedule, x: Array, x0: Array, sigma: float) -> Array:
    """What the model itself gave, of which multistep methods keep the history."""
    epsilon = (x - x0) / sigma
    if schedule.prediction_type != "v_prediction":
        return epsilon
    return (epsilon - sigma * x0) / math.hypot(sigma, 1.0)  # arXiv:2202.00512


def _epsilon(schedule: Schedule, x: Array, output: Array, sigma: float) -> Array:
    """The noise in x according to a model output."""
    if schedule.prediction_type != "v_prediction":
        return output
    return output / math.hypot(sigma, 1.0) + x * (sigma / (sigma**2 + 1.0))


def _lagrange_integral(nodes: list[float], k: int, start: float, end: float) -> float:
    """The integral from start to end of the polynomial that is 1 at node k and 0 at the others."""
    others = [node for j, node in enumerate(nodes) if j != k]
    basis = np.poly1d(others, r=True) if others else np.poly1d([1.0])
    integral = np.polyint(basis / np.prod([nodes[k] - node for node in others]))
    return float(integral(end) - integral(start))
