"""Multistep samplers: each step also uses model outputs of earlier steps."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.sampling.types import (
    Denoise,
    NoiseSource,
    Schedule,
    Step,
    adams_bashforth,
    euler_step,
    iter_steps,
    lagrange,
    make_step,
    rescale_to_sigma,
)

LOWER_ORDER_FINAL_BELOW = 15
"""Schedules of fewer steps end at lower order where ``lower_order_final`` is set, as in diffusers."""


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
        yield make_step(schedule, i, x, x0)


def ipndm(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """Adams-Bashforth of order 4 in sigma as if steps were even: arXiv:2202.09778, equation 12, on slopes."""
    slopes: list[Array] = []  # latest first
    for i, t, sigma, sigma_next in iter_steps(schedule):
        x0 = denoise(x, sigma, t)
        slopes = [(x - x0) / sigma, *slopes[:3]]
        x = x + (sigma_next - sigma) * adams_bashforth(slopes)
        yield make_step(schedule, i, x, x0)


def pndm(
    denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource, *, runge_kutta: bool = False
) -> Iterator[Step]:
    """Pseudo linear multistep, arXiv:2202.09778, equation 13.

    With ``runge_kutta`` the first three steps are pseudo Runge-Kutta steps of four evaluations. Without, as published
    with Stable Diffusion (PLMS), the first step is repeated with the mean of the slopes at its ends.
    """
    outputs: list[Array] = []  # latest first
    for i, t, sigma, sigma_next in iter_steps(schedule):
        x0 = denoise(x, sigma, t)
        outputs = [_model_output(schedule, x, x0, sigma), *outputs[:3]]
        if runge_kutta and i < min(3, schedule.steps - 1):
            x = _runge_kutta_step(denoise, x, schedule, i, outputs[0])
            yield make_step(schedule, i, x, x0)
            continue
        target = float(schedule.sigmas_to[i])
        ahead = _transfer(schedule, x, adams_bashforth(outputs), sigma, target)
        ahead = rescale_to_sigma(ahead, target, sigma_next)
        if i == 0 and schedule.steps > 1:
            source = float(schedule.repeat_sigmas[0])
            other = _model_output(schedule, ahead, denoise(ahead, sigma_next, float(schedule.timesteps[1])), sigma_next)
            start = rescale_to_sigma(x, sigma, source)
            ahead = _transfer(schedule, start, (other + outputs[0]) / 2, source, sigma_next)
        x = ahead
        yield make_step(schedule, i, x, x0)


def _runge_kutta_step(denoise: Denoise, x: Array, schedule: Schedule, i: int, output: Array) -> Array:
    """Take step i from the model's ``output`` at its start: arXiv:2202.09778, equation 14."""
    sigma, sigma_next = float(schedule.sigmas[i]), float(schedule.sigmas[i + 1])
    t, t_next = int(schedule.timesteps[i]), int(schedule.timesteps[i + 1])
    half = len(schedule.train_sigmas) // schedule.total // 2
    middle, outputs = t_next + half, [output]
    for target, evaluated in ((t - half, middle), (middle, middle), (t_next, t_next)):
        to, at = float(schedule.train_sigmas[target]), float(schedule.train_sigmas[evaluated])
        ahead = rescale_to_sigma(_transfer(schedule, x, outputs[-1], sigma, to), to, at)
        outputs.append(_model_output(schedule, ahead, denoise(ahead, at, float(evaluated)), at))
    mean = (outputs[0] + 2 * outputs[1] + 2 * outputs[2] + outputs[3]) / 6
    return _transfer(schedule, x, mean, sigma, sigma_next)


def _transfer(schedule: Schedule, x: Array, output: Array, sigma: float, target: float) -> Array:
    """Step from sigma to target along the noise that a model output predicts."""
    epsilon = output
    if schedule.prediction_type == "v_prediction":  # arXiv:2202.00512
        epsilon = output / math.hypot(sigma, 1.0) + x * (sigma / (sigma**2 + 1.0))
    return x + (target - sigma) * epsilon


def _model_output(schedule: Schedule, x: Array, x0: Array, sigma: float) -> Array:
    """Convert x0 back to the model's own output, which `pndm` keeps in its history."""
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
        current_order = _step_order(schedule, i, min(order, len(slopes)), lower_order_final=lower_order_final)
        nodes = [math.log(float(schedule.sigmas[i - k]) / sigma) for k in range(current_order)]
        for k, slope in enumerate(slopes[:current_order]):
            x = x + sigma * _exponential_integral(lagrange(nodes, k), sigma_next / sigma) * slope
        yield make_step(schedule, i, x, x0)


def _step_order(schedule: Schedule, i: int, order: int, *, lower_order_final: bool) -> int:
    """The order of step i: 1 for a step to sigma 0 or of no length; lower at the end of a short schedule."""
    if schedule.sigmas[i + 1] in (0.0, schedule.sigmas[i]):
        return 1
    left = schedule.steps - i
    return min(order, left) if lower_order_final and schedule.total < LOWER_ORDER_FINAL_BELOW else order


