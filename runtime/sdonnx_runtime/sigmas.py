"""Noise levels: those a model was trained with, and the ways to choose few of them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdonnx_runtime.scheduler_config import SchedulerConfig

Levels = NDArray[np.float64]
"""Sigmas or timesteps, (n,)."""


def trained_sigmas(config: SchedulerConfig) -> Levels:
    """The noise levels of training, (num_train_timesteps,), lowest first; in single precision, as published."""
    count, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if start is None or end is None:
        raise ValueError("betas are missing; SchedulerConfig.for_sampler fills them in")
    if config.beta_schedule == "linear":
        betas = np.linspace(start, end, count)
    elif config.beta_schedule == "scaled_linear":
        betas = single(np.linspace(math.sqrt(start), math.sqrt(end), count)) ** 2
    else:  # arXiv:2102.09672, equation 17
        bars = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bars[1:] / bars[:-1], 0.999)
    alphas = single(1 - single(betas))
    products = single(np.cumprod(alphas, dtype=np.float64))
    return single(np.sqrt(single(single(1 - products) / products)))


def timesteps_of(sigmas: Levels, trained: Levels) -> Levels:
    """The timesteps at which a model was trained with such levels, interpolated in log(sigma)."""
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(trained), np.arange(len(trained)))


def karras(lowest: float, highest: float, steps: int) -> Levels:
    """Equation 5 of arXiv:2206.00364 with rho 7: (steps,), highest first."""
    low, high = lowest ** (1 / 7), highest ** (1 / 7)
    return (high + np.linspace(0, 1, steps) * (low - high)) ** 7


def exponential(lowest: float, highest: float, steps: int) -> Levels:
    """Even in log(sigma): (steps,), highest first."""
    return np.exp(np.linspace(math.log(highest), math.log(lowest), steps))


def beta(lowest: float, highest: float, steps: int) -> Levels:
    """Quantiles of the Beta(0.6, 0.6) distribution, arXiv:2407.12173: (steps,), highest first."""
    return lowest + _beta_quantiles(1 - np.linspace(0, 1, steps), 0.6) * (highest - lowest)


def _beta_quantiles(shares: Levels, shape: float) -> Levels:
    """The inverse of the regularised incomplete beta function I(x; a, a), by integration in u = x ** a."""
    u = np.linspace(0, 0.5**shape, 20_001)
    x = u ** (1 / shape)
    density = (1 - x) ** (shape - 1) / shape
    area = np.append(0, np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(u)))
    below = np.interp(np.minimum(shares, 1 - shares), area / area[-1] / 2, u) ** (1 / shape)
    return np.where(shares <= 0.5, below, 1 - below)


RESPACED: Mapping[str, Callable[[float, float, int], Levels]] = {
    "karras": karras,
    "exponential": exponential,
    "beta": beta,
    "lu": exponential,  # arXiv:2206.00927, appendix: even in lambda = -log(sigma)
}
"""Ways to lay levels between the lowest and the highest, whatever the timesteps: ``f(lowest, highest, steps)``."""


def single(values: NDArray[Any]) -> Levels:
    """Rounded to float32, kept as float64."""
    return values.astype(np.float32).astype(np.float64)
