"""ControlNets and T2I-Adapters against diffusers; a new ControlNet ends in zeros, so its weights are set here."""

import json
import warnings

import cv2
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    MultiAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image
from sdonnx_runtime.images.canny import canny
from support.cli import run_cli
from support.controls import adapter, controlnet
from support.families import scheduler, sd1, sd2, sdxl, unet
from support.images import disc, photograph
from support.reference import assert_equal
from support.tiling import circular

import sdonnx
from sdonnx.cli.parsing import parse_control

PROMPT, NEGATIVE, SEED = "a photograph of an astronaut riding a horse", "blurry", 11
ASKED = {"width": 64, "height": 96, "num_inference_steps": 4, "guidance_scale": 5.0}
EDGES = Image.fromarray(np.random.RandomState(5).randint(0, 256, (96, 64, 3), np.uint8))
OTHER = Image.fromarray(np.random.RandomState(6).randint(0, 256, (96, 64, 3), np.uint8))


PIPELINES = {
    "sd1": lambda: sd1(scheduler=scheduler(DDIMScheduler, clip_sample=False)),
    "sd2": sd2,
    "sdxl": sdxl,
    "sd1 inpaint": lambda: sd1(
        StableDiffusionInpaintPipeline, unet=unet(in_channels=9), scheduler=scheduler(DDIMScheduler, clip_sample=False)
    ),
}
CONTROLS = {
    "sd1 net": lambda: controlnet(PIPELINES["sd1"]().unet),
    "sd1 other": lambda: controlnet(PIPELINES["sd1"]().unet, 8, controlnet_conditioning_channel_order="bgr"),
    "sd2 net": lambda: controlnet(PIPELINES["sd2"]().unet),
    "sdxl net": lambda: controlnet(PIPELINES["sdxl"]().unet),
    "adapter": adapter,
    "other adapter": lambda: adapter(12),
    "gray adapter": lambda: adapter(10, in_channels=1),
    "light adapter": lambda: adapter(adapter_type="light_adapter", in_channels=3),
    "xl adapter": lambda: adapter(channels=[32, 64, 64, 64], adapter_type="full_adapter_xl", downscale_factor=16),
}


@pytest.fixture(scope="module")
def saved(export_once, tmp_path_factory):
    """Returns a pipeline or a control model of diffusers and its package, both created once."""
    kept = {}

    def get(name, precision="fp32"):
        if (name, precision) not in kept:
            made = (PIPELINES if name in PIPELINES else CONTROLS)[name]()
            directory = tmp_path_factory.mktemp("control") / name
            made.save_pretrained(directory)
            package = export_once(directory, directory.with_name("package"), precision=precision, calibration="fast")
            kept[name, precision] = made, package
        return kept[name, precision]

    return get


def reference(kind, pipe, *, decoder=None, **given):
    """Latents and image of diffusers, with the parts of another pipeline."""
    parts = {key: value for key, value in pipe.components.items() if key not in ("feature_extractor", "image_encoder")}
    other = given.pop("parts")
    extra = {} if "safety_checker" not in parts else {"feature_extractor": None, "requires_safety_checker": False}
    made = kind(**{**parts, **other}, **extra)
    made.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(SEED)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        latents = made(PROMPT, negative_prompt=NEGATIVE, generator=generator, output_type="latent", **given).images
        decoded = made.vae.decode(latents / made.vae.config.scaling_factor).sample
    return latents.numpy(), made.image_processor.postprocess(decoded, output_type="pil")[0]


def generate(package, packages, *controls, **settings):
    pipeline = sdonnx.load(package, controls=packages)
    settings = {"seed": SEED, "negative_prompt": NEGATIVE, **ASKED, **settings}
    return pipeline.generate(PROMPT, controls=tuple(controls), **settings)


def generate_without_control(package, **settings):
    """Latents without a control."""
    return generate(package, [], **settings).latents


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_a_controlnet_equals_diffusers(saved, name, guidance):
    (pipe, package), (net, control_package) = saved(name), saved(f"{name} net")
    kind = StableDiffusionXLControlNetPipeline if name == "sdxl" else StableDiffusionControlNetPipeline
    asked = {**ASKED, "guidance_scale": guidance}
    arguments = {"image": EDGES, "controlnet_conditioning_scale": 0.7}
    wanted = reference(kind, pipe, parts={"controlnet": net}, **arguments, **asked)
    found = generate(package, [control_package], sdonnx.Control(image=EDGES, scale=0.7), **asked)
    assert_equal(found, wanted)
    assert np.abs(found.latents - generate_without_control(package, **asked)).max() > 1e-2


