"""IP-Adapters against diffusers, on tiny random models."""

import json
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline
from PIL import Image
from sdonnx_export.export import export
from sdonnx_runtime.denoising.ip_adapter import ImagePrompts
from support.cli import run_cli
from support.controls import controlnet
from support.families import scheduler, sd1, sdxl
from support.images import disc, photograph
from support.ip_adapters import VISION, image_encoder, ip_adapter, save_ip_adapter
from support.reference import assert_equal
from transformers import CLIPImageProcessor

import sdonnx

PROMPT, NEGATIVE, SEED = "a photograph of an astronaut riding a horse", "blurry", 11
ASKED = {"width": 64, "height": 96, "num_inference_steps": 4, "guidance_scale": 5.0}
IMAGE, OTHER = photograph(80, 60), Image.fromarray(np.random.RandomState(6).randint(0, 256, (50, 70, 3), np.uint8))
PIPELINES = {"sd1": lambda: sd1(scheduler=scheduler(DDIMScheduler, clip_sample=False)), "sdxl": sdxl}
ADAPTERS = {"plain": {}, "plus": {"plus": True}}


@pytest.fixture(scope="module")
def packages(export_once, tmp_path_factory):
    """Returns a pipeline of diffusers and its package, or a state dict for it and its package; each made once."""
    kept = {}
    folder = tmp_path_factory.mktemp("ip_adapter")
    image_encoder().save_pretrained(folder / "image_encoder")

    def get(family, adapter=None):
        if (family, adapter) not in kept:
            name = "model" if adapter is None else adapter
            if adapter is None:
                made, source = PIPELINES[family](), folder / family
                made.save_pretrained(source)
            else:
                made = ip_adapter(get(family)[0].unet, **ADAPTERS[adapter])
                source = save_ip_adapter(made, folder / f"{family}-{adapter}.safetensors")
            kept[family, adapter] = (
                made,
                export_once(source, folder / "packages" / f"{family} {name}", precision="fp32"),
            )
        return kept[family, adapter]

    return get


