"""Starting from a picture: img2img, inpainting and outpainting beside diffusers, and what can't be served."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from drawings import disc, photograph
from ldm_fixture import VARIATIONS, tiny_pipeline
from PIL import Image
from sdonnx_export.export import export
from sdonnx_export.packaging.preview import smooth_color_images
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.images.preprocess import outpaint_canvas
from sdonnx_runtime.sampling.scheduler_config import CLASSES

import sdonnx

PROMPT, SEED, STEPS = "a photograph of an astronaut riding a horse", 11, 8


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pictures")
    pipe = tiny_pipeline(**next(iter(VARIATIONS.values())))
    pipe.save_pretrained(directory / "diffusers")
    return pipe, export(str(directory / "diffusers"), directory / "package")


def theirs(kind, pair, sampler, strength, **pictures):
    pipe, package = pair
    settings = {"clip_sample": False} if sampler == "ddim" else {}  # diffusers' other pipelines set it by themselves
    scheduler = getattr(diffusers, CLASSES[sampler]).from_pretrained(package, subfolder="scheduler", **settings)
    parts = {name: part for name, part in pipe.components.items() if name != "scheduler"}
    other = kind(**parts, scheduler=scheduler, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(SEED)
    options = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "strength": strength, "generator": generator}
    return other(PROMPT, **options, **pictures).images[0]


def ours(package, sampler, strength, **fields):
    options = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "strength": strength, "seed": SEED}
    with sdonnx.load(package) as pipe:
        return pipe.generate(PROMPT, sampler=sampler, **options, **fields).images[0]


def psnr(found, wanted):
    error = np.square(np.asarray(found, float) - np.asarray(wanted, float)).mean()
    return 10 * np.log10(255**2 / max(error, 1e-9))


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m", "euler_ancestral"])
def test_img2img_equals_diffusers(pair, sampler, strength):
    _, package = pair
    wanted = theirs(StableDiffusionImg2ImgPipeline, pair, sampler, strength, image=photograph())
    found = ours(package, sampler, strength, image=photograph())
    assert psnr(found, wanted) >= 50
    if strength < 1:
        assert psnr(ours(package, sampler, strength, image=photograph(seed=6)), wanted) < 45, "the picture must count"


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m", "euler_ancestral"])
def test_inpainting_equals_diffusers(pair, sampler, strength):
    """With a mask whose edge runs through latent cells, and without pasting, which diffusers does not do."""
    _, package = pair
    size = {"width": 64, "height": 64}
    pictures = {"image": photograph(), "mask_image": disc()}
    wanted = theirs(StableDiffusionInpaintPipeline, pair, sampler, strength, **pictures, **size)
    found = ours(package, sampler, strength, paste=False, **pictures)
    assert psnr(found, wanted) >= 50


def test_the_picture_is_the_same_alone_and_among_several(pair):
    _, package = pair
    fields = {"image": photograph(), "mask_image": disc(), "num_inference_steps": 4, "sampler": "euler_ancestral"}
    with sdonnx.load(package) as pipe:
        both = pipe.generate(PROMPT, seed=SEED, num_images=2, **fields)
        alone = pipe.generate(PROMPT, seed=SEED + 1, **fields)
    np.testing.assert_array_equal(both.images[1], alone.images[0])


@pytest.mark.parametrize("blur", [0, 4])
def test_kept_pixels_are_kept_bit_by_bit(pair, blur):
    _, package = pair
    found = ours(package, "euler", 1.0, image=photograph(), mask_image=disc(), mask_blur=blur)
    changed = (np.asarray(found) != np.asarray(photograph())).any(axis=2)
    inside = np.asarray(disc()) > 0
    assert not changed[~inside].any()
    assert changed[inside].mean() > 0.5
    unpasted = ours(package, "euler", 1.0, image=photograph(), mask_image=disc(), paste=False)
    assert (np.asarray(unpasted) != np.asarray(photograph())).any(axis=2)[~inside].any()


def test_a_mask_that_reaches_no_latent_cell_is_an_error(pair):
    _, package = pair
    dot = Image.new("L", (64, 64))
    dot.paste(255, (9, 9, 11, 11))
    with sdonnx.load(package) as pipe, pytest.raises(RequestError, match="nothing to repaint; paint more"):
        pipe.generate(PROMPT, image=photograph(), mask_image=dot, num_inference_steps=2, paste=False)


def test_a_pasted_mask_is_painted_anew_to_its_last_pixel(pair):
    """Its right and lower edge run through latent cells whose first pixels are kept."""
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


def test_a_recipe_without_pictures_is_what_a_png_carries(pair, tmp_path):
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
        ({"strength": 0.01, "num_inference_steps": 20}, "less than one; give 0.05 or more"),
        ({"strength": 0.3, "num_inference_steps": 3}, "less than one; give 0.34 or more"),
        ({"mask_image": Image.new("L", (32, 32), 255)}, "the mask has 32x32 pixels and its picture 64x64"),
        ({"mask_image": Image.new("L", (64, 64), 0)}, "nothing to repaint"),
        ({"mask_image": "mask.png"}, "mask_image is str"),
        ({"image": "cat.png"}, "image is str"),
        ({"image": Image.new("RGB", (0, 5))}, "image has 0x5 pixels"),
        ({"image": Image.new("F", (64, 64))}, "image has pixels of Pillow's mode F, whose range is not known"),
        ({"image": Image.new("La", (64, 64))}, "image has pixels of Pillow's mode La"),
        ({"mask_image": Image.new("I", (64, 64))}, "mask_image has pixels of Pillow's mode I"),
        ({"image": None, "fit": "squeeze"}, "choose crop, pad, stretch"),
        ({"image": None, "mask_blur": -1}, "mask_blur is -1"),
        ({"image": None, "strength": 0.5}, "strength is given without an image"),
        ({"image": None, "mask_image": disc()}, "mask_image is given without an image"),
        ({"fit": "squeeze"}, "choose crop, pad, stretch"),
        ({"width": 64}, "together"),
        ({"mask_blur": -1}, "mask_blur is -1"),
        ({"sampler": "lms", "eta": 0.5}, "lms takes no eta"),
        ({"sampler": "euler", "sigmas": (1.0, 2.0)}, "decreasing"),
        ({"sampler": "ddim", "schedule": "karras"}, "ddim keeps to the model's own timesteps"),
        ({"guidance_rescale": 2}, "guidance_rescale is 2"),
    ],
)
def test_a_request_that_can_not_be_served(pair, fields, message):
    _, package = pair
    with sdonnx.load(package) as pipe, pytest.raises(RequestError) as error:
        pipe.check(PROMPT, **{"image": photograph(), **fields})
    assert message in str(error.value)


def test_the_least_strength_that_is_named_is_enough(pair):
    _, package = pair
    with sdonnx.load(package) as pipe:
        for steps in (1, 3, 7, 29, 49, 61, 999):
            fields = {"image": photograph(), "num_inference_steps": steps}
            with pytest.raises(RequestError) as error:
                pipe.check(PROMPT, strength=1e-4, **fields)
            least = float(str(error.value).split("give ")[1].split()[0])
            pipe.check(PROMPT, strength=least, **fields)
            assert steps == 1 or least < 1.1 / steps


def test_given_levels_are_the_steps_that_strength_is_a_share_of(pair):
    _, package = pair
    with sdonnx.load(package) as pipe:
        for sigmas in ((9.0, 4.0, 1.0, 0.3), (9.0, 4.0, 1.0, 0.3, 0.0)):
            stream = pipe.stream(PROMPT, sampler="euler", image=photograph(), strength=0.5, sigmas=sigmas, seed=1)
            assert [step.num_steps for step in stream] == [2, 2]
            assert stream.request.num_inference_steps == 4


def test_sampling_settings_reach_the_sampler(pair):
    """Each changes the picture; the timesteps that are the default's do not."""
    _, package = pair
    base = {"seed": SEED, "num_inference_steps": 4, "width": 64, "height": 64}
    with sdonnx.load(package, memory="max") as pipe:
        plain = pipe.generate(PROMPT, sampler="ddim", **base).latents
        for changes in (
            {"eta": 1.0},
            {"spacing": "trailing"},
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


def test_outpainting_keeps_what_is_there(pair):
    _, package = pair
    canvas, mask = outpaint_canvas(photograph(48, 40), (16, 0, 0, 24), area=64 * 64, multiple=8)
    assert canvas.size == mask.size == (64, 64)
    found = ours(package, "euler", None, image=canvas, mask_image=mask)
    np.testing.assert_array_equal(np.asarray(found)[:40, 16:], np.asarray(photograph(48, 40)))
    assert (np.asarray(found) != np.asarray(canvas)).any(axis=2)[np.asarray(mask) > 0].mean() > 0.5


def test_a_preview_is_the_least_squares_fit_to_the_vae(pair, tmp_path):
    pipe, package = pair
    pixels = 16 * pipe.vae_scale_factor
    values = torch.cat([pipe.image_processor.preprocess(picture) for picture in smooth_color_images(pixels)])
    with torch.no_grad():
        latents = pipe.vae.encode(values).latent_dist.mean * pipe.vae.config.scaling_factor
    cells = latents.permute(0, 2, 3, 1).flatten(0, 2).double()
    colours = torch.nn.functional.avg_pool2d(values, pipe.vae_scale_factor).permute(0, 2, 3, 1).flatten(0, 2).double()
    wanted = torch.linalg.lstsq(torch.cat([cells, torch.ones(len(cells), 1)], dim=1), colours).solution
    with sdonnx.load(package) as opened:
        found = opened.package.manifest.latents.preview
        np.testing.assert_allclose(found, wanted.numpy(), rtol=2e-3, atol=2e-3)
        (step,) = opened.stream(PROMPT, width=64, height=72, num_inference_steps=1, seed=1)
    assert step.preview().size == (64 // pipe.vae_scale_factor, 72 // pipe.vae_scale_factor)