def test_a_controlnet_of_an_image_that_tiles_equals_diffusers(saved):
    """Its convolutions are circular too: at the borders it sees the conditioning image go on."""
    (pipe, package), (net, control_package) = saved("sd1"), saved("sd1 net")
    with circular(pipe.unet, pipe.vae, net, axes="x"):
        wanted = reference(StableDiffusionControlNetPipeline, pipe, parts={"controlnet": net}, image=EDGES, **ASKED)
    found = generate(package, [control_package], sdonnx.Control(image=EDGES), tiling="x")
    assert_equal(found, wanted)
    other = generate(package, [control_package], sdonnx.Control(image=EDGES))
    assert np.abs(found.latents - other.latents).max() > 1e-2


def test_two_controlnets_add_up_each_in_its_range_of_steps(saved):
    (pipe, package), (net, first), (other, second) = saved("sd1"), saved("sd1 net"), saved("sd1 other")
    arguments = {
        "image": [EDGES, OTHER],
        "controlnet_conditioning_scale": [0.7, 0.4],
        "control_guidance_start": [0.0, 0.25],
        "control_guidance_end": [0.5, 1.0],
    }
    wanted = reference(
        StableDiffusionControlNetPipeline, pipe, parts={"controlnet": [net, other]}, **arguments, **ASKED
    )
    controls = sdonnx.Control(image=EDGES, scale=0.7, end=0.5), sdonnx.Control(image=OTHER, scale=0.4, start=0.25)
    found = generate(package, [first, second], *controls)
    assert_equal(found, wanted)
    throughout = generate(package, [first, second], *(sdonnx.Control(image=c.image, scale=c.scale) for c in controls))
    assert np.abs(found.latents - throughout.latents).max() > 1e-2


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_guess_mode_equals_diffusers(saved, name):
    (pipe, package), (net, control_package) = saved(name), saved(f"{name} net")
    kind = StableDiffusionXLControlNetPipeline if name == "sdxl" else StableDiffusionControlNetPipeline
    arguments = {"image": EDGES, "controlnet_conditioning_scale": 0.7, "guess_mode": True}
    wanted = reference(kind, pipe, parts={"controlnet": net}, **arguments, **ASKED)
    control = sdonnx.Control(image=EDGES, scale=0.7)
    found = generate(package, [control_package], control, control_guess=True)
    assert_equal(found, wanted)
    assert np.abs(found.latents - generate(package, [control_package], control).latents).max() > 1e-2


def test_a_controlnet_with_img2img_equals_diffusers(saved):
    (pipe, package), (net, control_package) = saved("sd1"), saved("sd1 net")
    image = photograph(64, 96)
    arguments = {"image": image, "control_image": EDGES, "strength": 0.75}
    kind = StableDiffusionControlNetImg2ImgPipeline
    wanted = reference(kind, pipe, parts={"controlnet": net}, controlnet_conditioning_scale=1.0, **arguments, **ASKED)
    found = generate(package, [control_package], sdonnx.Control(image=EDGES), image=image, strength=0.75)
    assert_equal(found, wanted)


@pytest.mark.parametrize(
    ("name", "net", "kind"),
    [
        ("sd1", "adapter", StableDiffusionAdapterPipeline),
        ("sd1", "gray adapter", StableDiffusionAdapterPipeline),
        ("sd2", "light adapter", StableDiffusionAdapterPipeline),
        ("sdxl", "xl adapter", StableDiffusionXLAdapterPipeline),
    ],
)
def test_a_t2i_adapter_equals_diffusers(saved, name, net, kind):
    (pipe, package), (adapter, control_package) = saved(name), saved(net)
    asked = ASKED
    image = EDGES.convert("L") if net == "gray adapter" else EDGES
    arguments = {"image": image, "adapter_conditioning_scale": 0.6}
    wanted = reference(kind, pipe, parts={"adapter": adapter}, **arguments, **asked)
    found = generate(package, [control_package], sdonnx.Control(image=EDGES, scale=0.6), **asked)
    assert_equal(found, wanted)
    assert np.abs(found.latents - generate_without_control(package, **asked)).max() > 1e-2


def test_scale_0_is_no_control(saved):
    (_, package), (_, control_package) = saved("sd1"), saved("sd1 net")
    found = generate(package, [control_package], sdonnx.Control(image=EDGES, scale=0.0))
    np.testing.assert_allclose(found.latents, generate_without_control(package), atol=1e-5)