def reference(made, adapters, images, scales, **asked):
    """Latents and image of diffusers; ``scales`` are those of each step."""
    size = VISION["image_size"]
    made.register_modules(
        image_encoder=image_encoder(), feature_extractor=CLIPImageProcessor(size=size, crop_size=size)
    )
    made.load_ip_adapter(adapters, subfolder=None, weight_name=[""] * len(adapters))
    made.set_ip_adapter_scale(list(scales[0]))

    def next_step(_pipe, step, _timestep, kept):
        made.set_ip_adapter_scale(list(scales[min(step + 1, len(scales) - 1)]))
        return kept

    made.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(SEED)
    given = {
        "negative_prompt": NEGATIVE,
        "generator": generator,
        "output_type": "latent",
        "callback_on_step_end": next_step,
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        latents = made(PROMPT, ip_adapter_image=images, **given, **asked).images
        decoded = made.vae.decode(latents / made.vae.config.scaling_factor).sample
    return latents.numpy(), made.image_processor.postprocess(decoded, output_type="pil")[0]


def generate(package, adapters, *images, memory="auto", controls=(), asked_controls=(), **settings):
    pipeline = sdonnx.load(package, ip_adapters=adapters, memory=memory, controls=controls)
    settings = {"seed": SEED, "negative_prompt": NEGATIVE, "controls": asked_controls, **ASKED, **settings}
    return pipeline.generate(PROMPT, ip_adapters=tuple(images), **settings)


@pytest.mark.parametrize(
    ("family", "kind", "guidance"),
    [("sd1", "plain", 5.0), ("sd1", "plus", 5.0), ("sdxl", "plus", 5.0), ("sd1", "plain", 1.0)],
)
def test_an_ip_adapter_equals_diffusers(packages, family, kind, guidance):
    (_, package), (state, adapter) = packages(family), packages(family, kind)
    asked = {**ASKED, "guidance_scale": guidance}
    wanted = reference(PIPELINES[family](), [state], [IMAGE], [[0.7]], **asked)
    found = generate(package, [adapter], sdonnx.IPAdapter(image=IMAGE, scale=0.7), **asked)
    assert_equal(found, wanted)
    assert np.abs(found.latents - generate(package, [], **asked).latents).max() > 1e-2


def test_two_of_different_tokens_each_in_its_range_of_steps(packages):
    (_, package), (plain, first), (plus, second) = packages("sd1"), packages("sd1", "plain"), packages("sd1", "plus")
    scales = [[0.7, 0.0], [0.7, 0.0], [0.7, 0.4], [0.0, 0.4]]
    wanted = reference(PIPELINES["sd1"](), [plain, plus], [IMAGE, OTHER], scales, **ASKED)
    prompts = sdonnx.IPAdapter(image=IMAGE, scale=0.7, end=0.75), sdonnx.IPAdapter(image=OTHER, scale=0.4, start=0.5)
    assert_equal(generate(package, [first, second], *prompts), wanted)


def test_with_a_controlnet_equals_diffusers(packages, export_once, tmp_path):
    (pipe, package), (state, adapter) = packages("sd1"), packages("sd1", "plain")
    net = controlnet(pipe.unet)
    net.save_pretrained(tmp_path / "net")
    control = export_once(tmp_path / "net", tmp_path / "package")
    parts = {**PIPELINES["sd1"]().components, "feature_extractor": None, "image_encoder": None}
    made = StableDiffusionControlNetPipeline(**parts, controlnet=net, requires_safety_checker=False)
    edges = OTHER.resize((64, 96))
    wanted = reference(made, [state], [IMAGE], [[0.7]], image=edges, controlnet_conditioning_scale=0.6, **ASKED)
    given = {"controls": [control], "asked_controls": (sdonnx.Control(image=edges, scale=0.6),)}
    found = generate(package, [adapter], sdonnx.IPAdapter(image=IMAGE, scale=0.7), **given)
    assert_equal(found, wanted)


def test_another_order_of_layers_or_a_negative_prompt_with_the_image_is_another_image(packages, tmp_path, monkeypatch):
    (_, package), (state, adapter) = packages("sd1"), packages("sd1", "plain")
    prompt = sdonnx.IPAdapter(image=IMAGE)
    right = generate(package, [adapter], prompt).latents
    layers = {name: tensor for name, tensor in state["ip_adapter"].items() if name.split(".")[0] in ("1", "3")}
    swapped = {str({"1": 3, "3": 1}[name[0]]) + name[1:]: tensor for name, tensor in layers.items()}
    wrong = {"image_proj": state["image_proj"], "ip_adapter": {**state["ip_adapter"], **swapped}}
    image_encoder().save_pretrained(tmp_path / "image_encoder")
    other = export(str(save_ip_adapter(wrong, tmp_path / "wrong.bin")), tmp_path / "wrong")
    assert np.abs(generate(package, [other], prompt).latents - right).max() > 1e-2
    monkeypatch.setattr(ImagePrompts, "_rows", lambda _self, entries: [1] * entries)
    assert np.abs(generate(package, [adapter], prompt).latents - right).max() > 1e-2


def test_scale_0_is_no_image_and_everything_composes(packages):
    (_, package), (_, adapter) = packages("sd1"), packages("sd1", "plus")
    photo = photograph(64, 96)
    for asked in (
        {"hires_scale": 1.5, "num_inference_steps": 2},
        {"image": photo, "mask_image": disc(64, 96), "strength": 0.75},
        {"cache_interval": 2, "token_downsampling": True, "num_images": 2},
        {"guidance_steps": (0.0, 0.5), "sampler": "heun", "num_inference_steps": 2},
    ):
        found = generate(package, [adapter], sdonnx.IPAdapter(image=IMAGE), **asked).latents
        none = generate(package, [adapter], sdonnx.IPAdapter(image=IMAGE, scale=0.0), **asked).latents
        np.testing.assert_allclose(none, generate(package, [], **asked).latents, atol=1e-4)
        assert np.abs(found - none).max() > 1e-2


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_come_near(packages, export_once, tmp_path, precision):
    (_, package), (state, adapter) = packages("sd1"), packages("sd1", "plus")
    image_encoder().save_pretrained(tmp_path / "image_encoder")
    source = save_ip_adapter(state, tmp_path / "adapter.safetensors")
    other = export_once(source, tmp_path / "package", precision=precision)
    prompt, asked = sdonnx.IPAdapter(image=IMAGE), {"num_inference_steps": 1}
    exact, found = (generate(package, [each], prompt, **asked).latents for each in (adapter, other))
    none = generate(package, [], **asked).latents
    assert 0 < np.linalg.norm(found - exact) < 0.1 * np.linalg.norm(exact - none)


def test_little_memory_makes_the_same_image(packages):
    (_, package), (_, adapter) = packages("sd1"), packages("sd1", "plus")
    prompt = sdonnx.IPAdapter(image=IMAGE)
    whole, least = (generate(package, [adapter], prompt, memory=memory) for memory in ("max", "min"))
    np.testing.assert_array_equal(whole.latents, least.latents)
    pipeline = sdonnx.load(package, ip_adapters=[adapter])
    planned = pipeline.plan(PROMPT, always=True, ip_adapters=(prompt,)).components
    names = [each.component for each in planned]
    assert {"ip_adapter.0/image_encoder", "ip_adapter.0/ip_adapter", "unet"} <= {*names}


def test_errors_before_anything_runs(packages):
    (_, package), (_, adapter), (_, xl) = packages("sd1"), packages("sd1", "plain"), packages("sdxl", "plus")
    prompt = sdonnx.IPAdapter(image=IMAGE)
    with pytest.raises(sdonnx.PackageError, match="18 cross-attentions.*width 128.*give an IP-Adapter that was made"):
        sdonnx.load(package, ip_adapters=[xl])
    with pytest.raises(sdonnx.PackageError, match="is Stable Diffusion 1, not an IP-Adapter; give the package of one"):
        sdonnx.load(package, ip_adapters=[package])
    with pytest.raises(sdonnx.PackageError, match="is an IP-Adapter; give a whole package, and this one with --ip-ada"):
        sdonnx.load(adapter)
    with pytest.raises(sdonnx.PackageError, match="is an IP-Adapter, not a ControlNet"):
        sdonnx.load(package, controls=[adapter])
    pipeline = sdonnx.load(package, ip_adapters=[adapter])
    for given, message in (
        ((), "the request has 0 ip_adapters, and 1 are loaded; give one for each"),
        ((sdonnx.IPAdapter(image=IMAGE, start=0.5, end=0.5),), "starts at 0.5 and ends at 0.5; give an end after it"),
        ((sdonnx.IPAdapter(image=IMAGE, scale=11),), "give a number from -10 to 10"),
        ((sdonnx.Control(image=IMAGE),), "give a tuple of IPAdapter"),
    ):
        with pytest.raises(sdonnx.RequestError, match=message):
            pipeline.resolve(PROMPT, ip_adapters=given)
    older = sdonnx.Package.open(package)
    graphs = {**older.manifest.components["unet"].graphs, "controlled": "unet/model.onnx"}
    object.__setattr__(older.manifest.components["unet"], "graphs", graphs)
    with pytest.raises(sdonnx.PackageError, match="no U-Net graph for IP-Adapters; export its checkpoint again"):
        sdonnx.Pipeline(older, ip_adapters=[sdonnx.Package.open(adapter)])
    assert pipeline.resolve(PROMPT, ip_adapters=(prompt,)).request.ip_adapters == (prompt,)


def test_on_the_command_line(packages, tmp_path):
    (_, package), (_, adapter) = packages("sd1"), packages("sd1", "plain")
    OTHER.save(tmp_path / "style.png")
    shown = " ".join(run_cli("info", adapter).stdout.split())
    assert "an IP-Adapter" in shown and "plain, 4 tokens" in shown and "text of width 64" in shown
    asked = ["--size", "64x96", "--steps", "4", "--seed", str(SEED), "--negative", NEGATIVE, "--guidance", "5"]
    where = ["--ip-adapter", f"{adapter}:{tmp_path / 'style.png'}:0.7:0:0.5", "-o", tmp_path / "made.png"]
    assert run_cli("run", PROMPT, "-m", package, *asked, *where).returncode == 0
    found = generate(package, [adapter], sdonnx.IPAdapter(image=OTHER, scale=0.7, end=0.5))
    with Image.open(tmp_path / "made.png") as image:
        np.testing.assert_array_equal(image, found.images[0])
        recorded = json.loads(image.info["sdonnx"])["ip_adapters"]
    assert recorded == [{"name": "sd1-plain.safetensors", "scale": 0.7, "start": 0.0, "end": 0.5}]
    refused = run_cli("run", PROMPT, "-m", package, "--ip-adapter", f"{adapter}:")
    assert refused.returncode != 0 and "ip-adapter is '" in refused.stderr and "give a package" in refused.stderr
