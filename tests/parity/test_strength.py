"""How many steps a strength leaves, and from where, in each pipeline of diffusers."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    LatentConsistencyModelImg2ImgPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from sdonnx_runtime.errors import RequestError
from support.images import disc, photograph
from support.reference import PROMPT, SEED

IMAGE, SIZE = photograph(64, 96), {"width": 64, "height": 96}


def theirs(kind, pipe, **given):
    """Latents of a pipeline of diffusers with the parts of another, and the timesteps that it takes."""
    names = {"vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet"} & {*pipe.components}
    scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    checks = {} if "text_encoder_2" in names else {"safety_checker": None, "feature_extractor": None}
    checks |= {} if "text_encoder_2" in names else {"requires_safety_checker": False}
    made = kind(**{name: getattr(pipe, name) for name in names}, scheduler=scheduler, **checks)
    made.set_progress_bar_config(disable=True)
    taken = []
    generator = torch.Generator("cpu").manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given |= {"callback_on_step_end": lambda _pipe, _step, t, tensors: taken.append(float(t)) or tensors}
        latents = made(PROMPT, generator=generator, output_type="latent", **given).images
    return latents.numpy(), taken


def compare(pipeline, wanted, **asked):
    latents, timesteps = wanted
    resolved = pipeline.resolve(PROMPT, seed=SEED, sampler="lcm", **asked)
    assert list(resolved.passes[-1].schedule.timesteps) == timesteps
    found = pipeline.generate(resolved).latents
    assert np.abs(found - latents).max() / np.abs(latents).max() < 2e-5


@pytest.mark.parametrize(("strength", "steps"), [(0.5, 4), (0.33, 3), (1.0, 2)])
def test_a_latent_consistency_model_takes_all_steps_from_a_lower_timestep(opened, strength, steps):
    pipe, ours = opened("lcm")
    common = {"image": IMAGE, "strength": strength, "num_inference_steps": steps, "guidance_scale": 8.5}
    wanted = theirs(LatentConsistencyModelImg2ImgPipeline, pipe, **common)
    assert len(wanted[1]) == steps
    compare(ours, wanted, **common, **SIZE)


def test_the_second_pass_of_a_latent_consistency_model(opened):
    pipe, ours = opened("lcm")
    first = ours.generate(PROMPT, seed=SEED, num_inference_steps=4, guidance_scale=8.5, **SIZE)
    enlarged = torch.nn.functional.interpolate(torch.from_numpy(first.latents), size=(24, 16), mode="bilinear")
    common = {"num_inference_steps": 4, "guidance_scale": 8.5}
    wanted = theirs(LatentConsistencyModelImg2ImgPipeline, pipe, image=enlarged, strength=0.5, **common)
    compare(ours, wanted, hires_scale=2, hires_strength=0.5, hires_steps=4, **common, **SIZE)


@pytest.mark.parametrize(
    ("name", "kind", "mask"),
    [
        ("lcm", StableDiffusionInpaintPipeline, {"mask_image": disc(64, 96)}),
        ("sd1", StableDiffusionImg2ImgPipeline, {}),
        ("sdxl", StableDiffusionXLImg2ImgPipeline, {}),
    ],
)
def test_other_pipelines_skip_steps_with_lcms_sampler_too(opened, name, kind, mask):
    pipe, ours = opened(name)
    common = {"image": IMAGE, "strength": 0.5, "num_inference_steps": 4, "guidance_scale": 4.0, **mask}
    wanted = theirs(kind, pipe, **common, **(SIZE if mask else {}))
    assert len(wanted[1]) == 2
    compare(ours, wanted, **common, **SIZE, **({"paste": False} if mask else {}))


@pytest.mark.parametrize(("steps", "strength"), [(121, 1 / 3), (61, 0.9), (103, 0.5)])
def test_the_steps_that_are_asked_for_are_counted_where_the_schedule_has_one_more(opened, steps, strength):
    """Of trailing timesteps; as StableDiffusionImg2ImgPipeline.get_timesteps."""
    _, ours = opened("sd1")
    asked = {"image": IMAGE, "num_inference_steps": steps, "sampler": "euler", "timestep_spacing": "trailing"}
    whole = ours.resolve(PROMPT, **asked, strength=1.0).passes[0].schedule
    assert whole.steps == steps + 1
    left = ours.resolve(PROMPT, **asked, strength=strength).passes[0].schedule
    assert list(left.timesteps) == list(whole.timesteps[steps - int(steps * strength) :])
    assert ours.resolve(PROMPT, **asked, strength=0).passes[0].steps == 0


def test_a_strength_that_leaves_too_few_timesteps(opened):
    _, ours = opened("lcm")
    with pytest.raises(
        RequestError, match=r"distilled to 50 steps, of which strength 0.05 leaves 2; 4 .* use more strength"
    ):
        ours.resolve(PROMPT, image=IMAGE, strength=0.05, num_inference_steps=4)
    one_step = {"image": IMAGE, "strength": 0.5, "num_inference_steps": 1}  # as SD-Turbo's users try
    with pytest.raises(RequestError, match="strength 0.5 of 1 steps is less than one step; give 1.0 or more"):
        opened("sd1")[1].resolve(PROMPT, **one_step)
    assert opened("sd1")[1].resolve(PROMPT, **{**one_step, "num_inference_steps": 2}).steps == 1
