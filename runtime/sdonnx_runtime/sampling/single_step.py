"""Single-step samplers: no history, one or two model evaluations a step."""

import math
from collections.abc import Callable, Iterator

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.sampling.types import (
    Denoise,
    NoiseSource,
    Schedule,
    Step,
    euler_step,
    get_ancestral_step,
    iter_steps,
    log_midpoint,
    make_step,
    rescale_to_sigma,
)

RESTART_INTERVAL = (0.1, 2.0)
"""The sigmas between which `restart` repeats steps: lowest, highest."""


def euler(
    denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource, *, s_churn: float = 0.0, s_noise: float = 1.0
) -> Iterator[Step]:
    """Euler's method, Karras et al. 2022, arXiv:2206.00364, algorithm 2 in its first order; k-diffusion's."""
    gamma = min(s_churn / schedule.total, math.sqrt(2) - 1) if schedule.steps > 0 else 0.0
    for i, t, sigma, sigma_next in iter_steps(schedule):
        churned = sigma * (gamma + 1)
        if gamma > 0:
            x = x + s_noise * math.sqrt(churned**2 - sigma**2) * noise(x.shape)
            t = schedule.timestep(churned)
        x0 = denoise(x, churned, t)
        x = x + (sigma_next - churned) * ((x - x0) / churned)
        yield make_step(schedule, i, x, x0)


def euler_ancestral(
    denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource, *, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Step]:
    """Euler's method to a lower sigma, then noise up to the next; k-diffusion's sample_euler_ancestral."""
    for i, t, sigma, sigma_next in iter_steps(schedule):
        x0 = denoise(x, sigma, t)
        down, up = get_ancestral_step(sigma, sigma_next, eta)
        x = x + (down - sigma) * ((x - x0) / sigma) + s_noise * up * noise(x.shape)
        yield make_step(schedule, i, x, x0)


