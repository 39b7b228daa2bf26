"""Samplers with memory: each step also uses what the model gave in the steps before."""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.sampling.types import (
    Denoise,
    NoiseSource,
    Schedule,
    Step,
    adams_bashforth,
    euler_step,
    final_step,
    iter_steps,
    lagrange,
    rescale_to_sigma,
)

FEW = 15
"""Fewer steps than this end at lower order where ``lower_order_final`` is set, as in diffusers."""


def lms(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """Linear multistep of order 4 in sigma; k-diffusion's sample_lms."""
    slopes: list[Array] = []  # latest first
    for i, t, sigma, sigma_next in iter_steps(schedule):
        x0 = denoise(x, sigma, t)
        slopes = [(x - x0) / sigma, *slopes[:3]]
        nodes = [float(schedule.sigmas[i - k]) for k in range(len(slopes))]
        for k, slope in enumerate(slopes):
            integral = np.polyint(lagrange(nodes, k))
            x = x + float(integral(sigma_next) - integral(sigma)) * slope
        yield final_step(schedule, i, x, x0)


def ipndm(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """Adams-Bashforth of order 4 in sigma as if steps were even: arXiv:2202.09778, equation 12, on slopes."""
    slopes: list[Array] = []  # latest first
    for i, t, sigma, sigma_next in iter_steps(schedule):
        x0 = denoise(x, sigma, t)
        slopes = [(x - x0) / sigma, *slopes[:3]]
        x = x + (sigma_next - sigma) * adams_bashforth(slopes)
        yield final_step(schedule, i, x, x0)


def pndm(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """Pseudo linear multistep, arXiv:2202.09778, equation 13, as published with Stable Diffusion (PLMS).

    The first step is taken twice, the second time with the mean of the slopes at its ends.
    """
    outputs: list[Array] = []  # latest first
    for i, t, sigma, sigma_next in iter_steps(schedule):
        x0 = denoise(x, sigma, t)
        outputs = [_model_output(schedule, x, x0, sigma), *outputs[:3]]
        target = float(schedule.targets[i])
        ahead = _along(schedule, x, adams_bashforth(outputs), sigma, target)
        ahead = rescale_to_sigma(ahead, target, sigma_next)
        if i == 0 and schedule.steps > 1:
            source = float(schedule.sources[0])
            there = _model_output(schedule, ahead, denoise(ahead, sigma_next, float(schedule.timesteps[1])), sigma_next)
            ahead = _along(schedule, rescale_to_sigma(x, sigma, source), (there + outputs[0]) / 2, source, sigma_next)
        x = ahead
        yield final_step(schedule, i, x, x0)


def _along(schedule: Schedule, x: Array, output: Array, sigma: float, target: float) -> Array:
    """From sigma to target along the noise that a model output stands for."""
    epsilon = output
    if schedule.prediction_type == "v_prediction":  # arXiv:2202.00512
        epsilon = output / math.hypot(sigma, 1.0) + x * (sigma / (sigma**2 + 1.0))
    return x + (target - sigma) * epsilon


def _model_output(schedule: Schedule, x: Array, x0: Array, sigma: float) -> Array:
    """What the model itself gave, of which `pndm` keeps the history."""
    epsilon = (x - x0) / sigma
    if schedule.prediction_type != "v_prediction":
        return epsilon
    return (epsilon - sigma * x0) / math.hypot(sigma, 1.0)


def deis(
    denoise: Denoise,
    x: Array,
    schedule: Schedule,
    noise: NoiseSource,
    *,
    order: int = 2,
    lower_order_final: bool = True,
) -> Iterator[Step]:
    """Exponential integrator over polynomials in log(sigma), order 1 to 3, arXiv:2204.13902 (log-rho)."""
    slopes: list[Array] = []  # latest first
    for i, t, sigma, sigma_next in iter_steps(schedule):
        x0 = denoise(x, sigma, t)
        slopes = [(x - x0) / sigma, *slopes[: order - 1]]
        reached = _order_here(schedule, i, min(order, len(slopes)), lower_order_final=lower_order_final)
        nodes = [math.log(float(schedule.sigmas[i - k]) / sigma) for k in range(reached)]
        for k, slope in enumerate(slopes[:reached]):
            x = x + sigma * _exponential_integral(lagrange(nodes, k), sigma_next / sigma) * slope
        yield final_step(schedule, i, x, x0)


def _order_here(schedule: Schedule, i: int, order: int, *, lower_order_final: bool) -> int:
    """The order of step i: one to sigma 0, or of no length, is of the first; of few steps the last ones are lower."""
    if schedule.sigmas[i + 1] in (0.0, schedule.sigmas[i]):
        return 1
    left = schedule.steps - i
    return min(order, left) if lower_order_final and schedule.total < FEW else order


def _exponential_integral(polynomial: np.poly1d, ratio: float) -> float:
    """The integral of p(u) e^u over u from 0 to log(ratio), by parts: e^u (p - p' + p'' - …)."""
    total = polynomial
    for k in range(1, polynomial.order + 1):
        total = total + (-1) ** k * polynomial.deriv(k)
    if ratio == 0:
        return -float(total(0.0))
    return ratio * float(total(math.log(ratio))) - float(total(0.0))


def _dpm_solver(
    denoise: Denoise,
    x: Array,
    schedule: Schedule,
    noise: NoiseSource,
    *,
    order: int = 2,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """Multistep DPM-Solver++ of order 1 to 3, arXiv:2211.01095, for the ODE (eta 0) to the SDE (eta 1)."""
    history: list[Array] = []  # latest first
    for i, t, sigma, sigma_next in iter_steps(schedule):
        x0 = denoise(x, sigma, t)
        history = [x0, *history[: order - 1]]
        reached = _order_here(schedule, i, len(history), lower_order_final=lower_order_final)
        if euler_at_final and i == schedule.steps - 1:
            reached = 1
        shrink = (sigma_next / sigma) ** (1 + eta)
        x = shrink * x + (1 - shrink) * x0
        if reached > 1:
            x = x + _curvature(schedule, i, history[:reached], solver_type, eta)
        if eta > 0:
            spread = sigma_next * math.sqrt(1 - (sigma_next / sigma) ** (2 * eta))
            x = x + s_noise * spread * noise(x.shape)
        yield final_step(schedule, i, x, x0)


def _curvature(schedule: Schedule, i: int, history: list[Array], solver_type: str, eta: float) -> Array:
    """What x0's change along the step, extrapolated from the steps before, adds to the first order's step."""
    h = (1 + eta) * math.log(float(schedule.sigmas[i] / schedule.sigmas[i + 1]))
    phi_1 = -math.expm1(-h)
    phi_2 = 1 - phi_1 / h
    first, second = _divided_differences(schedule, i, history)
    if len(history) == 2 and solver_type == "midpoint":
        return 0.5 * phi_1 * first
    return phi_2 * first - (phi_2 / h - 0.5) * second


def _divided_differences(schedule: Schedule, i: int, history: list[Array]) -> tuple[Array, Array]:
    """First and second derivative of x0 by the step's length in log(sigma), the second zero with two x0 alone."""
    now = float(schedule.sigmas[i])
    h = math.log(now / float(schedule.sigmas[i + 1]))
    near = math.log(float(schedule.sigmas[i - 1]) / now) / h
    slope = (history[0] - history[1]) / near
    if len(history) == 2:
        return slope, np.zeros_like(slope)
    far = math.log(float(schedule.sigmas[i - 2] / schedule.sigmas[i - 1])) / h
    bend = (slope - (history[1] - history[2]) / far) / (near + far)
    return slope + near * bend, bend


def dpmpp_2m(
    denoise: Denoise,
    x: Array,
    schedule: Schedule,
    noise: NoiseSource,
    *,
    order: int = 2,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Iterator[Step]:
    """DPM-Solver++(2M), arXiv:2211.01095, algorithm 2; orders 1 and 3 too."""
    solve = partial(_dpm_solver, order=order, solver_type=solver_type, lower_order_final=lower_order_final)
    return solve(denoise, x, schedule, noise, euler_at_final=euler_at_final)


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Array,
    schedule: Schedule,
    noise: NoiseSource,
    *,
    order: int = 2,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M), arXiv:2211.01095, appendix; diffusers' sde-dpmsolver++, with plain noise."""
    solve = partial(_dpm_solver, order=order, solver_type=solver_type, lower_order_final=lower_order_final)
    return solve(denoise, x, schedule, noise, euler_at_final=euler_at_final, eta=eta, s_noise=s_noise)


def dpmpp_3m_sde(
    denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource, *, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Step]:
    """Third order of `dpmpp_2m_sde`; k-diffusion's sample_dpmpp_3m_sde with plain noise."""
    solve = partial(_dpm_solver, order=3, solver_type="heun", lower_order_final=False)
    return solve(denoise, x, schedule, noise, eta=eta, s_noise=s_noise)


def unipc(
    denoise: Denoise,
    x: Array,
    schedule: Schedule,
    noise: NoiseSource,
    *,
    order: int = 2,
    variant: str = "bh2",
    lower_order_final: bool = True,
    uncorrected: Sequence[int] = (),
) -> Iterator[Step]:
    """UniPC of order 1 to 3, arXiv:2302.04867, algorithms 5 and 6, with B_1(h) = h or B_2(h) = e^h - 1.

    ``uncorrected`` are the steps (of all, those left out included) at whose end x is not corrected.
    """
    history: list[Array] = []  # latest first
    start, reached = x, 0
    for i, t, sigma, sigma_next in iter_steps(schedule):
        x0 = denoise(x, sigma, t)
        if i > 0 and schedule.skipped + i - 1 not in uncorrected:
            x = _unified(schedule, i - 1, start, history[:reached], variant, corrected=x0)
        history = [x0, *history[: order - 1]]
        reached = min(len(history), schedule.steps - i) if lower_order_final else len(history)
        reached = 1 if sigma_next in (0.0, sigma) else reached
        start = x
        x = _unified(schedule, i, start, history[:reached], variant)
        yield final_step(schedule, i, x, x0)


def _unified(
    schedule: Schedule, i: int, start: Array, history: list[Array], variant: str, corrected: Array | None = None
) -> Array:
    """Step i from ``start``: UniP, or UniC with the x0 that was found at the step's end."""
    sigma, sigma_next = float(schedule.sigmas[i]), float(schedule.sigmas[i + 1])
    x = euler_step(start, history[0], sigma, sigma_next)
    if sigma_next in (0.0, sigma) or (corrected is None and len(history) == 1):
        return x
    h = math.log(sigma_next / sigma)
    rates = [math.log(float(schedule.sigmas[i - k]) / sigma) / h for k in range(1, len(history))]
    changes = [(before - history[0]) / rate for before, rate in zip(history[1:], rates, strict=True)]
    if corrected is not None:
        changes.append(corrected - history[0])
    scale = h if variant == "bh1" else math.expm1(h)
    weights = _unipc_weights(rates, h, scale, corrects=corrected is not None)
    return x - scale * sum((w * change for w, change in zip(weights, changes, strict=True)), np.zeros_like(x))


def _unipc_weights(rates: list[float], h: float, scale: float, *, corrects: bool) -> list[float]:
    """Solves equation 12 of arXiv:2302.04867; with one unknown 1/2, as published in its code."""
    nodes = [*rates, 1.0] if corrects else rates
    if len(nodes) == 1:
        return [0.5]
    phi, wanted = math.expm1(h) / h - 1, list[float]()
    for k in range(1, len(nodes) + 1):
        wanted.append(phi * math.factorial(k) / scale)
        phi = phi / h - 1 / math.factorial(k + 1)
    powers = np.vander(nodes, increasing=True).T
    return [float(weight) for weight in np.linalg.solve(powers, np.array(wanted))]
