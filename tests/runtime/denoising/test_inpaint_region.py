"""Inpainting in a crop region of an image, against diffusers' crop region and pipeline."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from sd_parsers import ParserManager
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.images.crop import masked_region
from sdonnx_runtime.images.preprocess import to_mask
from sdonnx_runtime.outputs.latents_file import load_latents, save_latents
from sdonnx_runtime.sampling.scheduler_config import CLASSES
from support.ldm import VARIATIONS, tiny_pipeline
from support.reference import psnr

import sdonnx

PROMPT, SEED, STEPS = "a photograph of an astronaut riding a horse", 11, 6


def photograph(width, height):
    coarse = np.random.default_rng(5).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def rectangle(size, box):
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


@pytest.fixture(scope="module")
def pair(export_once, tmp_path_factory):
    directory = tmp_path_factory.mktemp("regions")
    pipe = tiny_pipeline(**next(iter(VARIATIONS.values())))
    pipe.save_pretrained(directory / "diffusers")
    return pipe, export_once(directory / "diffusers", directory / "package")


def theirs(pair, sampler, **given):
    pipe, package = pair
    scheduler = getattr(diffusers, CLASSES[sampler]).from_pretrained(package, subfolder="scheduler")
    parts = {name: part for name, part in pipe.components.items() if name != "scheduler"}
    other = StableDiffusionInpaintPipeline(**parts, scheduler=scheduler, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(SEED)
    options = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "generator": generator}
    return other(PROMPT, **options, **given).images[0]


def test_the_region_is_the_one_that_diffusers_takes():
    random = np.random.default_rng(1)
    for _ in range(2000):
        width, height, work_width, work_height = (int(side) for side in random.integers(8, 400, 4))
        left, top = int(random.integers(width)), int(random.integers(height))
        right, bottom = int(random.integers(left, width)) + 1, int(random.integers(top, height)) + 1
        mask, padding = rectangle((width, height), (left, top, right, bottom)), int(random.integers(0, 80))
        wanted = VaeImageProcessor.get_crop_region(mask, work_width, work_height, pad=padding)
        assert masked_region(mask, (work_width, work_height), padding).box == wanted


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize(
    ("size", "box", "padding", "work", "strength"),
    [
        ((160, 176), (48, 48, 112, 112), 32, (64, 64), 1.0),
        ((160, 176), (64, 64, 96, 96), 16, (128, 128), 0.7),
        ((144, 80), (40, 24, 104, 40), 0, (128, 64), 1.0),
        ((128, 64), (0, 0, 32, 32), 0, (64, 64), 1.0),
    ],
)
def test_inpainting_a_crop_region_equals_diffusers(pair, sampler, size, box, padding, work, strength):
    """With masks that end at latent pixels' edges; other masks are another test's."""
    image, mask = photograph(*size), rectangle(size, box)
    given = {"image": image, "mask_image": mask, "padding_mask_crop": padding, "strength": strength}
    wanted = theirs(pair, sampler, width=work[0], height=work[1], **given)
    sizes = {"width": work[0], "height": work[1], "num_inference_steps": STEPS, "guidance_scale": 5.0}
    with sdonnx.load(pair[1]) as pipe:
        found = pipe.generate(PROMPT, sampler=sampler, seed=SEED, mask_blur=0, **sizes, **given).images[0]
    assert found.size == size
    assert psnr(found.crop(box), wanted.crop(box)) >= 50
    assert psnr(found.crop(box), image.crop(box)) < 30, "the mask must be repainted"
    outside = np.asarray(mask) == 0
    np.testing.assert_array_equal(np.asarray(found)[outside], np.asarray(image)[outside])


@pytest.mark.parametrize("work", [(64, 64), (64, 128), (128, 64), (40, 64)])
@pytest.mark.parametrize("box", [(10, 20, 31, 33), (0, 0, 150, 8), (139, 50, 150, 60), (3, 2, 5, 88)])
def test_a_crop_is_pasted_back_in_its_place(work, box):
    """Where the image is too low or narrow for the shape too."""
    image = photograph(150, 90)
    region = masked_region(rectangle(image.size, box), work, 12)
    part = region.crop(image)
    assert part.size == work
    again = region.paste(part, Image.new("RGB", image.size))
    assert psnr(again.crop(region.box), image.crop(region.box)) > 32
    left, top, right, bottom = region.inner
    shape = (region.box[2] - region.box[0]) / (region.box[3] - region.box[1])
    assert (right - left) / (bottom - top) == pytest.approx(shape, rel=0.1)


def test_the_part_that_a_low_image_can_not_fill_repeats_its_edge():
    image = photograph(200, 40)
    part = np.asarray(masked_region(rectangle((200, 40), (20, 10, 180, 30)), (64, 64), 0).crop(image))
    height = 64 * 40 // 160
    above = 32 - height // 2
    assert (part[:above] == part[above]).all()
    assert (part[above + height :] == part[above + height - 1]).all()


@pytest.mark.parametrize("blur", [0, 5])
def test_the_image_keeps_its_size_and_its_pixels(pair, blur, tmp_path):
    """With a mask of any form, at a size that no latents have, and several images."""
    image = photograph(301, 203)
    mask = to_mask(Image.radial_gradient("L").resize((301, 203)).point(lambda value: 255 * (value < 60)))
    with sdonnx.load(pair[1]) as pipe:
        settings = {"num_inference_steps": 3, "width": 64, "height": 64, "seed": SEED, "mask_blur": blur}
        given = {"image": image, "mask_image": mask, "padding_mask_crop": 16}
        made = pipe.generate(PROMPT, num_images=2, **settings, **given)
        alone = pipe.generate(PROMPT, **{**settings, "seed": SEED + 1}, **given)
    np.testing.assert_array_equal(made.images[1], alone.images[0])
    changed = (np.asarray(made.images[0]) != np.asarray(image)).any(axis=2)
    inside = np.asarray(mask) > 0
    assert not changed[~inside].any()
    assert changed[inside].mean() > 0.8
    assert made.latents.shape == (2, 4, 8, 8)
    save_latents(tmp_path / "a.npz", made.latents, made.request, made.model)
    assert load_latents(tmp_path / "a.npz")[1].padding_mask_crop == 16
    sdonnx.save_png(made, 0, tmp_path / "a.png")
    metadata = ParserManager().parse(tmp_path / "a.png").metadata
    assert (metadata["Inpaint area"], metadata["Masked area padding"]) == ("Only masked", "16")


def test_the_size_is_the_models_own_where_none_is_asked_for(pair):
    with sdonnx.load(pair[1]) as pipe:
        given = {"image": photograph(301, 203), "mask_image": rectangle((301, 203), (9, 9, 50, 90))}
        checked = pipe.resolve(PROMPT, padding_mask_crop=0, **given)
        size = pipe.package.manifest.defaults.size
    assert (checked.request.width, checked.request.height) == (size, size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"padding_mask_crop": -1}, "padding_mask_crop is -1"),
        ({"padding_mask_crop": 2.5}, "padding_mask_crop is 2.5"),
        ({"mask_image": None}, "padding_mask_crop requires mask_image"),
        ({"mask_image": None, "image": None}, "padding_mask_crop requires image"),
        ({"paste": False}, "padding_mask_crop requires paste; leave it on"),
        ({"tiling": "x"}, "padding_mask_crop does not support tiling, since a crop does not tile; leave one out"),
    ],
)
def test_a_region_that_can_not_be_served(pair, fields, message):
    given = {"image": photograph(64, 64), "mask_image": rectangle((64, 64), (8, 8, 24, 24)), "padding_mask_crop": 8}
    with sdonnx.load(pair[1]) as pipe, pytest.raises(RequestError) as error:
        pipe.resolve(PROMPT, **{**given, **fields})
    assert message in str(error.value)
