"""The second pass at a larger size, against diffusers' two pipelines one after another."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from sd_parsers import ParserManager
from sdonnx_runtime.denoising.init_image import resize_latents
from sdonnx_runtime.errors import DeviceError, PackageError, RequestError
from sdonnx_runtime.execution import staged_model as chain
from sdonnx_runtime.outputs.latents_file import load_latents, save_latents
from sdonnx_runtime.packages.upscaler_config import UpscalerConfig
from sdonnx_runtime.sampling.registry import SAMPLERS
from sdonnx_runtime.sampling.scheduler_config import CLASSES
from support.ldm import VARIATIONS, tiny_pipeline
from support.reference import psnr

import sdonnx

PROMPT, SEED = "a photograph of an astronaut riding a horse", 11
FIRST = {"width": 64, "height": 72, "num_inference_steps": 6, "guidance_scale": 5.0, "seed": SEED}
SECOND = {"hires_scale": 1.5, "hires_strength": 0.6, "hires_steps": 8}
LARGER = (96, 112)  # 1.5 times 72 is half-way between multiples of 8

BILINEAR = {"mode": "bilinear", "align_corners": False, "antialias": False}


@pytest.fixture(scope="module")
def pair(export_once, tmp_path_factory):
    directory = tmp_path_factory.mktemp("hires")
    pipe = tiny_pipeline(**next(iter(VARIATIONS.values())))
    pipe.save_pretrained(directory / "diffusers")
    return pipe, export_once(directory / "diffusers", directory / "package")


@pytest.fixture(scope="module")
def opened(pair):
    with sdonnx.load(pair[1], memory="max") as pipe:
        yield pipe


def theirs(pair, sampler, upscaler):
    pipe, package = pair

    def run(kind, **given):
        settings = {"clip_sample": False} if sampler == "ddim" else {}  # diffusers' img2img sets it by itself
        scheduler = getattr(diffusers, CLASSES[sampler]).from_pretrained(package, subfolder="scheduler", **settings)
        parts = {name: part for name, part in pipe.components.items() if name != "scheduler"}
        other = kind(**parts, scheduler=scheduler, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(SEED)
        return other(PROMPT, guidance_scale=5.0, generator=generator, **given).images

    first = {"width": 64, "height": 72, "num_inference_steps": 6}
    if upscaler == "latent":
        latents = run(StableDiffusionPipeline, output_type="latent", **first)
        larger = torch.nn.functional.interpolate(latents, size=(LARGER[1] // 8, LARGER[0] // 8), **BILINEAR)
    else:
        image = run(StableDiffusionPipeline, **first)[0]
        image = image if upscaler == "lanczos" else upscaler(image)
        larger = image.resize(LARGER, Image.Resampling.LANCZOS)
    return run(StableDiffusionImg2ImgPipeline, image=larger, strength=0.6, num_inference_steps=8)[0]


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m", "euler_ancestral"])
def test_two_passes_equal_those_of_diffusers(pair, opened, sampler, upscaler):
    wanted = theirs(pair, sampler, upscaler)
    made = opened.generate(PROMPT, sampler=sampler, hires_upscaler=upscaler, **FIRST, **SECOND)
    assert made.images[0].size == wanted.size == LARGER
    assert psnr(made.images[0], wanted) >= 50
    other = {"latent": "lanczos", "lanczos": "latent"}[upscaler]
    differing = opened.generate(PROMPT, sampler=sampler, hires_upscaler=other, **FIRST, **SECOND).images[0]
    assert psnr(differing, wanted) < 45, "the upscaler must count"


def test_an_upscaler_between_the_passes(pair, upscaler):
    upscale, package = upscaler
    wanted = theirs(pair, "euler", upscale)
    asked = {"sampler": "euler", **FIRST, **SECOND}
    with sdonnx.load(pair[1], upscaler=package, memory="max") as pipe:
        stream, tiles = pipe.stream(PROMPT, **asked), []
        stream.on_upscaling(lambda *each: tiles.append(each))
        *_, last = stream
        assert (last.step, tiles) == (9, [(1, 1)])
        made = stream.result
        assert made.request.hires_upscaler == "sharp.safetensors"
        assert psnr(made.images[0], wanted) >= 50
        differing = pipe.generate(PROMPT, hires_upscaler="lanczos", **asked)
        assert psnr(differing.images[0], wanted) < 45, "the upscaler must count"
        planned = [each.component for each in pipe.plan(PROMPT, always=True, **asked).components]
        assert planned.index("upscaler/upscaler") > planned.index("unet")
        others = pipe.plan(PROMPT, always=True, hires_upscaler="latent", **asked).components
        assert "upscaler/upscaler" not in [each.component for each in others]
        with pytest.raises(RequestError, match="choose latent, lanczos, sharp.safetensors$"):
            pipe.resolve(PROMPT, hires_upscaler="bicubic", **asked)
    with sdonnx.load(pair[1], upscaler=package, memory="min") as pipe:
        assert psnr(pipe.generate(PROMPT, **asked).images[0], wanted) >= 50


def test_packages_that_are_no_upscalers(pair, opened):
    with pytest.raises(PackageError, match="not an upscaler; give"):
        sdonnx.load(pair[1], upscaler=pair[1])
    with pytest.raises(RequestError, match="or load an upscaler with --hires-upscaler PACKAGE"):
        opened.resolve(PROMPT, hires_upscaler="sharp", **SECOND)


@pytest.mark.parametrize(
    ("scale", "factor", "passes"), [(4, 1, 1), (4, 1.5, 1), (2, 2, 1), (2, 2.1, 2), (3, 9, 2), (2, 8, 3), (1, 3, 1)]
)
def test_an_upscaler_runs_as_often_as_it_takes(scale, factor, passes):
    assert UpscalerConfig(architecture="", scale=scale, multiple=1, receptive_field=1).passes(factor) == passes


@pytest.mark.parametrize("size", [(16, 16), (12, 9), (8, 13), (8, 9)])
def test_latents_are_interpolated_as_torch_does(size):
    latents = np.random.default_rng(3).normal(size=(1, 4, 8, 9)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(torch.from_numpy(latents).double(), size=size, **BILINEAR)
    np.testing.assert_allclose(resize_latents(latents, *size), wanted, atol=1e-6)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "restart"])
@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_steps_are_counted_over_both_passes(opened, sampler, upscaler):
    asked = {"hires_scale": 2, "hires_strength": 0.5, "hires_upscaler": upscaler, "num_images": 2}
    stream = opened.stream(PROMPT, sampler=sampler, **asked, **FIRST)
    steps = list(stream)
    each = steps[0].num_steps
    assert {step.num_steps for step in steps} == {each}
    assert {(step.image, step.step) for step in steps} == {(i, s) for i in range(2) for s in range(each)}
    assert len(steps) == 2 * each
    shapes = [step.latents.shape[2:] for step in steps]
    assert set(shapes) == {(9, 8), (18, 16)}
    assert shapes == sorted(shapes)
    assert each == 9 or sampler == "restart"
    assert steps[-1].preview().size == (16, 18)
    assert stream.result.latents.shape == (2, 4, 18, 16)
    assert stream.result.request.hires_steps == 6


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_an_image_alone_is_the_one_among_several(opened, upscaler):
    asked = {"hires_scale": 1.5, "hires_upscaler": upscaler, "sampler": "euler_ancestral", **FIRST}
    both = opened.generate(PROMPT, num_images=2, **asked)
    alone = opened.generate(PROMPT, **{**asked, "seed": SEED + 1})
    np.testing.assert_array_equal(both.images[1], alone.images[0])


def test_strength_0_only_upscales(opened):
    first = opened.generate(PROMPT, **FIRST)
    larger = opened.generate(PROMPT, hires_scale=2, hires_strength=0, **FIRST)
    np.testing.assert_array_equal(larger.latents, resize_latents(first.latents, 18, 16))


def test_an_image_may_be_what_the_first_pass_starts_from(opened):
    start = Image.effect_mandelbrot((64, 72), (-2, -1, 1, 1), 20).convert("RGB")
    first = opened.generate(PROMPT, image=start, strength=0.5, **FIRST)
    both = opened.stream(PROMPT, image=start, strength=0.5, hires_scale=1.5, **FIRST)
    steps = list(both)
    assert steps[0].num_steps == 3 + 3
    np.testing.assert_array_equal(steps[2].latents, first.latents)
    assert both.result.images[0].size == LARGER


def test_a_recipe_tells_of_both_passes_and_makes_the_image_again(opened, tmp_path):
    made = opened.generate(PROMPT, hires_scale=2, hires_upscaler="lanczos", sampler="euler", **FIRST)
    sdonnx.save_png(made, 0, tmp_path / "a.png")
    metadata = ParserManager().parse(tmp_path / "a.png").metadata
    assert (metadata["Size"], metadata["Denoising strength"]) == ("64x72", "0.55")
    assert (metadata["Hires upscale"], metadata["Hires steps"]) == ("2", "6")
    assert metadata["Hires upscaler"] == "Lanczos"
    with Image.open(tmp_path / "a.png") as saved:
        recipe = json.loads(saved.text["sdonnx"])
    recipe.pop("model")
    np.testing.assert_array_equal(opened.generate(sdonnx.Request(**recipe)).images[0], made.images[0])
    save_latents(tmp_path / "a.npz", made.latents, made.request, made.model)
    latents, request, _ = load_latents(tmp_path / "a.npz")
    assert request == made.request
    np.testing.assert_array_equal(opened.decode(latents)[0], made.images[0])


def test_a_second_pass_that_fails_leaves_the_first_ones_latents(pair, monkeypatch):
    real = chain.Session.run

    def run(self, feeds, keep=()):
        if "sample" in feeds and feeds["sample"].shape[-1] == 16:
            raise DeviceError("too little memory")
        return real(self, feeds, keep)

    with sdonnx.load(pair[1]) as pipe:
        first = pipe.generate(PROMPT, **FIRST)
        monkeypatch.setattr(chain.Session, "run", run)
        stream = pipe.stream(PROMPT, hires_scale=2, **FIRST)
        with pytest.raises(DeviceError):
            list(stream)
    np.testing.assert_array_equal(stream.latents, first.latents)
    assert stream.latents_request == first.request


def test_leaving_the_second_pass_frees_the_pipeline(pair):
    with sdonnx.load(pair[1]) as pipe:
        stream = pipe.stream(PROMPT, hires_scale=2, hires_upscaler="lanczos", **FIRST)
        for step in stream:
            if step.latents.shape[-1] == 16:
                break
        stream.close()
        assert len(pipe.generate(PROMPT, **FIRST).images) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hires_scale": 0.5}, "hires_scale is 0.5; give a number from 1 to 8"),
        ({"hires_scale": float("nan")}, "hires_scale is nan"),
        ({"hires_scale": "2x"}, "hires_scale is '2x'"),
        ({"hires_scale": 2, "hires_strength": 1.2}, "hires_strength is 1.2"),
        ({"hires_scale": 2, "hires_strength": 0.01}, "less than one step; give 0.17 or more"),
        ({"hires_scale": 2, "hires_steps": 0}, "hires_steps is 0"),
        ({"hires_scale": 2, "hires_upscaler": "esrgan"}, "choose latent, lanczos"),
        ({"hires_scale": 2, "hires_steps": 3, "sigmas": (5.0, 1.0)}, "leave it out"),
        ({"hires_scale": 8, "width": 8192}, "the second pass's width is 65536"),
        ({"hires_strength": 0.5}, "hires_strength requires hires_scale"),
        ({"hires_upscaler": "latent"}, "hires_upscaler requires"),
        (
            {"hires_scale": 2, "image": Image.new("RGB", (64, 72)), "mask_image": Image.new("L", (64, 72), 255)},
            "hires_scale does not support mask_image",
        ),
    ],
)
def test_a_second_pass_that_can_not_be_served(opened, fields, message):
    with pytest.raises(RequestError) as error:
        opened.resolve(PROMPT, **{**FIRST, "sampler": "euler", **fields})
    assert message in str(error.value)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_steps_that_are_announced_are_taken(opened, sampler):
    small = {**FIRST, "height": 64, "num_inference_steps": 5, "guidance_scale": 1}
    steps = list(opened.stream(PROMPT, sampler=sampler, hires_scale=1, hires_strength=0.6, **small))
    assert [step.step for step in steps] == list(range(steps[0].num_steps))


def test_both_hires_passes_use_the_custom_sigmas(opened):
    asked = {**FIRST, "num_inference_steps": None, "sampler": "euler", "sigmas": (9.0, 4.0, 1.0, 0.3)}
    stream = opened.stream(PROMPT, hires_scale=1.5, hires_strength=0.5, **asked)
    assert [step.step for step in stream] == [0, 1, 2, 3, 4, 5]
    assert opened.resolve(stream.result.request).request == stream.result.request
