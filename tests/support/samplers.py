"""Sampling with one of our samplers and with diffusers' class for it, from the same noise with the same model."""

import copy
import json
from functools import lru_cache

import diffusers
import numpy as np
import torch
from sdonnx_runtime.denoising.denoiser import make_model, predict_x0
from sdonnx_runtime.sampling.noise import Noise
from sdonnx_runtime.sampling.registry import SAMPLERS, sampler_options
from sdonnx_runtime.sampling.schedule import make_schedule
from sdonnx_runtime.sampling.scheduler_config import CLASSES, SchedulerConfig, clip_or_threshold_x0

SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
SHAPE, SEED = (2, 4, 6, 5), 21
STOCHASTIC = ("ddim", "ddpm", "dpm2_ancestral", "dpmpp_2m_sde", "euler_ancestral", "lcm", "tcd")
WITH_SIGMA_SCHEDULES = ("deis", "dpm2", "dpm2_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "euler", "heun", "lms", "unipc")
"""Samplers whose classes read ``use_karras_sigmas`` and its like."""

EPSILON_OR_V = ("dpm2", "dpm2_ancestral", "euler_ancestral", "pndm")  # diffusers refuses the third prediction type


def predictions(sampler):
    return ("epsilon", "v_prediction") if sampler in EPSILON_OR_V else ("epsilon", "v_prediction", "sample")


def model(x, t):
    """A bounded stand-in for a U-Net: smooth in x, different at every timestep and place."""
    place = np.arange(x[0].size, dtype=np.float32).reshape(x[0].shape)
    return (np.tanh(1.3 * x + np.sin(place)) * np.cos(t / 400) + 0.3 * np.sin(x * t / 500)).astype(np.float32)


IMAGE = np.tanh(Noise(5)(SHAPE))


def ours(sampler, config, steps, *, begin=None, rows=slice(None), request=None, network=model, **asked):
    """The latents: of noise, or of IMAGE noised to where step ``begin`` starts."""
    parsed = SchedulerConfig.from_dict(config)
    schedule = make_schedule(parsed, sampler, steps, **asked)
    options = sampler_options(parsed, sampler, **(request or {}))
    limit = None if sampler == "ddim" else clip_or_threshold_x0(parsed, sampler)

    def run(inputs):
        return network(inputs["sample"], float(inputs["timestep"]))

    text = np.zeros((1, 77, 8), np.float32)
    denoise = predict_x0(make_model(run, {"encoder_hidden_states": text}), parsed.prediction_type, limit)
    source = Noise(SEED)

    def noise(_shape):
        return source(SHAPE)[rows]

    x = noise(SHAPE) * np.float32(schedule.init_scale)
    if begin is not None:
        schedule = schedule.starting_at(begin)
        x = IMAGE + np.float32(schedule.sigmas[0]) * Noise(SEED)(SHAPE)
    made = list(SAMPLERS[sampler](denoise, x, schedule, noise, **options))
    assert [step.index for step in made] == list(range(made[0].total if made else 0))
    x = made[-1].x if made else x
    assert x.dtype == np.float32
    return x * np.float32(schedule.output_scale)


@lru_cache(maxsize=16)
def _scheduler(kind, config):
    """Some of diffusers' classes lay a thousand steps when they are made."""
    return getattr(diffusers, kind).from_config(json.loads(config))


def theirs(sampler, config, steps, *, begin=None, timesteps=None, sigmas=None, network=model, **options):
    if sampler == "dpmpp_2m_sde":
        config = {**config, "algorithm_type": "sde-dpmsolver++"}
    scheduler = copy.deepcopy(_scheduler(CLASSES[sampler], json.dumps(config)))
    given = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
    scheduler.set_timesteps(**(given or {"num_inference_steps": steps}))
    generator = torch.Generator("cpu").manual_seed(SEED)
    x, timesteps_left = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma, scheduler.timesteps
    if hasattr(
        scheduler, "set_begin_index"
    ):  # else it looks for its place, which fails where a timestep is there twice
        scheduler.set_begin_index((begin or 0) * scheduler.order)
    if begin is not None:  # as StableDiffusionImg2ImgPipeline.get_timesteps and prepare_latents
        timesteps_left = timesteps_left[begin * scheduler.order :]
        noise = torch.randn(SHAPE, generator=torch.Generator("cpu").manual_seed(SEED))
        x = scheduler.add_noise(torch.from_numpy(IMAGE), noise, timesteps_left[:1])
    if sampler in STOCHASTIC:
        options["generator"] = generator
    for t in timesteps_left:
        scaled = scheduler.scale_model_input(x, t)
        output = torch.from_numpy(network(scaled.numpy(), float(t)))
        x = scheduler.step(output, t, x, **options).prev_sample
    return x.numpy()


def distance(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()