def _exponential_integral(polynomial: np.poly1d, ratio: float) -> float:
    """The integral of p(u) e^u over u from 0 to log(ratio), by parts: e^u (p - p' + p'' - …)."""
    total = polynomial
    for k in range(1, polynomial.order + 1):
        total = total + (-1) ** k * polynomial.deriv(k)
    if ratio == 0:
        return -float(total(0.0))
    return ratio * float(total(math.log(ratio))) - float(total(0.0))


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
    """SDE-DPM-Solver++(2M), arXiv:2211.01095, appendix; diffusers' sde-dpmsolver++, with plain noise.

    Order 1 to 3; at ``eta`` 0 it solves the ODE.
    """
    history: list[Array] = []  # latest first
    for i, t, sigma, sigma_next in iter_steps(schedule):
        x0 = denoise(x, sigma, t)
        history = [x0, *history[: order - 1]]
        current_order = _step_order(schedule, i, len(history), lower_order_final=lower_order_final)
        if euler_at_final and i == schedule.steps - 1:
            current_order = 1
        shrink = (sigma_next / sigma) ** (1 + eta)
        x = shrink * x + (1 - shrink) * x0
        if current_order > 1:
            x = x + _higher_order_terms(schedule, i, history[:current_order], solver_type, eta)
        if eta > 0:
            spread = sigma_next * math.sqrt(1 - (sigma_next / sigma) ** (2 * eta))
            x = x + s_noise * spread * noise(x.shape)
        yield make_step(schedule, i, x, x0)


def _higher_order_terms(schedule: Schedule, i: int, history: list[Array], solver_type: str, eta: float) -> Array:
    """The terms of order 2 and 3: x0's change along the step, extrapolated from earlier steps."""
    h = (1 + eta) * math.log(float(schedule.sigmas[i] / schedule.sigmas[i + 1]))
    phi_1 = -math.expm1(-h)
    phi_2 = 1 - phi_1 / h
    first, second = _divided_differences(schedule, i, history)
    if len(history) == 2 and solver_type == "midpoint":
        return 0.5 * phi_1 * first
    return phi_2 * first - (phi_2 / h - 0.5) * second


def _divided_differences(schedule: Schedule, i: int, history: list[Array]) -> tuple[Array, Array]:
    """First and second derivative of x0, per step length in log(sigma); with two x0 the second is zero."""
    now = float(schedule.sigmas[i])
    h = math.log(now / float(schedule.sigmas[i + 1]))
    near = math.log(float(schedule.sigmas[i - 1]) / now) / h
    slope = (history[0] - history[1]) / near
    if len(history) == 2:
        return slope, np.zeros_like(slope)
    far = math.log(float(schedule.sigmas[i - 2] / schedule.sigmas[i - 1])) / h
    bend = (slope - (history[1] - history[2]) / far) / (near + far)
    return slope + near * bend, bend


def dpmpp_2m(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource, **options: Any) -> Iterator[Step]:
    """DPM-Solver++(2M), arXiv:2211.01095, algorithm 2: `dpmpp_2m_sde` with its ``options`` and no noise."""
    return dpmpp_2m_sde(denoise, x, schedule, noise, **options, eta=0.0)


def dpmpp_3m_sde(
    denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource, *, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Step]:
    """Third order of `dpmpp_2m_sde`; k-diffusion's sample_dpmpp_3m_sde with plain noise."""
    options: dict[str, Any] = {"order": 3, "solver_type": "heun", "lower_order_final": False}
    return dpmpp_2m_sde(denoise, x, schedule, noise, **options, eta=eta, s_noise=s_noise)


def unipc(
    denoise: Denoise,
    x: Array,
    schedule: Schedule,
    noise: NoiseSource,
    *,
    order: int = 2,
    variant: str = "bh2",
    lower_order_final: bool = True,
    disable_corrector: Sequence[int] = (),
) -> Iterator[Step]:
    """UniPC of order 1 to 3, arXiv:2302.04867, algorithms 5 and 6, with B_1(h) = h or B_2(h) = e^h - 1.

    ``disable_corrector`` lists the steps, counted with skipped ones, at whose end x is not corrected.
    """
    history: list[Array] = []  # latest first
    start, current_order = x, 0
    for i, t, sigma, sigma_next in iter_steps(schedule):
        x0 = denoise(x, sigma, t)
        if i > 0 and schedule.start_index + i - 1 not in disable_corrector:
            x = _unipc_update(schedule, i - 1, start, history[:current_order], variant, corrected=x0)
        history = [x0, *history[: order - 1]]
        current_order = min(len(history), schedule.steps - i) if lower_order_final else len(history)
        current_order = 1 if sigma_next in (0.0, sigma) else current_order
        start = x
        x = _unipc_update(schedule, i, start, history[:current_order], variant)
        yield make_step(schedule, i, x, x0)


def _unipc_update(
    schedule: Schedule, i: int, start: Array, history: list[Array], variant: str, corrected: Array | None = None
) -> Array:
    """Take step i from ``start``: UniP, or with the x0 predicted at its end UniC."""
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
    weights = _unipc_weights(rates, h, scale, with_corrector=corrected is not None)
    return x - scale * sum((w * change for w, change in zip(weights, changes, strict=True)), np.zeros_like(x))


def _unipc_weights(rates: list[float], h: float, scale: float, *, with_corrector: bool) -> list[float]:
    """Solve equation 12 of arXiv:2302.04867; one unknown is 1/2, as in the published code."""
    nodes = [*rates, 1.0] if with_corrector else rates
    if len(nodes) == 1:
        return [0.5]
    phi, right_side = math.expm1(h) / h - 1, list[float]()
    for k in range(1, len(nodes) + 1):
        right_side.append(phi * math.factorial(k) / scale)
        phi = phi / h - 1 / math.factorial(k + 1)
    powers = np.vander(nodes, increasing=True).T
    return [float(weight) for weight in np.linalg.solve(powers, np.array(right_side))]
