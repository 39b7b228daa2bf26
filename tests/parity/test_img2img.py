"""Starting from an image: img2img, inpainting and outpainting against diffusers, and requests that are refused."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image
from sdonnx_export.packaging.preview import smooth_color_images
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.images.preprocess import outpaint_canvas
from sdonnx_runtime.sampling.scheduler_config import CLASSES
from support.images import disc, photograph
from support.ldm import VARIATIONS, tiny_pipeline
from support.reference import psnr

import sdonnx

PROMPT, SEED, STEPS = "a photograph of an astronaut riding a horse", 11, 8


@pytest.fixture(scope="module")
def pair(export_once, tmp_path_factory):
    directory = tmp_path_factory.mktemp("images")
    pipe = tiny_pipeline(**next(iter(VARIATIONS.values())))
    pipe.save_pretrained(directory / "diffusers")
    return pipe, export_once(directory / "diffusers", directory / "package")


def theirs(kind, pair, sampler, strength, **images):
    pipe, package = pair
    settings = {"clip_sample": False} if sampler == "ddim" else {}  # diffusers' other pipelines set it by themselves
    scheduler = getattr(diffusers, CLASSES[sampler]).from_pretrained(package, subfolder="scheduler", **settings)
    parts = {name: part for name, part in pipe.components.items() if name != "scheduler"}
    other = kind(**parts, scheduler=scheduler, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(SEED)
    options = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "strength": strength, "generator": generator}
    return other(PROMPT, **options, **images).images[0]


def ours(package, sampler, strength, **fields):
    options = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "strength": strength, "seed": SEED}
    with sdonnx.load(package) as pipe:
        return pipe.generate(PROMPT, sampler=sampler, **options, **fields).images[0]


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m", "euler_ancestral"])
def test_img2img_equals_diffusers(pair, sampler, strength):
    _, package = pair
    wanted = theirs(StableDiffusionImg2ImgPipeline, pair, sampler, strength, image=photograph())
    found = ours(package, sampler, strength, image=photograph())
    assert psnr(found, wanted) >= 50
    if strength < 1:
        assert psnr(ours(package, sampler, strength, image=photograph(seed=6)), wanted) < 45, "the image must count"


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m", "euler_ancestral"])
def test_inpainting_equals_diffusers(pair, sampler, strength):
    """With a mask whose edge runs through latent pixels, and without pasting, which diffusers does not do."""
    _, package = pair
    size = {"width": 64, "height": 64}
    images = {"image": photograph(), "mask_image": disc()}
    wanted = theirs(StableDiffusionInpaintPipeline, pair, sampler, strength, **images, **size)
    found = ours(package, sampler, strength, paste=False, **images)
    assert psnr(found, wanted) >= 50


def test_the_image_is_the_same_alone_and_among_several(pair):
    _, package = pair
    fields = {"image": photograph(), "mask_image": disc(), "num_inference_steps": 4, "sampler": "euler_ancestral"}
    with sdonnx.load(package) as pipe:
        both = pipe.generate(PROMPT, seed=SEED, num_images=2, **fields)
        alone = pipe.generate(PROMPT, seed=SEED + 1, **fields)
    np.testing.assert_array_equal(both.images[1], alone.images[0])


@pytest.mark.parametrize("blur", [0, 4])
def test_pasted_pixels_equal_the_originals_bit_by_bit(pair, blur):
    _, package = pair
    found = ours(package, "euler", 1.0, image=photograph(), mask_image=disc(), mask_blur=blur)
    changed = (np.asarray(found) != np.asarray(photograph())).any(axis=2)
    inside = np.asarray(disc()) > 0
    assert not changed[~inside].any()
    assert changed[inside].mean() > 0.5
    unpasted = ours(package, "euler", 1.0, image=photograph(), mask_image=disc(), paste=False)
    assert (np.asarray(unpasted) != np.asarray(photograph())).any(axis=2)[~inside].any()


def test_a_mask_without_a_latent_pixel_is_an_error(pair):
    _, package = pair
    dot = Image.new("L", (64, 64))
    dot.paste(255, (9, 9, 11, 11))
    with (
        sdonnx.load(package) as pipe,
        pytest.raises(RequestError, match="the mask is empty at latent resolution; paint more"),
    ):
        pipe.generate(PROMPT, image=photograph(), mask_image=dot, num_inference_steps=2, paste=False)


def test_with_pasting_the_mask_is_repainted_to_its_last_pixel(pair):
    """Its right and lower edge run through latent pixels whose first pixels are kept."""
    _, package = pair
    mask = Image.new("L", (64, 64))
    mask.paste(255, (9, 9, 11, 11))
    found = ours(package, "euler", 1.0, image=photograph(), mask_image=mask, mask_blur=0)
    changed = (np.asarray(found) != np.asarray(photograph())).any(axis=2)
    assert changed[9:11, 9:11].all()
    assert changed.sum() == 4


def test_strength_0_is_the_round_trip_of_the_vae(pair):
    pipe, package = pair
    with sdonnx.load(package) as opened:
        result = opened.generate(PROMPT, image=photograph(), strength=0, seed=SEED)
    with torch.no_grad():
        values = pipe.image_processor.preprocess(photograph())
        latents = pipe.vae.encode(values).latent_dist.sample(torch.Generator("cpu").manual_seed(SEED))
        (wanted,) = pipe.image_processor.postprocess(pipe.vae.decode(latents).sample, output_type="pil")
    assert result.timings.steps == ()
    assert psnr(result.images[0], wanted) >= 50


def test_png_metadata_holds_the_request_without_images(pair, tmp_path):
    _, package = pair
    with sdonnx.load(package) as pipe:
        result = pipe.generate(PROMPT, image=photograph(), mask_image=disc(), num_inference_steps=2, seed=1)
    sdonnx.save_png(result, 0, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as saved:
        assert '"strength": 1.0' in saved.text["sdonnx"]
        assert "Denoising strength: 1, Mask blur: 4" in saved.text["parameters"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": 1.5}, "strength is 1.5; give a number from 0 to 1"),
        ({"strength": -0.1}, "strength is -0.1"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"strength": 0.01, "num_inference_steps": 20}, "less than one step; give 0.05 or more"),
        ({"strength": 0.3, "num_inference_steps": 3}, "less than one step; give 0.34 or more"),
        ({"mask_image": Image.new("L", (32, 32), 255)}, "mask_image has 32x32 pixels, image has 64x64"),
        ({"mask_image": Image.new("L", (64, 64), 0)}, "the mask is empty (no white pixels)"),
        ({"mask_image": "mask.png"}, "mask_image is str"),
        ({"image": "cat.png"}, "image is str"),
        ({"image": Image.new("RGB", (0, 5))}, "image is empty (0x5)"),
        ({"image": Image.new("F", (64, 64))}, "image has Pillow's mode F, which is not supported"),
        ({"image": Image.new("La", (64, 64))}, "image has Pillow's mode La"),
        ({"mask_image": Image.new("I", (64, 64))}, "mask_image has Pillow's mode I"),
        ({"image": None, "fit": "squeeze"}, "choose crop, pad, stretch"),
        ({"image": None, "mask_blur": -1}, "mask_blur is -1"),
        ({"image": None, "strength": 0.5}, "strength requires image"),
        ({"image": None, "mask_image": disc()}, "mask_image requires image"),
        ({"fit": "squeeze"}, "choose crop, pad, stretch"),
        ({"width": 64}, "with image, width and height are both required, or neither"),
        ({"mask_blur": -1}, "mask_blur is -1"),
        ({"sampler": "lms", "eta": 0.5}, "lms does not support eta"),
        ({"sampler": "euler", "sigmas": (1.0, 2.0)}, "give numbers that decrease"),
        ({"sampler": "ddim", "schedule": "karras"}, "ddim does not support schedule karras"),
        ({"guidance_rescale": 2}, "guidance_rescale is 2"),
    ],
)
def test_a_request_that_can_not_be_served(pair, fields, message):
    _, package = pair
    with sdonnx.load(package) as pipe, pytest.raises(RequestError) as error:
        pipe.resolve(PROMPT, **{"image": photograph(), **fields})
    assert message in str(error.value)


def test_the_least_strength_that_is_named_is_enough(pair):
    _, package = pair
    with sdonnx.load(package) as pipe:
        for steps in (1, 3, 7, 29, 49, 61, 999):
            fields = {"image": photograph(), "num_inference_steps": steps}
            with pytest.raises(RequestError) as error:
                pipe.resolve(PROMPT, strength=1e-4, **fields)
            least = float(str(error.value).split("give ")[1].split()[0])
            pipe.resolve(PROMPT, strength=least, **fields)
            assert steps == 1 or least < 1.1 / steps


def test_strength_is_a_share_of_custom_sigmas(pair):
    _, package = pair
    with sdonnx.load(package) as pipe:
        for sigmas in ((9.0, 4.0, 1.0, 0.3), (9.0, 4.0, 1.0, 0.3, 0.0)):
            stream = pipe.stream(PROMPT, sampler="euler", image=photograph(), strength=0.5, sigmas=sigmas, seed=1)
            assert [step.num_steps for step in stream] == [2, 2]
            assert stream.request.num_inference_steps == 4


def test_sampling_settings_reach_the_sampler(pair):
    """Each changes the image; the timesteps that are the default's do not."""
    _, package = pair
    base = {"seed": SEED, "num_inference_steps": 4, "width": 64, "height": 64}
    with sdonnx.load(package, memory="max") as pipe:
        plain = pipe.generate(PROMPT, sampler="ddim", **base).latents
        for changes in (
            {"eta": 1.0},
            {"timestep_spacing": "trailing"},
            {"guidance_rescale": 0.7},
            {"timesteps": (900, 500, 100, 3)},
        ):
            other = pipe.generate(PROMPT, sampler="ddim", **base, **changes)
            assert np.abs(other.latents - plain).max() > 1e-3, changes
        same = pipe.generate(
            PROMPT, sampler="ddim", timesteps=(751, 501, 251, 1), **{**base, "num_inference_steps": None}
        )
        karras = pipe.generate(PROMPT, sampler="DPM++ 2M Karras", **base)
    np.testing.assert_allclose(same.latents, plain, atol=1e-5)
    assert (karras.request.sampler, karras.request.schedule) == ("dpmpp_2m", "karras")


