"""Samplers without memory: each step starts from its state alone, and takes one evaluation of the model or two."""

from collections.abc import Iterator

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.sampling import (
    Denoise,
    NoiseSource,
    Step,
    ancestral,
    exponential_step,
    finish,
    levels,
    log_midpoint,
    relevel,
)
from sdonnx_runtime.schedule import Schedule


def euler(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """Euler's method, Karras et al. 2022, arXiv:2206.00364, algorithm 2 without churn."""
    for i, t, sigma, sigma_next in levels(schedule):
        x0 = denoise(x, sigma, t)
        x = x + (sigma_next - sigma) * ((x - x0) / sigma)
        yield finish(schedule, i, x, x0)


def euler_ancestral(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """Euler's method to a lower level, then noise up to the next; k-diffusion's sample_euler_ancestral."""
    for i, t, sigma, sigma_next in levels(schedule):
        x0 = denoise(x, sigma, t)
        down, up = ancestral(sigma, sigma_next)
        x = x + (down - sigma) * ((x - x0) / sigma) + up * noise(x.shape)
        yield finish(schedule, i, x, x0)


def heun(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """Heun's method of order 2, arXiv:2206.00364, algorithm 1; two evaluations a step, one in the last."""
    for i, t, sigma, sigma_next in levels(schedule):
        x0 = denoise(x, sigma, t)
        slope = (x - x0) / sigma
        ahead = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            other = (ahead - denoise(ahead, sigma_next, float(schedule.timesteps[i + 1]))) / sigma_next
            ahead = x + (sigma_next - sigma) * ((slope + other) / 2)
        x = ahead
        yield finish(schedule, i, x, x0)


def dpm2(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """The midpoint method in log(sigma), order 2; k-diffusion's sample_dpm_2, two evaluations a step."""
    for i, t, sigma, sigma_next in levels(schedule):
        x0 = denoise(x, sigma, t)
        x = _midpoint(denoise, x, x0, schedule, sigma, sigma_next)
        yield finish(schedule, i, x, x0)


def dpm2_ancestral(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """`dpm2` to a lower level, then noise up to the next; k-diffusion's sample_dpm_2_ancestral."""
    for i, t, sigma, sigma_next in levels(schedule):
        x0 = denoise(x, sigma, t)
        down, up = ancestral(sigma, sigma_next)
        x = _midpoint(denoise, x, x0, schedule, sigma, down)
        if sigma_next > 0:
            x = x + up * noise(x.shape)
        yield finish(schedule, i, x, x0)


def _midpoint(denoise: Denoise, x: Array, x0: Array, schedule: Schedule, sigma: float, target: float) -> Array:
    slope = (x - x0) / sigma
    if target == 0:
        return x + (target - sigma) * slope
    middle = log_midpoint(sigma, target)
    half = x + (middle - sigma) * slope
    return x + (target - sigma) * ((half - denoise(half, middle, schedule.timestep(middle))) / middle)


def dpmpp_2s_ancestral(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """DPM-Solver++(2S), arXiv:2211.01095, algorithm 1, with noise; k-diffusion's sample_dpmpp_2s_ancestral."""
    for i, t, sigma, sigma_next in levels(schedule):
        x0 = denoise(x, sigma, t)
        down, up = ancestral(sigma, sigma_next)
        ahead = x0
        if down > 0:
            middle = log_midpoint(sigma, down)
            ahead = denoise(exponential_step(x, x0, sigma, middle), middle, schedule.timestep(middle))
        x = exponential_step(x, ahead, sigma, down)
        if sigma_next > 0:
            x = x + up * noise(x.shape)
        yield finish(schedule, i, x, x0)


def dpmpp_sde(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """DPM-Solver++ for the SDE, two evaluations a step; k-diffusion's sample_dpmpp_sde with r 1/2 and plain noise."""
    for i, t, sigma, sigma_next in levels(schedule):
        x0 = denoise(x, sigma, t)
        ahead = x0
        if sigma_next > 0:
            middle = log_midpoint(sigma, sigma_next)
            down, up = ancestral(sigma, middle)
            half = exponential_step(x, x0, sigma, down) + up * noise(x.shape)
            ahead = denoise(half, middle, schedule.timestep(middle))
        down, up = ancestral(sigma, sigma_next)
        x = exponential_step(x, ahead, sigma, down)
        if sigma_next > 0:
            x = x + up * noise(x.shape)
        yield finish(schedule, i, x, x0)


def ddim(denoise: Denoise, x: Array, schedule: Schedule, noise: NoiseSource) -> Iterator[Step]:
    """Denoising diffusion implicit models, arXiv:2010.02502, equation 12 with eta 0."""
    for i, t, sigma, sigma_next in levels(schedule):
        x0 = denoise(x, sigma, t)
        target = float(schedule.targets[i])
        x = relevel(x0 + target * ((x - x0) / sigma), target, sigma_next)
        yield finish(schedule, i, x, x0)
