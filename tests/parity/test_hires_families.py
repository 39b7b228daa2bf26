"""The second pass of families whose conditioning depends on the size, against diffusers' two pipelines in a row."""

import warnings

import numpy as np
import torch
from diffusers import (
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image
from support.controls import controlnet
from support.images import photograph
from support.reference import NEGATIVE, PROMPT, SEED

import sdonnx

FIRST = {"width": 64, "height": 96, "num_inference_steps": 5}
SECOND = {"hires_scale": 1.5, "hires_strength": 0.6, "hires_steps": 5}
LAST = {"strength": 0.6, "num_inference_steps": 5}
LARGER = (96, 144)
COMMON = {"guidance_scale": 5.0, "negative_prompt": NEGATIVE}


def call(pipe, **given):
    generator = torch.Generator("cpu").manual_seed(SEED)
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe(PROMPT, generator=generator, output_type="latent", **COMMON, **given).images


def enlarge(latents):
    size = LARGER[1] // 8, LARGER[0] // 8
    return torch.nn.functional.interpolate(latents, size=size, mode="bilinear", align_corners=False)


def difference(found, wanted):
    return float(np.abs(found.latents - wanted.numpy()).max() / np.abs(wanted.numpy()).max())


def xl(kind, pipe, **parts):
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    return kind(**{name: getattr(pipe, name) for name in names}, add_watermarker=False, **parts)


def test_sdxl_is_told_the_size_of_each_pass(opened):
    pipe, ours = opened("sdxl")
    wanted = call(xl(StableDiffusionXLImg2ImgPipeline, pipe), image=enlarge(call(pipe, **FIRST)), **LAST)
    assert difference(ours.generate(PROMPT, seed=SEED, **COMMON, **FIRST, **SECOND), wanted) < 2e-5
    fixed = {"original_size": LARGER, "target_size": LARGER}  # what the request gives counts in both passes
    sizes = {"original_size": LARGER[::-1], "target_size": LARGER[::-1]}
    other = call(xl(StableDiffusionXLImg2ImgPipeline, pipe), image=enlarge(call(pipe, **FIRST, **sizes)), **LAST)
    assert difference(ours.generate(PROMPT, seed=SEED, **COMMON, **FIRST, **SECOND, **fixed), other) < 2e-5
    assert float(np.abs(other - wanted).max()) > 1e-3


def test_the_refiner_is_told_the_size_of_each_pass(opened):
    (pipe, base), (refiner, last) = opened("sdxl"), opened("refiner")
    share, rest = {"denoising_end": 0.6}, {"denoising_start": 0.6, "num_inference_steps": 5}
    first = call(refiner, image=call(pipe, **FIRST, **share), **rest)
    halfway = call(xl(StableDiffusionXLImg2ImgPipeline, pipe), image=enlarge(first), **share, **LAST)
    wanted = call(refiner, image=halfway, **rest)
    with sdonnx.load(base.package.root, refiner=last.package.root) as both:
        found = both.generate(PROMPT, seed=SEED, refiner_start=0.6, **COMMON, **FIRST, **SECOND)
    assert difference(found, wanted) < 2e-5


def test_a_controlled_second_pass_of_sdxl(opened, export_once, tmp_path):
    pipe, ours = opened("sdxl")
    net, edges = controlnet(pipe.unet), photograph(64, 96)
    net.save_pretrained(tmp_path / "net")
    package = export_once(tmp_path / "net", tmp_path / "package")
    first = call(xl(StableDiffusionXLControlNetPipeline, pipe, controlnet=net), image=edges, **FIRST)
    second = xl(StableDiffusionXLControlNetImg2ImgPipeline, pipe, controlnet=net)
    larger = edges.resize(LARGER, Image.Resampling.LANCZOS)
    scale = {"controlnet_conditioning_scale": 1.0}
    wanted = call(second, image=enlarge(first), control_image=larger, **scale, **LAST)
    with sdonnx.load(ours.package.root, controls=[package]) as controlled:
        control = (sdonnx.Control(image=edges),)
        found = controlled.generate(PROMPT, seed=SEED, controls=control, **COMMON, **FIRST, **SECOND)
    assert difference(found, wanted) < 2e-5