def heun(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """Heun's method of order 2, arXiv:2206.00364, algorithm 1; two evaluations a step, one in the last."""
    for i in range(schedule.steps):
        x, x0 = _heun_step(denoise, x, schedule, i)
        yield make_step(schedule, i, x, x0)


def _heun_step(denoise: Denoise, x: Array, schedule: Schedule, i: int) -> tuple[Array, Array]:
    sigma, sigma_next = float(schedule.sigmas[i]), float(schedule.sigmas[i + 1])
    x0 = denoise(x, sigma, float(schedule.timesteps[i]))
    slope = (x - x0) / sigma
    ahead = x + (sigma_next - sigma) * slope
    if sigma_next > 0:
        t = float(schedule.timesteps[i + 1]) if i + 1 < schedule.steps else schedule.timestep(sigma_next)
        other = (ahead - denoise(ahead, sigma_next, t)) / sigma_next
        ahead = x + (sigma_next - sigma) * ((slope + other) / 2)
    return ahead, x0


def restart(
    denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource, *, restarts: int = 1, s_noise: float = 1.0
) -> Iterator[Step]:
    """Restart sampling, arXiv:2306.14878, algorithm 1: `heun` with the steps in RESTART_INTERVAL repeated.

    At the lowest sigma in the interval, noise lifts the state back to the highest, ``restarts`` times.
    """
    indices = restart_indices(schedule, restarts)
    for index, i in enumerate(indices):
        if index > 0 and indices[index - 1] >= i:
            low, high = float(schedule.sigmas[indices[index - 1] + 1]), float(schedule.sigmas[i])
            x = x + s_noise * math.sqrt(high**2 - low**2) * noise(x.shape)
        x, x0 = _heun_step(denoise, x, schedule, i)
        yield Step(index=index, total=len(indices), x=x, x0=x0)


def restart_indices(schedule: Schedule, restarts: int) -> list[int]:
    """The schedule's steps in the order in which `restart` takes them."""
    lowest, highest = RESTART_INTERVAL
    in_interval = [i for i, sigma in enumerate(schedule.sigmas[:-1]) if lowest <= sigma <= highest]
    repeated = in_interval[:-1]
    end = repeated[-1] + 1 if repeated else 0
    return [*range(end), *repeated * restarts, *range(end, schedule.steps)]


def dpm2(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """The midpoint method in log(sigma), order 2; k-diffusion's sample_dpm_2, two evaluations a step."""
    for i, t, sigma, sigma_next in iter_steps(schedule):
        x0 = denoise(x, sigma, t)
        x = _midpoint(denoise, x, x0, schedule, sigma, sigma_next)
        yield make_step(schedule, i, x, x0)


def dpm2_ancestral(
    denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource, *, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Step]:
    """`dpm2` to a lower sigma, then noise up to the next; k-diffusion's sample_dpm_2_ancestral."""
    for i, t, sigma, sigma_next in iter_steps(schedule):
        x0 = denoise(x, sigma, t)
        down, up = get_ancestral_step(sigma, sigma_next, eta)
        x = _midpoint(denoise, x, x0, schedule, sigma, down)
        if sigma_next > 0:
            x = x + s_noise * up * noise(x.shape)
        yield make_step(schedule, i, x, x0)


def _midpoint(denoise: Denoise, x: Array, x0: Array, schedule: Schedule, sigma: float, target: float) -> Array:
    slope = (x - x0) / sigma
    if target == 0:
        return x + (target - sigma) * slope
    middle = log_midpoint(sigma, target)
    half = x + (middle - sigma) * slope
    return x + (target - sigma) * ((half - denoise(half, middle, schedule.timestep(middle))) / middle)


def dpmpp_2s_ancestral(
    denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource, *, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Step]:
    """DPM-Solver++(2S), arXiv:2211.01095, algorithm 1, with noise; k-diffusion's sample_dpmpp_2s_ancestral."""
    for i, t, sigma, sigma_next in iter_steps(schedule):
        x0 = denoise(x, sigma, t)
        down, up = get_ancestral_step(sigma, sigma_next, eta)
        ahead = x0
        if down > 0:
            middle = log_midpoint(sigma, down)
            ahead = denoise(euler_step(x, x0, sigma, middle), middle, schedule.timestep(middle))
        x = euler_step(x, ahead, sigma, down)
        if sigma_next > 0:
            x = x + s_noise * up * noise(x.shape)
        yield make_step(schedule, i, x, x0)


def dpmpp_sde(
    denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource, *, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Step]:
    """DPM-Solver++ for the SDE, two evaluations a step; k-diffusion's sample_dpmpp_sde with r 1/2 and plain noise."""
    for i, t, sigma, sigma_next in iter_steps(schedule):
        x0 = denoise(x, sigma, t)
        ahead = x0
        if sigma_next > 0:
            middle = log_midpoint(sigma, sigma_next)
            down, up = get_ancestral_step(sigma, middle, eta)
            half = euler_step(x, x0, sigma, down) + s_noise * up * noise(x.shape)
            ahead = denoise(half, middle, schedule.timestep(middle))
        down, up = get_ancestral_step(sigma, sigma_next, eta)
        x = euler_step(x, ahead, sigma, down)
        if sigma_next > 0:
            x = x + s_noise * up * noise(x.shape)
        yield make_step(schedule, i, x, x0)


def ddim(
    denoise: Denoise,
    x: Array,
    schedule: Schedule,
    noise: NoiseSource,
    *,
    eta: float = 0.0,
    limit: Callable[[Array], Array] | None = None,
) -> Iterator[Step]:
    """Denoising diffusion implicit models, arXiv:2010.02502, equation 12.

    ``limit`` clips x0 but not the predicted noise, as diffusers does for this class alone.
    """
    for i, t, sigma, sigma_next in iter_steps(schedule):
        x0 = denoise(x, sigma, t)
        target = float(schedule.sigmas_to[i])
        down, up = get_ancestral_step(sigma, target, eta)
        epsilon = (x - x0) / sigma
        x0 = x0 if limit is None else limit(x0)
        x = x0 + down * epsilon
        if eta > 0:
            x = x + up * noise(x.shape)
        x = rescale_to_sigma(x, target, sigma_next)
        yield make_step(schedule, i, x, x0)


def ddpm(
    denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource, *, variance: str = "fixed_small"
) -> Iterator[Step]:
    """Denoising diffusion probabilistic models, arXiv:2006.11239, algorithm 2 with either variance of section 3.2."""
    for i, t, sigma, sigma_next in iter_steps(schedule):
        x0 = denoise(x, sigma, t)
        down, up = get_ancestral_step(sigma, sigma_next)
        if variance == "fixed_large":
            up = math.sqrt(sigma**2 - sigma_next**2) * math.hypot(sigma_next, 1.0) / math.hypot(sigma, 1.0)
        x = x0 + down * ((x - x0) / sigma)
        if t > 0:
            x = x + up * noise(x.shape)
        yield make_step(schedule, i, x, x0)


def lcm(
    denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource, *, timestep_scaling: float = 10.0
) -> Iterator[Step]:
    """Latent consistency models, arXiv:2310.04378: multistep consistency sampling with the skip of its appendix."""
    for i, t, sigma, sigma_next in iter_steps(schedule):
        x0 = denoise(x, sigma, t)
        length = math.hypot(t * timestep_scaling, 0.5)
        denoised = (t * timestep_scaling / length) * x0 + (0.5 / length) ** 2 / math.hypot(sigma, 1.0) * x
        x = denoised if i == schedule.steps - 1 else denoised + sigma_next * noise(x.shape)
        yield make_step(schedule, i, x, denoised)


def tcd(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource, *, eta: float = 0.3) -> Iterator[Step]:
    """Trajectory consistency distillation, arXiv:2402.19159, algorithm 4; ``eta`` is its gamma."""
    for i, t, sigma, sigma_next in iter_steps(schedule):
        x0 = denoise(x, sigma, t)
        last = i == schedule.steps - 1
        t_next = 0.0 if last else float(schedule.timesteps[i + 1])
        down = float(schedule.train_sigmas[math.floor((1 - eta) * t_next)])
        x = x0 + down * ((x - x0) / sigma)
        if eta > 0 and not last:
            x = x + math.sqrt(max(sigma_next**2 - down**2, 0.0)) * noise(x.shape)
        yield make_step(schedule, i, x, x0)
