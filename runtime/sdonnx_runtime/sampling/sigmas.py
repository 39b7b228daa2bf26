"""Sigmas: those that a model was trained with, and schedules that choose a few of them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdonnx_runtime.sampling.scheduler_config import SchedulerConfig

Sigmas = NDArray[np.float64]
"""Sigmas or timesteps, (n,)."""


def training_sigmas(config: SchedulerConfig) -> Sigmas:
    """The sigmas of training, (num_train_timesteps,), lowest first; in single precision, as published."""
    alphas = round_to_float32(1 - _betas(config))
    if config.terminal_alpha is not None:
        alphas = rescale_zero_terminal_snr(alphas)
    products = round_to_float32(np.cumprod(alphas))
    if config.terminal_alpha is not None:
        products[-1] = config.terminal_alpha
    return round_to_float32(np.sqrt(round_to_float32(round_to_float32(1 - products) / products)))


def _betas(config: SchedulerConfig) -> Sigmas:
    count, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.trained_betas is not None:
        return round_to_float32(np.array(config.trained_betas))
    if start is None or end is None:
        raise ValueError("beta_start and beta_end are missing; SchedulerConfig.for_sampler fills them in")
    if config.beta_schedule == "linear":
        return _linspace(start, end, count)
    if config.beta_schedule == "scaled_linear":
        return round_to_float32(_linspace(math.sqrt(start), math.sqrt(end), count) ** 2)
    angles = (np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2  # arXiv:2102.09672, equation 17
    bars: Sigmas = np.cos(angles) ** 2
    return round_to_float32(np.minimum(1 - bars[1:] / bars[:-1], 0.999))


def _linspace(start: float, end: float, count: int) -> Sigmas:
    """torch.linspace in single precision, bit for bit: from both ends to the middle, rounded once."""
    low, high = np.float32(start), np.float32(end)
    step = float((high - low) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    return round_to_float32(
        np.where(index < count // 2, float(low) + step * index, float(high) - step * (count - 1 - index))
    )


def rescale_zero_terminal_snr(alphas: Sigmas) -> Sigmas:
    """Rescale alphas so that their product ends at zero: algorithm 1 of arXiv:2305.08891."""
    roots = round_to_float32(np.sqrt(round_to_float32(np.cumprod(alphas))))
    scale = round_to_float32(roots[0] / round_to_float32(roots[0] - roots[-1]))
    products = round_to_float32(round_to_float32(round_to_float32(roots - roots[-1]) * scale) ** 2)
    betas = round_to_float32(1 - np.append(products[:1], round_to_float32(products[1:] / products[:-1])))
    return round_to_float32(1 - betas)


def sigma_to_t(sigmas: Sigmas, train_sigmas: Sigmas) -> Sigmas:
    """Convert sigmas to timesteps, interpolated in log(sigma).

    Logarithms of training sigmas are in single precision and the rest in double, as in diffusers: it truncates some
    of these timesteps, which otherwise would differ by one at training sigmas.
    """
    logs = np.log(train_sigmas.astype(np.float32))
    log_sigmas = np.log(np.maximum(sigmas, 1e-10))
    index = np.clip(np.searchsorted(logs, log_sigmas, side="right") - 1, 0, len(logs) - 2)
    low, high = logs[index], logs[index + 1]
    fraction = np.clip((low - log_sigmas) / (low - high), 0, 1)
    return (1 - fraction) * index + fraction * (index + 1)


def t_to_sigma(timesteps: Sigmas, train_sigmas: Sigmas) -> Sigmas:
    """Convert timesteps to sigmas, interpolated in log(sigma): the inverse of `sigma_to_t`."""
    return np.exp(np.interp(timesteps, np.arange(len(train_sigmas)), np.log(train_sigmas)))


def karras(lowest: float, highest: float, steps: int) -> Sigmas:
    """Equation 5 of arXiv:2206.00364 with rho 7: (steps,), highest first."""
    low, high = lowest ** (1 / 7), highest ** (1 / 7)
    return (high + np.linspace(0, 1, steps) * (low - high)) ** 7


def exponential(lowest: float, highest: float, steps: int) -> Sigmas:
    """Even in log(sigma): (steps,), highest first."""
    return np.exp(np.linspace(math.log(highest), math.log(lowest), steps))


def beta(lowest: float, highest: float, steps: int) -> Sigmas:
    """Quantiles of the Beta(0.6, 0.6) distribution, arXiv:2407.12173: (steps,), highest first."""
    return lowest + _beta_quantiles(1 - np.linspace(0, 1, steps), 0.6) * (highest - lowest)


def _beta_quantiles(probabilities: Sigmas, shape: float) -> Sigmas:
    """The inverse of the regularised incomplete beta function I(x; a, a), by integration in u = x ** a."""
    u = np.linspace(0, math.pow(0.5, shape), 20_001)
    x = u ** (1 / shape)
    density = (1 - x) ** (shape - 1) / shape
    area = np.append(0, np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(u)))
    below = np.interp(np.minimum(probabilities, 1 - probabilities), area / area[-1] / 2, u) ** (1 / shape)
    return np.where(probabilities <= 0.5, below, 1 - below)


def simple(train_sigmas: Sigmas, steps: int) -> Sigmas:
    """Every (num_train_timesteps / steps)-th training timestep from the highest, as ComfyUI's simple."""
    count = len(train_sigmas)
    return count - 1 - np.trunc(np.arange(steps) * (count / steps))


def sgm_uniform(train_sigmas: Sigmas, steps: int) -> Sigmas:
    """Even in timesteps, spaced as for one step more, as in Stability's generative-models."""
    return np.linspace(len(train_sigmas) - 1, 0, steps + 1)[:-1]


def _ays(published: tuple[float, ...]) -> Callable[[Sigmas, int], Sigmas]:
    """Align Your Steps, arXiv:2404.14507: sigmas for 10 steps, for other counts interpolated in log(sigma)."""

    def timesteps(train_sigmas: Sigmas, steps: int) -> Sigmas:
        fraction = np.linspace(0, 1, steps + 1)[:-1]
        sigmas = np.exp(np.interp(fraction, np.linspace(0, 1, len(published)), np.log(published)))
        return sigma_to_t(sigmas, train_sigmas)

    return timesteps


AYS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
"""For Stable Diffusion 1.5: research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html."""
AYS_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
"""For SDXL; the same page."""

SIGMA_RANGE_SCHEDULES: Mapping[str, Callable[[float, float, int], Sigmas]] = {
    "karras": karras,
    "exponential": exponential,
    "beta": beta,
    "lu": exponential,  # arXiv:2206.00927, appendix: even in lambda = -log(sigma)
}
"""Schedules between the lowest and the highest sigma: ``f(lowest, highest, steps)``, highest first."""

TIMESTEP_SCHEDULES: Mapping[str, Callable[[Sigmas, int], Sigmas]] = {
    "simple": simple, "sgm_uniform": sgm_uniform, "ays": _ays(AYS), "ays_sdxl": _ays(AYS_SDXL),
}  # fmt: skip
"""Schedules of training timesteps: ``f(train_sigmas, steps)``, highest first."""

SCHEDULES = (*SIGMA_RANGE_SCHEDULES, *TIMESTEP_SCHEDULES)
"""The names of all schedules other than a scheduler class's own."""


def round_to_float32(values: NDArray[Any]) -> Sigmas:
    """Round to float32, in float64."""
    return values.astype(np.float32).astype(np.float64)
