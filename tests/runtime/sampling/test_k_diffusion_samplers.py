"""Samplers on custom sigmas: equal to k-diffusion's, of the order they should be, drawing what they should draw."""

import json
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from samplers import convergence, deviations
from sdonnx_runtime.sampling.noise import Noise
from sdonnx_runtime.sampling.registry import SAMPLERS
from sdonnx_runtime.sampling.schedule import make_schedule
from sdonnx_runtime.sampling.scheduler_config import SchedulerConfig
from sdonnx_runtime.sampling.types import Schedule
from support.paths import DATA
from support.record_k_diffusion import SHAPE as K_SHAPE
from support.record_k_diffusion import denoised, levels, noises
from support.samplers import SD15, SEED, SHAPE, distance

K_CASES = json.loads((DATA / "k_diffusion.json").read_text())["cases"]


def plain_schedule(sigmas):
    """Custom sigmas for a denoiser that needs no timesteps."""
    return Schedule.from_sigmas(sigmas, timesteps=sigmas[:-1], train_sigmas=np.linspace(0.01, 20, 1000))


@pytest.mark.parametrize("case", K_CASES, ids=lambda case: f"{case['sampler']}-{case['steps']}-{case['options']}")
def test_sampler_equals_k_diffusion(case):
    options = dict(case["options"])
    if case["sampler"] in ("dpmpp_2m", "dpmpp_2m_sde"):
        options["lower_order_final"] = False
    noise = noises()
    x = noise(K_SHAPE) * np.float32(levels(case["steps"])[0])
    schedule = plain_schedule(levels(case["steps"]))
    steps = SAMPLERS[case["sampler"]](lambda x, sigma, _t: denoised(x, sigma), x, schedule, noise, **options)
    assert distance([*steps][-1].x.flatten(), np.array(case["x"])) < 1e-4


def test_ipndm_equals_diffusers_on_its_sigmas():
    """diffusers' class has its own sigmas; with ours as its betas it takes our steps."""
    steps = 12
    sigmas = make_schedule(SchedulerConfig.from_dict(SD15), "ipndm", steps).sigmas
    betas = sigmas / np.hypot(sigmas, 1)
    scheduler = diffusers.IPNDMScheduler(trained_betas=list(betas))
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(Noise(SEED)(SHAPE) * np.float32(np.hypot(sigmas[0], 1)) / np.float32(np.hypot(sigmas[0], 1)))
    for i, t in enumerate(scheduler.timesteps):
        alpha = float(np.sqrt(1 - betas[i] ** 2))
        epsilon = (x.numpy() / alpha - denoised(x.numpy() / alpha, sigmas[i])) / sigmas[i]
        velocity = (epsilon - betas[i] * x.numpy()) / alpha
        x = scheduler.step(torch.from_numpy(velocity.astype(np.float32)), t, x).prev_sample
    start = Noise(SEED)(SHAPE) * np.float32(np.hypot(sigmas[0], 1))
    steps = SAMPLERS["ipndm"](lambda x, sigma, _t: denoised(x, sigma), start, plain_schedule(sigmas), Noise(0))
    assert distance([*steps][-1].x, x.numpy()) < 1e-4


def test_restart_without_restarts_is_heun_and_lifts_by_the_published_variance():
    x, schedule = Noise(1)(SHAPE) * np.float32(14.6), plain_schedule(levels(12))

    def steps(sampler, **options):
        return [*SAMPLERS[sampler](lambda x, sigma, _t: denoised(x, sigma), x, schedule, Noise(2), **options)]

    assert np.array_equal(steps("restart", restarts=0)[-1].x, steps("heun")[-1].x)
    inside = [sigma for sigma in schedule.sigmas if 0.1 <= sigma <= 2]
    again = steps("restart", restarts=3)
    assert len(again) == again[0].total == 12 + 3 * (len(inside) - 1)
    drawn = []

    def zeros(x, sigma, _t):
        drawn.append((sigma, x))
        return np.zeros_like(x)

    start = np.zeros((1, 4, 64, 64), np.float32)
    [*SAMPLERS["restart"](zeros, start, schedule, Noise(3), restarts=1)]
    lifted = next(x for (before, _), (sigma, x) in pairwise(drawn) if sigma > before)
    assert lifted.var() == pytest.approx(inside[0] ** 2 - inside[-1] ** 2, rel=0.02)  # arXiv:2306.14878, equation 2


def test_deterministic_samplers_converge_at_their_order():
    """On a mixture of Gaussians whose denoiser is known: bench/samplers.py prints the table."""
    for name, found in convergence(counts=(64, 128)).items():
        assert abs(found["order"] - found["expected"]) < 0.25, (name, found)


def test_stochastic_samplers_draw_the_mixture():
    """Its mean and covariance, within 3.5 standard errors of the draw."""
    for name, found in deviations(steps=200, num_samples=4000).items():
        assert max(found.values()) < 3.5, (name, found)