def test_an_adapter_and_a_controlnet_add_up(saved):
    (_, package), (_, first), (_, second) = saved("sd1"), saved("sd1 net"), saved("adapter")
    both = sdonnx.Control(image=EDGES), sdonnx.Control(image=OTHER)
    found = generate(package, [first, second], *both)
    for net, control in zip([first, second], both, strict=True):
        assert np.abs(found.latents - generate(package, [net], control).latents).max() > 1e-2


def test_two_t2i_adapters_equal_diffusers(saved):
    (pipe, package), (net, first), (other, second) = saved("sd1"), saved("adapter"), saved("other adapter")
    arguments = {"image": [EDGES, OTHER], "adapter_conditioning_scale": [0.6, 0.3]}
    both = MultiAdapter([net, other])
    wanted = reference(StableDiffusionAdapterPipeline, pipe, parts={"adapter": both}, **arguments, **ASKED)
    controls = sdonnx.Control(image=EDGES, scale=0.6), sdonnx.Control(image=OTHER, scale=0.3)
    assert_equal(generate(package, [first, second], *controls), wanted)


@pytest.mark.parametrize("name", ["sd1", "sd1 inpaint"])
def test_a_controlnet_with_inpainting_equals_diffusers(saved, name):
    """With 4 channels and with 9; at strength 1 both begin with noise."""
    (pipe, package), (net, control_package) = saved(name), saved("sd1 net")
    image, mask = photograph(64, 96), disc(64, 96)
    arguments = {"image": image, "mask_image": mask, "control_image": EDGES, "strength": 1.0}
    kind = StableDiffusionControlNetInpaintPipeline
    wanted = reference(kind, pipe, parts={"controlnet": net}, controlnet_conditioning_scale=0.7, **arguments, **ASKED)
    asked = {"image": image, "mask_image": mask, "strength": 1.0, "paste": False}
    found = generate(package, [control_package], sdonnx.Control(image=EDGES, scale=0.7), **asked)
    assert_equal(found, wanted)
    assert np.abs(found.latents - generate_without_control(package, **asked)).max() > 1e-2


@pytest.mark.parametrize("precision", ["fp16", "int8-weights", "int4", "int8"])
def test_quantization_errs_no_more_with_a_controlnet_than_without(saved, precision):
    """A random model's errors are large; a ControlNet's residuals are neither clipped nor rounded more coarsely."""
    found = {}
    for each in ("fp32", precision):
        (_, package), (_, net) = saved("sd1", each), saved("sd1 net", each)
        added = generate(package, [net], sdonnx.Control(image=EDGES), num_inference_steps=1).latents
        found[each] = added, generate_without_control(package, num_inference_steps=1)
    added, plain = (np.linalg.norm(a - b) for a, b in zip(*found.values(), strict=True))
    assert 0 < added < 1.5 * plain
    assert np.linalg.norm(np.subtract(*found["fp32"])) > 2 * added


def test_step_caching_and_token_downsampling_keep_the_control(saved):
    (_, package), (_, control_package) = saved("sd1"), saved("sd1 net")
    control, asked = sdonnx.Control(image=EDGES), {"num_inference_steps": 6}
    exact, without = (
        generate(package, [control_package], control, **asked).latents,
        generate_without_control(package, **asked),
    )
    for fast in ({"cache_interval": 2}, {"token_downsampling": True}, sdonnx.FAST):
        found = generate(package, [control_package], control, **asked, **fast).latents
        assert 0 < np.abs(found - exact).mean() < 0.7 * np.abs(found - without).mean()


def test_hires_and_second_order_samplers_keep_the_control(saved):
    (_, package), (_, control_package) = saved("sd1"), saved("sd1 net")
    for asked in ({"hires_scale": 1.5}, {"sampler": "heun"}, {"guidance_interval": (0.5, 5.0)}, {"num_images": 2}):
        found = generate(package, [control_package], sdonnx.Control(image=EDGES), **asked)
        none = generate(package, [control_package], sdonnx.Control(image=EDGES, scale=0.0), **asked)
        np.testing.assert_allclose(none.latents, generate_without_control(package, **asked), atol=1e-4)
        assert np.abs(found.latents - none.latents).max() > 1e-2


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("net:a.png", ("net", "a.png", {})),
        ("net:a.png:0.8", ("net", "a.png", {"scale": 0.8})),
        ("net:a.png:0.8:0.1:0.9", ("net", "a.png", {"scale": 0.8, "start": 0.1, "end": 0.9})),
        (r"C:\x\net:C:\y\pose.png:0.8", (r"C:\x\net", r"C:\y\pose.png", {"scale": 0.8})),
        (r"C:\x\net:pose.png", (r"C:\x\net", "pose.png", {})),
        ("net:C:/y/pose.png", ("net", "C:/y/pose.png", {})),
        ("org/net:a.png:-1", ("org/net", "a.png", {"scale": -1.0})),
    ],
)
def test_a_control_on_the_command_line(text, wanted):
    package, image, how = parse_control(text)
    assert (package, str(image), how) == wanted


