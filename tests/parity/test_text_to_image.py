"""From checkpoint to image, against diffusers and optimum on tiny random models."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from optimum.onnxruntime import ORTStableDiffusionPipeline
from sdonnx_export.export import export
from sdonnx_runtime.packages.manifest import MANIFEST
from support.ldm import VARIATIONS, save_ldm, tiny_pipeline
from support.reference import psnr

import sdonnx

PROMPT, NEGATIVE = "a photograph of an astronaut riding a horse", "blurry, low quality"
SETTINGS = [
    {"width": 64, "height": 64, "num_inference_steps": 6, "guidance_scale": 7.5},
    {"width": 96, "height": 64, "num_inference_steps": 5, "guidance_scale": 1.0},
    {"width": 72, "height": 104, "num_inference_steps": 5, "guidance_scale": 4.0},
]
SEED = 11


@pytest.fixture(scope="module", params=VARIATIONS)
def pair(request, export_once, tmp_path_factory):
    """A diffusers pipeline, and our packages from its directory and from its weights as one LDM-layout file."""
    directory = tmp_path_factory.mktemp("parity")
    pipe = tiny_pipeline(**VARIATIONS[request.param])
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(directory / "diffusers")
    save_ldm(pipe, directory / "single.safetensors")
    packages = {
        "directory": export_once(directory / "diffusers", directory / "from-directory"),
        "single file": export_once(directory / "single.safetensors", directory / "from-file"),
    }
    return pipe, packages


def reference(pipe, settings, count):
    """Latents and images of diffusers, each image from a generator of its own."""
    generators = [torch.Generator("cpu").manual_seed(SEED + index) for index in range(count)]
    common = {**settings, "prompt": PROMPT, "negative_prompt": NEGATIVE, "num_images_per_prompt": count}
    latents = pipe(**common, generator=generators, output_type="latent").images
    with torch.no_grad():
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return latents.numpy(), pipe.image_processor.postprocess(images.detach(), output_type="pil")


@pytest.mark.parametrize("source", ["directory", "single file"])
@pytest.mark.parametrize(("settings", "count"), [(SETTINGS[0], 1), (SETTINGS[1], 2), (SETTINGS[2], 2)])
def test_images_equal_those_of_diffusers(pair, source, settings, count):
    pipe, packages = pair
    latents, images = reference(pipe, settings, count)
    result = sdonnx.load(packages[source]).generate(
        PROMPT, negative_prompt=NEGATIVE, seed=SEED, num_images=count, **settings
    )
    assert np.abs(result.latents - latents).max() < 1e-3
    assert min(psnr(*both) for both in zip(result.images, images, strict=True)) > 50
    spread = np.asarray(result.images[0], np.float64).std()
    assert spread > 5, "a flat image would equal anything flat"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("optimum")
    pipe = tiny_pipeline(**next(iter(VARIATIONS.values())))
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(directory / "diffusers")
    return directory, pipe


def ours(package, settings):
    return sdonnx.load(package).generate(PROMPT, negative_prompt=NEGATIVE, seed=SEED, **settings).images[0]


def test_our_package_opens_in_optimum(tiny, export_once):
    directory, _ = tiny
    package = export_once(directory / "diffusers", directory / "for-optimum")
    pipe = ORTStableDiffusionPipeline.from_pretrained(package, provider="CPUExecutionProvider")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(SEED)
    settings = SETTINGS[0]
    theirs = pipe(prompt=PROMPT, negative_prompt=NEGATIVE, generator=generator, **settings).images[0]
    assert psnr(ours(package, settings), theirs) > 50


def test_an_optimum_export_opens_here(tiny):
    """Written by optimum-cli, and by ``--via optimum``, which adds our manifest."""
    directory, pipe = tiny
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "onnx"]
    options = ["--task", "text-to-image", "--model", str(directory / "diffusers"), str(directory / "theirs")]
    subprocess.run([*command, *options], check=True, capture_output=True)
    via = export(str(directory / "diffusers"), directory / "via", via="optimum")
    assert not (directory / "theirs" / MANIFEST).exists()
    assert (via / MANIFEST).exists()
    _, (wanted,) = reference(pipe, SETTINGS[0], 1)
    for package in (directory / "theirs", via):
        assert psnr(ours(package, SETTINGS[0]), wanted) > 50


def test_a_vae_from_elsewhere_replaces_the_checkpoints_own(tiny):
    directory, pipe = tiny
    other = tiny_pipeline(**{**next(iter(VARIATIONS.values())), "seed": 5}).vae
    other.register_to_config(scaling_factor=0.5)
    other.save_pretrained(directory / "vae")
    package = export(str(directory / "diffusers"), directory / "other-vae", vae=str(directory / "vae"))
    latents, (own,) = reference(pipe, SETTINGS[0], 1)
    with torch.no_grad():
        image = other.decode(torch.from_numpy(latents) / 0.5).sample
    (wanted,) = pipe.image_processor.postprocess(image, output_type="pil")
    found = ours(package, SETTINGS[0])
    assert psnr(found, wanted) > 50
    assert psnr(found, own) < 30


def test_fp16_package_is_half_as_large_and_nearly_the_same_image(tiny, export_once):
    directory, _ = tiny
    whole = export_once(directory / "diffusers", directory / "fp32")
    half = export_once(directory / "diffusers", directory / "fp16", precision="fp16")
    size = {path: sum(f.stat().st_size for f in path.rglob("*.onnx_data")) for path in (whole, half)}
    assert size[half] < 0.55 * size[whole]
    pipe16 = tiny_pipeline(**next(iter(VARIATIONS.values())))
    pipe16.set_progress_bar_config(disable=True)
    for module in (pipe16.unet, pipe16.vae, pipe16.text_encoder):
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.half().float()
    _, (wanted,) = reference(pipe16, SETTINGS[0], 1)
    assert psnr(ours(half, SETTINGS[0]), wanted) > 50
