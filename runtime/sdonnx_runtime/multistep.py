"""Samplers with memory: each step also uses what the model gave in the steps before."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.sampling import Denoise, NoiseSource, Step, exponential_step, finish, levels, relevel
from sdonnx_runtime.schedule import Schedule


def lms(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """Linear multistep of order 4 in sigma; k-diffusion's sample_lms."""
    slopes: list[Array] = []  # latest first
    for i, t, sigma, sigma_next in levels(schedule):
        x0 = denoise(x, sigma, t)
        slopes = [(x - x0) / sigma, *slopes[:3]]
        nodes = [float(schedule.sigmas[i - k]) for k in range(len(slopes))]
        for k, slope in enumerate(slopes):
            x = x + _lagrange_integral(nodes, k, sigma, sigma_next) * slope
        yield finish(schedule, i, x, x0)


def pndm(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """Pseudo linear multistep, arXiv:2202.09778, equation 13, as published with Stable Diffusion (PLMS)."""
    outputs: list[Array] = []  # latest first
    start = x
    for i, t, sigma, sigma_next in levels(schedule):
        x0 = denoise(x, sigma, t)
        output = _model_output(schedule, x, x0, sigma)
        if i == 1:  # the first step once more, with the mean of the slopes at its ends
            x, output = start, (output + outputs[0]) / 2
        else:
            outputs = [output, *outputs[:3]]
            weights = _ADAMS_BASHFORTH[len(outputs)]
            output = sum((w * o for w, o in zip(weights, outputs, strict=True)), np.zeros_like(x))
        source, target = float(schedule.sources[i]), float(schedule.targets[i])
        x = relevel(x, sigma if i != 1 else float(schedule.sigmas[0]), source)
        x = x + (target - source) * _epsilon(schedule, x, output, source)
        x = relevel(x, target, sigma_next)
        yield finish(schedule, i, x, x0)


_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def deis(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """Exponential integrator over polynomials in log(sigma), order 2, arXiv:2204.13902 (log-rho)."""
    total = len(schedule.timesteps)
    before: Array | None = None
    for i, t, sigma, sigma_next in levels(schedule):
        x0 = denoise(x, sigma, t)
        epsilon = (x - x0) / sigma
        if before is None or (i == total - 1 and total < 15):
            x = x + (sigma_next - sigma) * epsilon
        else:
            earlier = float(schedule.sigmas[i - 1])
            x = x + _log_integral(sigma, earlier, sigma, sigma_next) * epsilon
            x = x + _log_integral(earlier, sigma, sigma, sigma_next) * before
        before = epsilon
        yield finish(schedule, i, x, x0)


def _log_integral(node: float, other: float, start: float, end: float) -> float:
    """The integral over sigma of the line in log(sigma) that is 1 at ``node`` and 0 at ``other``."""

    def antiderivative(sigma: float) -> float:
        return sigma * (math.log(sigma / other) - 1) / math.log(node / other)

    return antiderivative(end) - antiderivative(start)


def dpmpp_2m(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """DPM-Solver++(2M), arXiv:2211.01095, algorithm 2; the last step is of first order where few are taken."""
    total = len(schedule.timesteps)
    before: Array | None = None
    for i, t, sigma, sigma_next in levels(schedule):
        x0 = denoise(x, sigma, t)
        ahead = x0
        if before is not None and sigma_next > 0 and not (i == total - 1 and total < 15):
            ahead = x0 + 0.5 * _growth(schedule, i) * (x0 - before)
        x = exponential_step(x, ahead, sigma, sigma_next)
        before = x0
        yield finish(schedule, i, x, x0)


def dpmpp_2m_sde(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M), arXiv:2211.01095, appendix; diffusers' sde-dpmsolver++, with plain noise."""
    total = len(schedule.timesteps)
    before: Array | None = None
    for i, t, sigma, sigma_next in levels(schedule):
        x0 = denoise(x, sigma, t)
        ahead = x0
        if before is not None and sigma_next > 0 and not (i == total - 1 and total < 15):
            ahead = x0 + 0.5 * _growth(schedule, i) * (x0 - before)
        x = _sde_step(x, ahead, sigma, sigma_next, noise)
        before = x0
        yield finish(schedule, i, x, x0)


def dpmpp_3m_sde(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """Third order of `dpmpp_2m_sde`; k-diffusion's sample_dpmpp_3m_sde with plain noise."""
    history: list[Array] = []  # latest first
    for i, t, sigma, sigma_next in levels(schedule):
        x0 = denoise(x, sigma, t)
        history = [x0, *history[:2]]
        if sigma_next > 0:
            h = 2 * math.log(sigma / sigma_next)
            phi_2 = math.expm1(-h) / h + 1
            first, second = _divided_differences(schedule, i, history)
            correction = phi_2 * first - (phi_2 / h - 0.5) * second
            x = _sde_step(x, x0, sigma, sigma_next, noise) + correction
        else:
            x = x0
        yield finish(schedule, i, x, x0)


def _growth(schedule: Schedule, i: int) -> float:
    """This step's length over the one's before, in log(sigma)."""
    before, sigma, after = (float(level) for level in schedule.sigmas[i - 1 : i + 2])
    return math.log(sigma / after) / math.log(before / sigma)


def _sde_step(x: Array, x0: Array, sigma: float, target: float, noise: NoiseSource) -> Array:
    """From sigma to target of the reverse SDE along constant x0."""
    shrink = (target / sigma) ** 2
    return shrink * x + (1 - shrink) * x0 + target * math.sqrt(1 - shrink) * noise(x.shape)


def _divided_differences(schedule: Schedule, i: int, history: list[Array]) -> tuple[Array, Array]:
    """First and second derivative of x0 by the step's length in log(sigma), zero where the history is too short."""
    nothing = np.zeros_like(history[0])
    if len(history) == 1:
        return nothing, nothing
    slope = _growth(schedule, i) * (history[0] - history[1])
    if len(history) == 2:
        return slope, nothing
    now, after = float(schedule.sigmas[i]), float(schedule.sigmas[i + 1])
    h = math.log(now / after)
    near = math.log(float(schedule.sigmas[i - 1]) / now) / h
    far = math.log(float(schedule.sigmas[i - 2]) / float(schedule.sigmas[i - 1])) / h
    bend = (slope - (history[1] - history[2]) / far) / (near + far)
    return slope + near * bend, bend


def unipc(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """UniPC of order 2 with B_2(h) = e^h - 1, arXiv:2302.04867; of order 1 in its first and last step."""
    total = len(schedule.timesteps)
    history: list[Array] = []  # latest first
    start, order = x, 0
    for i, t, sigma, sigma_next in levels(schedule):
        x0 = denoise(x, sigma, t)
        if order > 0:
            x = _corrected(schedule, i, start, x0, history[:order])
        history = [x0, *history[:1]]
        order = min(2, total - i, len(history))
        start = x
        ahead = x0 if order == 1 else x0 + 0.5 * _growth(schedule, i) * (x0 - history[1])
        x = exponential_step(x, ahead, sigma, sigma_next)
        yield finish(schedule, i, x, x0)


def _corrected(schedule: Schedule, i: int, start: Array, x0: Array, history: Sequence[Array]) -> Array:
    """UniC: step i - 1 once more from ``start``, with the x0 that was found at its end."""
    before, sigma = float(schedule.sigmas[i - 1]), float(schedule.sigmas[i])
    h = -math.log(before / sigma)
    latest = history[0]
    if len(history) == 1:
        return exponential_step(start, latest + 0.5 * (x0 - latest), before, sigma)
    rate = math.log(float(schedule.sigmas[i - 2]) / before) / h
    phi_1 = math.expm1(h)
    phi_2 = phi_1 / h - 1
    phi_3 = phi_2 / h - 0.5
    weights = np.linalg.solve(np.array([[1.0, 1.0], [rate, 1.0]]), np.array([phi_2, 2 * phi_3]) / phi_1)
    change = float(weights[0]) * (history[1] - latest) / rate + float(weights[1]) * (x0 - latest)
    return exponential_step(start, latest + change, before, sigma)


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