@pytest.mark.parametrize("text", ["net", "", ":a.png", "net:", "net:a.png:1:0:1:2"])
def test_an_invalid_control_option_is_refused(text):
    with pytest.raises(sdonnx.RequestError, match="give a package and an image"):
        parse_control(text)


@pytest.mark.parametrize("size", [(64, 96), (333, 251)])
def test_canny_is_opencvs(size):
    image = photograph(*size).resize(size)
    noisy = np.clip(np.asarray(image, int) + np.random.RandomState(2).normal(0, 12, (*size[::-1], 3)), 0, 255)
    for each in (np.asarray(image), noisy.astype(np.uint8)):
        wanted = cv2.Canny(np.ascontiguousarray(each), 100, 200)
        assert 0 < wanted.mean() < 200
        found = np.asarray(canny(Image.fromarray(each)))
        np.testing.assert_array_equal(found, np.repeat(wanted[..., None], 3, axis=2))


def test_errors_before_anything_runs(saved, tmp_path):
    (_, package), (_, control_package), (_, xl) = saved("sd1"), saved("sd1 net"), saved("sdxl net")
    control = sdonnx.Control(image=EDGES)
    for controls, message in (
        ([xl], "give a ControlNet that was made for it"),
        ([saved("xl adapter")[1]], "give a T2I-Adapter that was made for it"),
        ([package], "is Stable Diffusion 1, not a ControlNet or T2I-Adapter"),
    ):
        with pytest.raises(sdonnx.PackageError, match=message):
            sdonnx.load(package, controls=controls)
    with pytest.raises(sdonnx.PackageError, match="is a ControlNet; give a whole package, and this one with --control"):
        sdonnx.load(control_package)
    pipeline = sdonnx.load(package, controls=[control_package])
    for fields, message in (
        ({}, "the request has 0 controls, and 1 are loaded"),
        ({"controls": (sdonnx.Control(image=EDGES, start=0.6, end=0.5),)}, "give an end after it"),
        ({"controls": (sdonnx.Control(image=EDGES, scale=11),)}, "give a number from -10 to 10"),
        ({"controls": (sdonnx.Control(image="a.png"),)}, "is str; give a PIL image"),
        ({"controls": [control]}, "give a tuple of Control"),
    ):
        with pytest.raises(sdonnx.RequestError, match=message):
            pipeline.generate(PROMPT, **fields)
    with pytest.raises(sdonnx.RequestError, match="the request has 1 controls, and 0 are loaded"):
        sdonnx.load(package).generate(PROMPT, controls=(control,))
    (package / "unet" / "controlled.onnx").stat()
    older = sdonnx.Package.open(package)
    graphs = {"plain": older.manifest.components["unet"].graphs["plain"]}
    object.__setattr__(older.manifest.components["unet"], "graphs", graphs)
    with pytest.raises(sdonnx.RequestError, match="no U-Net graph 'controlled'.*export its checkpoint again"):
        sdonnx.Pipeline(older, controls=[sdonnx.Package.open(control_package)]).resolve(PROMPT, controls=(control,))


def test_on_the_command_line(saved, tmp_path):
    (_, package), (_, control_package) = saved("sd1"), saved("sd1 net")
    EDGES.save(tmp_path / "edges.png")
    shown = run_cli("info", control_package).stdout
    assert "a ControlNet" in shown and "cross_attention_dim 64" in shown
    asked = ["--size", "64x96", "--steps", "4", "--seed", str(SEED), "--negative", NEGATIVE, "--guidance", "5"]
    where = ["--control", f"{control_package}:{tmp_path / 'edges.png'}:0.7:0:0.5", "-o", tmp_path / "made.png"]
    assert run_cli("run", PROMPT, "-m", package, *asked, *where).returncode == 0
    found = generate(package, [control_package], sdonnx.Control(image=EDGES, scale=0.7, end=0.5))
    with Image.open(tmp_path / "made.png") as image:
        np.testing.assert_array_equal(image, found.images[0])
        recorded, text = json.loads(image.info["sdonnx"])["controls"], image.info["parameters"]
    assert 'ControlNet 0: "Model: sd1 net, Weight: 0.7, Guidance Start: 0, Guidance End: 0.5"' in text
    assert recorded == [{"name": "sd1 net", "scale": 0.7, "start": 0.0, "end": 0.5}]
