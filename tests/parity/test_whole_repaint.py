"""Inpainting models without a mask repaint all: as diffusers' pipeline with a white mask, and as AUTOMATIC1111."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionControlNetInpaintPipeline, StableDiffusionInpaintPipeline
from PIL import Image
from sdonnx_runtime.errors import RequestError
from support.controls import controlnet
from support.families import sd1, unet, vae
from support.images import disc, photograph
from support.reference import NEGATIVE, PROMPT, SEED

import sdonnx

SIZE, LARGER = {"width": 64, "height": 96}, (96, 144)
COMMON = {"num_inference_steps": 5, "guidance_scale": 5.0, "negative_prompt": NEGATIVE}
WHITE = Image.new("L", (64, 96), 255)


@pytest.fixture(scope="module")
def inpainting(export_once, tmp_path_factory):
    """A pipeline and our package; the norms of its VAE have many channels, as a gray image's of one would be 0/0."""
    directory = tmp_path_factory.mktemp("inpainting")
    encoder = vae(block_out_channels=(64, 64, 64, 64), norm_num_groups=4)
    pipe = sd1(StableDiffusionInpaintPipeline, unet=unet(in_channels=9), vae=encoder)
    pipe.save_pretrained(directory / "diffusers")
    return pipe, sdonnx.load(export_once(directory / "diffusers", directory / "package"))


def theirs(pipe, **given):
    """Latents with a white mask, whatever the image."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asked = {"image": photograph(64, 96), "mask_image": WHITE, "strength": 1.0, **SIZE, **given}
        return pipe(PROMPT, generator=generator, output_type="latent", **COMMON, **asked).images.numpy()


def assert_close(found, wanted):
    assert np.abs(found.latents - wanted).max() / np.abs(wanted).max() < 2e-5


def generate(pipeline, **asked):
    return pipeline.generate(PROMPT, seed=SEED, sampler="ddim", **COMMON, **SIZE, **asked)


def test_without_an_image_all_is_new(inpainting):
    pipe, ours = inpainting
    assert_close(generate(ours), theirs(pipe))
    two = ours.generate(PROMPT, seed=SEED - 1, num_images=2, sampler="ddim", **COMMON, **SIZE)
    np.testing.assert_array_equal(two.latents[1:], generate(ours).latents)
    assert generate(ours).request.strength is None


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_an_image_without_a_mask_is_where_it_starts(inpainting, strength):
    pipe, ours = inpainting
    image = photograph(64, 96, seed=8)
    assert_close(generate(ours, image=image, strength=strength), theirs(pipe, image=image, strength=strength))


def test_with_the_second_pass_of_hires_fix(inpainting):
    pipe, ours = inpainting
    start = generate(ours).images[0].resize(LARGER, Image.Resampling.LANCZOS)
    larger = {"width": LARGER[0], "height": LARGER[1], "mask_image": WHITE.resize(LARGER)}
    wanted = theirs(pipe, image=start, strength=0.6, **larger)
    assert_close(generate(ours, hires_scale=1.5, hires_strength=0.6, hires_upscaler="lanczos"), wanted)
    latent = generate(ours, hires_scale=1.5, hires_strength=0.6)
    assert np.isfinite(latent.latents).all()
    assert latent.images[0].size == LARGER


def test_with_a_control(inpainting, export_once, tmp_path):
    pipe, ours = inpainting
    net, edges = controlnet(sd1(unet=unet()).unet), photograph(64, 96, seed=3)
    net.save_pretrained(tmp_path / "net")
    package = export_once(tmp_path / "net", tmp_path / "package")
    parts = {**pipe.components, "controlnet": net, "requires_safety_checker": False}
    scale = {"controlnet_conditioning_scale": 1.0}
    wanted = theirs(StableDiffusionControlNetInpaintPipeline(**parts), control_image=edges, **scale)
    with sdonnx.load(ours.package.root, controls=[package]) as controlled:
        assert_close(generate(controlled, controls=(sdonnx.Control(image=edges),)), wanted)


def test_what_remains_required(opened, inpainting):
    _, ours = inpainting
    with pytest.raises(RequestError, match="mask_image requires image"):
        ours.resolve(PROMPT, mask_image=disc(64, 96))
    with pytest.raises(RequestError, match="strength requires image"):
        ours.resolve(PROMPT, strength=0.5)
    with pytest.raises(RequestError, match="this model requires image"):
        opened("pix2pix")[1].resolve(PROMPT)


def test_memory_is_planned_for_the_encoder_too(inpainting):
    _, ours = inpainting
    plan = ours.plan(PROMPT, always=True, **SIZE)
    assert plan is not None
    assert "vae_encoder" in {each.component for each in plan.components}
