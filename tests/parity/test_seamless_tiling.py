"""Images that tile, against diffusers with circular convolutions; their borders against their inside."""

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image
from sdonnx_runtime.denoising.init_image import resize_latents
from sdonnx_runtime.images.preprocess import resize
from support.families import UNCHECKED
from support.images import photograph
from support.reference import NEGATIVE, PROMPT, SEED, SIZE, assert_equal, reference
from support.tiling import circular, pad_along

import sdonnx

ASKED = {"negative_prompt": NEGATIVE, "num_inference_steps": 3, "guidance_scale": 5.0, **SIZE}


@pytest.mark.parametrize(("name", "axes"), [("sd1", "xy"), ("sd1", "x"), ("sd1", "y"), ("sdxl", "xy")])
def test_images_equal_those_of_diffusers(opened, name, axes):
    theirs, ours = opened(name)
    with circular(theirs.unet, theirs.vae, axes=axes):
        wanted = reference(theirs, prompt=PROMPT, **ASKED)
    assert_equal(ours.generate(PROMPT, seed=SEED, tiling=axes, **ASKED), wanted)
    other = ours.generate(PROMPT, seed=SEED, tiling={"x": "y", "y": "x", "xy": None}[axes], **ASKED)
    assert np.abs(other.latents - wanted[0]).max() > 1e-2


@pytest.mark.parametrize("axes", ["xy", "y"])
def test_img2img_equals_diffusers(opened, axes):
    theirs, ours = opened("sd1")
    scheduler = EulerDiscreteScheduler.from_config({**theirs.scheduler.config, "_class_name": "EulerDiscreteScheduler"})
    pipe = StableDiffusionImg2ImgPipeline(**{**theirs.components, "scheduler": scheduler, **UNCHECKED})
    pipe.set_progress_bar_config(disable=True)
    image, asked = photograph(64, 96), {**ASKED, "strength": 0.7, "num_inference_steps": 4}
    with circular(pipe.unet, pipe.vae, axes=axes):
        wanted = reference(pipe, prompt=PROMPT, image=image, **{**asked, "width": None, "height": None})
    assert_equal(ours.generate(PROMPT, seed=SEED, image=image, tiling=axes, **asked), wanted)


def test_latents_are_upscaled_as_what_surrounds_them():
    """The hires fix, against torch's interpolation of latents that go on at the opposite border."""
    latents = np.random.default_rng(2).standard_normal((1, 4, 6, 5), np.float32)
    around = pad_along("x", torch.from_numpy(latents), 1, 1, 0, 0)
    wanted = torch.nn.functional.interpolate(around, scale_factor=2, mode="bilinear")[..., 2:-2].numpy()
    np.testing.assert_allclose(resize_latents(latents, 12, 10, "x"), wanted, atol=1e-6)
    assert np.abs(resize_latents(latents, 12, 10) - wanted).max() > 0.1


def test_an_enlarged_image_goes_on_at_its_borders():
    tile = np.asarray(photograph(24, 16))
    tiles = Image.fromarray(np.tile(tile, (3, 3, 1))).resize((96, 144), Image.Resampling.LANCZOS)
    found = resize(Image.fromarray(tile), (32, 48), Image.Resampling.LANCZOS, "xy")
    np.testing.assert_array_equal(found, np.asarray(tiles)[48:96, 32:64])


def border_steps(image):
    """The mean steps over the borders, to the right and downwards, as shares of the largest inside."""
    pixels, shares = np.asarray(image, float), []
    for axis in (1, 0):
        steps = np.abs(np.diff(pixels, axis=axis, append=pixels.take([0], axis))).mean((1 - axis, 2))
        shares.append(steps[-1] / steps[:-1].max())
    return shares


@pytest.mark.core
def test_an_image_of_the_bundled_model_has_no_seams():
    """Of an apple whose four quarters lie in the corners: without tiling, each is closed at the border."""
    prompt, asked = "red apple on a blue background", {"num_inference_steps": 10, "sampler": "ddim"}
    with sdonnx.load("pictogram", memory="max") as pipe:
        apple = np.asarray(pipe.generate(prompt, seed=6, **asked).images[0])
        asked |= {"image": Image.fromarray(np.roll(apple, 32, (0, 1))), "strength": 0.5, "seed": 1}
        made = {axes: pipe.generate(prompt, tiling=axes, **asked).images[0] for axes in ("xy", "x", "y", None)}
    assert {axes: [step < 0.5 for step in border_steps(image)] for axes, image in made.items()} == {
        "xy": [True, True], "x": [True, False], "y": [False, True], None: [False, False],
    }  # fmt: skip
    assert min(border_steps(made[None])) > 1
