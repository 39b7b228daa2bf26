"""Any VAE as a package of its own, and packages with tiny VAEs, against diffusers."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from huggingface_hub.utils import filter_repo_objects
from optimum.onnxruntime import ORTStableDiffusionImg2ImgPipeline
from PIL import Image
from sdonnx_export.checkpoints.open import open_vae_alone
from sdonnx_export.export import export
from sdonnx_runtime.errors import ExportError
from support.cli import run_cli
from support.families import scheduler, sd1, sdxl, tiny_vae, vae
from support.images import disc, photograph
from support.reference import psnr

import sdonnx

SCALE = 0.4
"""Of a VAE that is given at run time; not the checkpoints'."""
PROMPT, SEED, STEPS = "a photograph of an astronaut riding a horse", 11, 4
ASKED = {"width": 64, "height": 64, "num_inference_steps": STEPS, "guidance_scale": 5.0}


def saved(pipe, directory):
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tiny(export_once, tmp_path_factory):
    """A checkpoint that is published with a tiny VAE, as SDXS is, and its package."""
    directory = tmp_path_factory.mktemp("tiny")
    pipe = sd1(vae=tiny_vae(scaling_factor=0.7), scheduler=scheduler(EulerDiscreteScheduler))
    return pipe, export_once(saved(pipe, directory / "checkpoint"), directory / "package")