def test_outpainting_keeps_the_original_pixels(pair):
    _, package = pair
    canvas, mask = outpaint_canvas(photograph(48, 40), (16, 0, 0, 24), area=64 * 64, multiple=8)
    assert canvas.size == mask.size == (64, 64)
    found = ours(package, "euler", None, image=canvas, mask_image=mask)
    np.testing.assert_array_equal(np.asarray(found)[:40, 16:], np.asarray(photograph(48, 40)))
    assert (np.asarray(found) != np.asarray(canvas)).any(axis=2)[np.asarray(mask) > 0].mean() > 0.5


def test_a_preview_is_the_least_squares_fit_to_the_vae(pair, tmp_path):
    pipe, package = pair
    pixels = 16 * pipe.vae_scale_factor
    values = torch.cat([pipe.image_processor.preprocess(image) for image in smooth_color_images(pixels)])
    with torch.no_grad():
        latents = pipe.vae.encode(values).latent_dist.mean * pipe.vae.config.scaling_factor
    pixel_latents = latents.permute(0, 2, 3, 1).flatten(0, 2).double()
    colours = torch.nn.functional.avg_pool2d(values, pipe.vae_scale_factor).permute(0, 2, 3, 1).flatten(0, 2).double()
    wanted = torch.linalg.lstsq(torch.cat([pixel_latents, torch.ones(len(pixel_latents), 1)], dim=1), colours).solution
    with sdonnx.load(package) as opened:
        found = opened.package.manifest.latents.preview
        np.testing.assert_allclose(found, wanted.numpy(), rtol=2e-3, atol=2e-3)
        (step,) = opened.stream(PROMPT, width=64, height=72, num_inference_steps=1, seed=1)
    assert step.preview().size == (64 // pipe.vae_scale_factor, 72 // pipe.vae_scale_factor)