@pytest.fixture(scope="module")
def whole(export_once, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    pipe = sd1(scheduler=scheduler(EulerDiscreteScheduler))
    return pipe, export_once(saved(pipe, directory / "checkpoint"), directory / "package")


@pytest.fixture(scope="module", params=["AutoencoderTiny", "AutoencoderKL"])
def alone(request, tmp_path_factory):
    """A VAE and the package of it alone."""
    directory = tmp_path_factory.mktemp("alone")
    made = {"AutoencoderTiny": tiny_vae, "AutoencoderKL": vae}[request.param](scaling_factor=SCALE)
    made.save_pretrained(directory / "vae")
    return made, export(None, directory / "package", vae=str(directory / "vae"))


def theirs(pipe, vae=None, kind=None, **images):
    """Latents and image of diffusers, with another VAE or in another pipeline where one is given."""
    other = (kind or type(pipe))(**{**pipe.components, **({} if vae is None else {"vae": vae})})
    other.set_progress_bar_config(disable=True)
    fields = {name: value for name, value in ASKED.items() if not images or name not in ("width", "height")}
    latents, made = (
        other(PROMPT, **fields, **images, generator=torch.Generator("cpu").manual_seed(SEED), output_type=output)
        for output in ("latent", "pil")
    )
    return latents.images.numpy(), made.images[0]


def assert_equal(result, wanted):
    latents, image = wanted
    assert np.abs(result.latents - latents).max() < 1e-3
    assert psnr(result.images[0], image) >= 50
    assert np.asarray(image, float).std() > 5, "a flat image would equal anything flat"


def assert_equals_diffusers(pipeline, pipe, vae=None):
    assert_equal(pipeline.generate(PROMPT, seed=SEED, **ASKED), theirs(pipe, vae))
    start = {"image": photograph(), "strength": 0.6}
    wanted = theirs(pipe, vae, StableDiffusionImg2ImgPipeline, **start)
    assert_equal(pipeline.generate(PROMPT, seed=SEED, **ASKED, **start), wanted)


def test_a_checkpoint_with_a_tiny_vae_makes_the_images_of_diffusers(tiny):
    pipe, package = tiny
    with sdonnx.load(package) as pipeline:
        assert_equals_diffusers(pipeline, pipe)


def test_a_package_with_a_tiny_vae_opens_in_optimum(tiny):
    options = {"strength": 0.6, "num_inference_steps": STEPS, "guidance_scale": 5.0}
    pipe = ORTStableDiffusionImg2ImgPipeline.from_pretrained(tiny[1], provider="CPUExecutionProvider")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(SEED)
    found = pipe(PROMPT, image=photograph(), generator=generator, **options).images[0]
    wanted = theirs(tiny[0], None, StableDiffusionImg2ImgPipeline, image=photograph(), strength=0.6)
    assert psnr(found, wanted[1]) >= 50


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting_draws_nothing_from_a_posterior_that_is_none(tiny, strength):
    """An ancestral sampler's noise is another if anything else was drawn before."""
    pipe, package = tiny
    parts = {**pipe.components, "scheduler": scheduler(EulerAncestralDiscreteScheduler)}
    fields = {"image": photograph(), "mask_image": disc(), "strength": strength}
    wanted = theirs(StableDiffusionPipeline(**parts), None, StableDiffusionInpaintPipeline, **fields)
    with sdonnx.load(package) as pipeline:
        made = pipeline.generate(PROMPT, seed=SEED, **ASKED, **fields, sampler="euler_ancestral", paste=False)
    assert_equal(made, wanted)


def test_sdxl_with_another_vae_at_run_time(alone, tmp_path):
    vae, vae_package = alone
    pipe = sdxl()
    package = export(str(saved(pipe, tmp_path / "checkpoint")), tmp_path / "package")
    with sdonnx.load(package, vae=vae_package) as pipeline:
        assert_equal(pipeline.generate(PROMPT, seed=SEED, **ASKED), theirs(pipe, vae))


def test_a_checkpoint_is_exported_with_a_tiny_vae_instead(whole, tmp_path):
    pipe, package = whole
    other = tiny_vae(scaling_factor=SCALE)
    other.save_pretrained(tmp_path / "vae")
    exported = export(str(package.parent / "checkpoint"), tmp_path / "package", vae=str(tmp_path / "vae"))
    with sdonnx.load(exported) as pipeline:
        assert_equals_diffusers(pipeline, pipe, other)


def test_a_vae_package_at_run_time_equals_diffusers_with_that_vae(whole, alone):
    pipe, package = whole
    vae, vae_package = alone
    with sdonnx.load(package, vae=vae_package) as pipeline:
        assert_equals_diffusers(pipeline, pipe, vae)


def test_the_vae_of_a_whole_package_at_run_time(whole, tiny):
    with sdonnx.load(whole[1], vae=tiny[1]) as pipeline:
        assert_equals_diffusers(pipeline, whole[0], tiny[0].vae)


def test_a_preview_is_what_the_vae_makes_of_the_steps_guess(whole, alone):
    _, package = whole
    vae, vae_package = alone
    with sdonnx.load(package, preview_vae=vae_package) as pipeline, sdonnx.load(package) as plain:
        stream = pipeline.stream(PROMPT, seed=SEED, **ASKED)
        for step in stream:
            with torch.no_grad():
                wanted = vae.decode(torch.from_numpy(step.denoised) / SCALE).sample
            (image,) = VaeImageProcessor().postprocess(wanted, output_type="pil")
            assert psnr(step.preview(), image) >= 50
        assert stream.result.images == plain.generate(PROMPT, seed=SEED, **ASKED).images


def test_the_linear_preview_is_least_squares_for_the_tiny_vae(tiny, alone):
    for package in (tiny[1], alone[1]):
        latents = sdonnx.Package.open(package).manifest.latents
        assert latents.preview is not None
        assert (latents.channels, latents.downscale) == (4, 8)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-weights", "int4"])
def test_a_quantized_vae_package_is_near(precision, alone, whole, tmp_path, rng):
    vae, package = alone
    narrow = export(None, tmp_path / "narrow", vae=str(package.parent / "vae"), precision=precision)
    manifest = sdonnx.Package.open(narrow).manifest
    assert {component.precision for component in manifest.components.values()} == {precision}
    latents = rng.standard_normal((1, 4, 8, 8), np.float32)
    with torch.no_grad():
        wanted = vae.decode(torch.from_numpy(latents) / SCALE).sample
    (image,) = VaeImageProcessor().postprocess(wanted, output_type="pil")
    with sdonnx.load(whole[1], vae=narrow) as pipeline:
        assert 15 < psnr(pipeline.decode(latents)[0], image) < 90


def test_a_package_is_a_vae_to_export_from(alone, tiny, tmp_path):
    _, package = alone
    again = export(None, tmp_path / "again", vae=str(package))
    mine, other = (sdonnx.Package.open(root).manifest for root in (package, again))
    assert mine.components == other.components
    assert mine.latents == other.latents
    of_whole = sdonnx.Package.open(export(None, tmp_path / "of-whole", vae=str(tiny[1]))).manifest
    whole = sdonnx.Package.open(tiny[1]).manifest
    assert of_whole.components == {name: whole.components[name] for name in ("vae_decoder", "vae_encoder")}


def test_a_vae_on_the_hub_is_fetched_with_its_weights(alone, tmp_path, monkeypatch):
    """A VAE's repository has its files at the root, unlike a pipeline's."""
    _, package = alone

    def download(name, *, revision, allow_patterns):
        assert (name, revision) == ("org/vae", "v2")
        names = [path.name for path in (package.parent / "vae").iterdir()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(package.parent / "vae" / name, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    checkpoint = open_vae_alone("org/vae", revision="v2")
    assert checkpoint.source == "org/vae"
    assert len(checkpoint.parts["vae"].weights) == len(alone[0].state_dict())


@pytest.mark.parametrize(
    ("changes", "found"), [({"latent_channels": 16}, "16 channels, 8"), ({"levels": 3}, "4 channels, 4")]
)
def test_a_vae_of_other_latents_is_refused(changes, found, whole, tmp_path):
    levels = changes.pop("levels", 4)
    changes |= {f"{half}_block_out_channels": (16,) * levels for half in ("encoder", "decoder")}
    changes |= {f"num_{half}_blocks": (1,) * levels for half in ("encoder", "decoder")}
    tiny_vae(**changes).save_pretrained(tmp_path / "vae")
    other = export(None, tmp_path / "package", vae=str(tmp_path / "vae"))
    for role in ("vae", "preview_vae"):
        with pytest.raises(
            sdonnx.PackageError, match=f"latents of {found} times smaller.* requires 4 channels, 8 times"
        ):
            sdonnx.load(whole[1], **{role: other})


def test_a_vae_alone_says_what_it_is_for(alone, tmp_path):
    _, package = alone
    with pytest.raises(sdonnx.PackageError, match="is a VAE; give a whole package"):
        sdonnx.load(package)
    for source in (package, package.parent / "vae"):
        with pytest.raises(ExportError, match="is a VAE alone; give it with --vae"):
            export(str(source), tmp_path / "wrong")
    with pytest.raises(sdonnx.RequestError, match="nothing to export; give SRC"):
        export(None, tmp_path / "wrong")
    with pytest.raises(sdonnx.RequestError, match="no prompts to calibrate on"):
        export(None, tmp_path / "wrong", vae=str(package), precision="int8", calibration="prompts.txt")
    assert not (tmp_path / "wrong").exists()


def test_the_command_line(whole, alone, tmp_path):
    made, package = alone
    source = package.parent / "vae"
    exported = run_cli("export", "--vae", source, "-o", "alone", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert "-m PACKAGE --vae alone" in exported.stderr
    assert "4 channels, 8x downscale" in run_cli("info", "alone", cwd=tmp_path).stdout
    options = ["-m", whole[1], "--size", "64x64", "--steps", STEPS, "--guidance", 5, "--seed", SEED, "-o", "a.png"]
    more = ["--preview", "p.png", "--preview-vae", "alone", "--save-latents", "l.npz", "--json"]
    ran = run_cli("run", PROMPT, *options, "--vae", "alone", *more, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["vae"] == "vae"
    _, wanted = theirs(whole[0], made)
    with Image.open(tmp_path / "a.png") as found, Image.open(tmp_path / "p.png") as preview:
        assert psnr(found, wanted) >= 50
        assert psnr(preview, wanted) >= 50, "the last guess is the image"
        assert "VAE: vae" in found.text["parameters"]
    decoded = run_cli("decode", "l.npz", "-m", whole[1], "--vae", "alone", "-o", "b.png", cwd=tmp_path)
    assert decoded.returncode == 0, decoded.stderr
    with Image.open(tmp_path / "a.png") as one, Image.open(tmp_path / "b.png") as other:
        np.testing.assert_array_equal(one, other)
    graph = tmp_path / "alone" / "vae_decoder" / "model.onnx"
    graph.write_bytes(b"\0" * graph.stat().st_size)
    broken = run_cli("run", PROMPT, *options, "--vae", "alone", cwd=tmp_path)
    assert f"sdonnx decode a.npz -m {whole[1]} --vae alone" in broken.stderr
    assert broken.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["export"], "nothing to export; give SRC", 2),
        (["run", "a cat", "--preview-vae", "x"], "--preview-vae requires --preview", 2),
        (["run", "a cat", "--vae", "nosuch"], "there is no model 'nosuch'", 1),
    ],
)
def test_invalid_arguments_get_one_clear_line(arguments, message, code, tmp_path):
    ran = run_cli(*arguments, cwd=tmp_path)
    assert ran.returncode == code
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
