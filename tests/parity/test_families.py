"""Every family against its pipeline in diffusers, on tiny random models with its peculiarities."""

import json
import shutil
from weakref import WeakSet

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from optimum.onnxruntime import ORTStableDiffusionXLPipeline
from PIL import Image
from sdonnx_export.export import export
from sdonnx_runtime.denoising.init_image import example_images
from sdonnx_runtime.execution.staged_model import open_model
from sdonnx_runtime.packages.families import FAMILIES, PackageKind
from sdonnx_runtime.text.conditioning import CONDITIONING
from support import families
from support.ldm import save_ldm
from support.reference import NEGATIVE, PROMPT, SEED, SIZE, assert_equal, psnr, reference

import sdonnx


def random_image(seed=0, size=(64, 96)):
    """Colours that change smoothly."""
    places = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(places).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def saved(export_once, tmp_path_factory):
    """A family's pipeline and our package of it, from its directory or a single file, made once."""
    made, published, directory = {}, {}, tmp_path_factory.mktemp("families")

    def get(name, make, layout="directory"):
        place = directory / name.replace(" ", "-")
        if name not in made:
            pipe = made[name] = make()
            pipe.set_progress_bar_config(disable=True)
            pipe.save_pretrained(place / "directory")
            published[name] = pipe.scheduler.config
        pipe, package = made[name], place / f"{layout} package"
        pipe.scheduler = getattr(diffusers, published[name]["_class_name"]).from_config(published[name])
        if not package.exists():
            source = place / "directory" if layout == "directory" else place / f"{place.name}.safetensors"
            if layout != "directory":
                save_ldm(pipe, source)
            export_once(source, package)
        return pipe, package

    return get


def sampler_of(pipe):
    return {"DDIMScheduler": "ddim"}.get(pipe.scheduler.config._class_name)


def in_both(names, settings):
    """Names, layouts and settings; the first setting alone of single files, and a tiny VAE has no place in one.

    tests/export/test_single_files.py compares all their weights and configs with those of the directory.
    """
    directories = [(name, "directory", each) for name in names for each in settings]
    return directories + [(name, "single file", settings[0]) for name in names if name != "sdxs"]


@pytest.mark.parametrize(("name", "layout", "guidance"), in_both(families.TEXT_TO_IMAGE, [5.0, 1.0]))
def test_text_to_image(saved, name, layout, guidance):
    pipe, package = saved(name, families.TEXT_TO_IMAGE[name], layout)
    common = {"negative_prompt": NEGATIVE, "num_inference_steps": 4, "guidance_scale": guidance, **SIZE}
    wanted = reference(pipe, prompt=PROMPT, **common)
    assert_equal(sdonnx.load(package).generate(PROMPT, seed=SEED, **common), wanted)


def test_guidance_between_shares_of_the_steps(saved):
    """As diffusers' documentation has it: a callback that leaves the unconditional row out from a step on."""
    pipe, package = saved("sd2 base", families.sd2)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)

    def unguided(pipe, step, _timestep, given):
        if step == 2:  # the third of five steps is done
            pipe._guidance_scale = 0.0
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[-1]
        return given

    common = {"negative_prompt": NEGATIVE, "num_inference_steps": 5, "guidance_scale": 6.0, **SIZE}
    callback = {"callback_on_step_end": unguided, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    wanted = reference(pipe, prompt=PROMPT, **common, **callback)
    pipeline = sdonnx.load(package)
    assert_equal(pipeline.generate(PROMPT, seed=SEED, sampler="ddim", guidance_steps=(0.0, 0.6), **common), wanted)
    always = pipeline.generate(PROMPT, seed=SEED, sampler="ddim", **common)
    assert np.abs(always.latents - wanted[0]).max() > 1e-2


def test_an_empty_negative_of_sdxl_is_zeros(saved):
    pipe, package = saved("sdxl", families.sdxl)
    common = {"num_inference_steps": 3, "guidance_scale": 6.0, **SIZE}
    found = sdonnx.load(package).generate(PROMPT, seed=SEED, **common)
    assert_equal(found, reference(pipe, prompt=PROMPT, **common))
    encoded = reference(pipe, prompt=PROMPT, negative_prompt="", **common)
    assert np.abs(found.latents - encoded[0]).max() > 1e-2


def test_sizes_among_sdxls_added_conditions(saved):
    pipe, package = saved("sdxl", families.sdxl)
    common = {"num_inference_steps": 3, "guidance_scale": 6.0, **SIZE}
    sizes = {"original_size": (500, 300), "crops_coords_top_left": (8, 40), "target_size": (700, 900)}
    wanted = reference(pipe, prompt=PROMPT, **common, **sizes)  # (height, width)
    ours = {"original_size": (300, 500), "crop_top_left": (8, 40), "target_size": (900, 700)}
    pipeline = sdonnx.load(package)
    assert_equal(pipeline.generate(PROMPT, seed=SEED, **common, **ours), wanted)
    for name in ours:
        without = {key: value for key, value in ours.items() if key != name}
        other = pipeline.generate(PROMPT, seed=SEED, **common, **without)
        assert np.abs(other.latents - wanted[0]).max() > 3e-3, f"{name} has no effect"


IMAGE_SETTINGS = {"num_inference_steps": 6, "guidance_scale": 5.0, "negative_prompt": NEGATIVE}
MASK = Image.new("L", (64, 96))
MASK.paste(255, (8, 16, 40, 72))


INPAINTING = ["sd1 inpaint", "sd2 inpaint", "sdxl inpaint"]


@pytest.mark.parametrize(("name", "layout", "strength"), in_both(INPAINTING, [0.6, 1.0]))
def test_inpainting_models(saved, name, layout, strength):
    pipe, package = saved(name, families.WITH_IMAGES[name], layout)
    common = {"image": random_image(), "mask_image": MASK, "strength": strength, **IMAGE_SETTINGS, **SIZE}
    wanted = reference(pipe, prompt=PROMPT, **common)
    assert_equal(
        sdonnx.load(package).generate(PROMPT, seed=SEED, paste=False, sampler=sampler_of(pipe), **common), wanted
    )


PIX2PIX = in_both(["pix2pix"], [{}, {"image_guidance_scale": 1.0}, {"guidance_scale": 1.0}])


@pytest.mark.parametrize(("name", "layout", "guidance"), PIX2PIX)
def test_instruct_pix2pix(saved, name, layout, guidance):
    pipe, package = saved(name, families.WITH_IMAGES[name], layout)
    common = {"image": random_image(), **IMAGE_SETTINGS, "image_guidance_scale": 1.7, **guidance}
    wanted = reference(pipe, prompt=PROMPT, **common)
    assert_equal(sdonnx.load(package).generate(PROMPT, seed=SEED, **common, **SIZE), wanted)


@pytest.mark.parametrize(("name", "layout", "strength"), in_both(["depth"], [0.5, 0.9]))
def test_depth_to_image(saved, name, layout, strength):
    pipe, package = saved(name, families.depth, layout)
    depth = np.random.default_rng(3).integers(0, 60000, (50, 70)).astype(np.uint16)
    common = {"image": random_image(), "strength": strength, **IMAGE_SETTINGS}
    wanted = reference(pipe, prompt=PROMPT, depth_map=torch.from_numpy(depth.astype(np.float32))[None], **common)
    common |= {"sampler": sampler_of(pipe), "depth_image": Image.fromarray(depth), **SIZE}
    assert_equal(sdonnx.load(package).generate(PROMPT, seed=SEED, **common), wanted)


@pytest.mark.parametrize("kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
@pytest.mark.parametrize("name", ["sd2 768", "sdxl", "ssd-1b"])
def test_images_with_models_of_text_alone(saved, name, kind):
    pipe, package = saved(name, families.TEXT_TO_IMAGE[name])
    kind = kind.replace("StableDiffusion", "StableDiffusionXL") if name in ("sdxl", "ssd-1b") else kind
    pipe = getattr(diffusers, kind)(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    mask = {"mask_image": MASK} if "Inpaint" in kind else {}
    common = {"image": random_image(), "strength": 0.6, **mask, **IMAGE_SETTINGS}
    wanted = reference(pipe, prompt=PROMPT, **common, **(SIZE if mask else {}))
    assert_equal(
        sdonnx.load(package).generate(PROMPT, seed=SEED, paste=False, sampler=sampler_of(pipe), **common, **SIZE),
        wanted,
    )


@pytest.mark.parametrize("layout", ["directory", "single file"])
def test_the_refiner_alone(saved, layout):
    pipe, package = saved("refiner", families.WITH_IMAGES["refiner"], layout)
    common = {"image": random_image(), "strength": 0.5, "aesthetic_score": 7.0, "negative_aesthetic_score": 1.0}
    common |= IMAGE_SETTINGS
    wanted = reference(pipe, prompt=PROMPT, **common)
    common |= SIZE
    pipeline = sdonnx.load(package)
    assert_equal(pipeline.generate(PROMPT, seed=SEED, **common), wanted)
    other = pipeline.generate(PROMPT, seed=SEED, **{**common, "aesthetic_score": 6.0})
    assert np.abs(other.latents - wanted[0]).max() > 2e-3


@pytest.mark.parametrize(("name", "layout", "guidance"), in_both(["lcm"], [8.5, 3.0]))
def test_a_latent_consistency_model(saved, name, layout, guidance):
    pipe, package = saved(name, families.lcm, layout)
    common = {"num_inference_steps": 4, "guidance_scale": guidance, **SIZE}
    wanted = reference(pipe, prompt=PROMPT, **common)
    assert_equal(sdonnx.load(package).generate(PROMPT, seed=SEED, **common), wanted)


def pair_of(saved):
    return *saved("sdxl", families.sdxl), *saved("refiner", families.WITH_IMAGES["refiner"])


@pytest.mark.parametrize("share", [0.8, 0.55])
def test_the_refiner_goes_on_where_the_base_model_stops(saved, share):
    base, package, refiner, other = pair_of(saved)
    common = {"num_inference_steps": 10, "guidance_scale": 5.0, "negative_prompt": NEGATIVE}
    settings = {"prompt": PROMPT, **common}
    generator = torch.Generator("cpu").manual_seed(SEED)
    halfway = base(generator=generator, output_type="latent", denoising_end=share, **settings, **SIZE).images
    wanted = reference(refiner, image=halfway, denoising_start=share, **settings)
    pipeline = sdonnx.load(package, refiner=other)
    result = pipeline.generate(PROMPT, seed=SEED, refiner_start=share, **common, **SIZE)
    assert_equal(result, wanted)
    alone = sdonnx.load(package).generate(PROMPT, seed=SEED, **common, **SIZE)
    assert np.abs(alone.latents - result.latents).max() > 1e-2


def test_the_base_model_is_unloaded_before_the_refiner_is_opened(saved, tmp_path):
    _, package, _, other = pair_of(saved)
    opened, alive = [], WeakSet()

    def open_and_record(path, *arguments, **options):
        opened.append((path.parent.parent, path.parent.name, len(alive)))
        model = open_model(path, *arguments, **options)
        alive.add(model)
        return model

    packages = sdonnx.Package.open(package), sdonnx.Package.open(other)
    pipeline = sdonnx.Pipeline(packages[0], refiner=packages[1], open_model=open_and_record)
    result = pipeline.generate(PROMPT, seed=1, num_inference_steps=5, num_images=2, **SIZE)
    unets = [(root, before) for root, name, before in opened if name == "unet"]
    assert [root for root, _ in unets] == [package, other] * 2
    assert all(before == 0 for _, before in unets)
    assert set(result.timings.run) >= {"unet", "refiner/unet"}
    sdonnx.save_png(result, 0, tmp_path / "made.png")
    with Image.open(tmp_path / "made.png") as made:
        assert "Refiner: directory, Refiner switch at: 0.8" in made.text["parameters"]  # as AUTOMATIC1111 has it


def test_a_multistep_sampler_keeps_its_history_over_the_hand_over(saved):
    """With the base model as its own refiner nothing changes, which a restarted sampler would not manage."""
    _, package, _, _ = pair_of(saved)
    settings = {"sampler": "dpmpp_3m_sde", "num_inference_steps": 8, **SIZE}
    alone = sdonnx.load(package).generate(PROMPT, seed=SEED, **settings)
    both = sdonnx.load(package, refiner=package).generate(PROMPT, seed=SEED, refiner_start=0.5, **settings)
    np.testing.assert_array_equal(alone.latents, both.latents)


def scheduled(**changes):
    return lambda manifest: manifest["scheduler"].update(changes)


def encoded(index, **changes):
    return lambda manifest: manifest["text_encoders"][index].update(changes)


def conditioned(**changes):
    return lambda manifest: manifest["conditions"].update(changes)


def padded(tokenizer):
    """With the pad token of the other encoder."""

    def change(root):
        path = root / tokenizer / "special_tokens_map.json"
        path.write_text(path.read_text().replace('"!"', '"<|endoftext|>"'))
        path = root / tokenizer / "tokenizer_config.json"
        path.write_text(path.read_text().replace('"!"', '"<|endoftext|>"'))

    return change


BROKEN = {
    "v prediction taken for epsilon": ("sd2 768", scheduled(prediction_type="epsilon"), None),
    "leading spacing for trailing": ("sd-turbo", scheduled(timestep_spacing="leading"), None),
    "Stable Diffusion 2 padded as 1": ("sd2 base", None, padded("tokenizer")),
    "SDXL's second encoder padded as the first": ("sdxl", None, padded("tokenizer_2")),
    "the first encoder's last layer": ("sdxl", encoded(0, output="last_hidden_state"), None),
    "the second encoder's last layer": ("sdxl", encoded(1, output="last_hidden_state"), None),
    "one layer too early": ("sdxl", encoded(1, output="hidden_states.1"), None),
    "an empty negative prompt encoded": ("sdxl", conditioned(zero_negative=False), None),
}


GUIDED = {"num_inference_steps": 4, "guidance_scale": 5.0, **SIZE}


@pytest.fixture(scope="module")
def guided(saved):
    """What a family's pipeline in diffusers draws without a negative prompt, as ours does; drawn once."""
    drawn = {}

    def get(name):
        pipe, package = saved(name, families.TEXT_TO_IMAGE[name])
        if name not in drawn:
            drawn[name] = reference(pipe, prompt=PROMPT, **GUIDED)
            assert_equal(sdonnx.load(package).generate(PROMPT, seed=SEED, **GUIDED), drawn[name])
        return package, drawn[name]

    return get


@pytest.mark.parametrize(("name", "in_manifest", "in_files"), BROKEN.values(), ids=BROKEN)
def test_without_its_peculiarity_a_family_gives_another_image(guided, tmp_path, name, in_manifest, in_files):
    package, wanted = guided(name)
    broken = shutil.copytree(package, tmp_path / "broken")
    if in_manifest is not None:
        manifest = json.loads((broken / "sdonnx.json").read_text())
        in_manifest(manifest)
        (broken / "sdonnx.json").write_text(json.dumps(manifest))
    if in_files is not None:
        in_files(broken)
    result = sdonnx.load(broken).generate(PROMPT, seed=SEED, **GUIDED)
    assert np.abs(result.latents - wanted[0]).max() > 1e-2
    assert psnr(result.images[0], wanted[1]) < 50


def test_every_family_has_its_conditioning():
    assert {*CONDITIONING} == {name for name, family in FAMILIES.items() if family.kind is PackageKind.MODEL}


def test_inputs_that_a_model_requires(saved):
    _, package = saved("pix2pix", families.WITH_IMAGES["pix2pix"])
    with pytest.raises(sdonnx.RequestError, match="this model requires image"):
        sdonnx.load(package).resolve(PROMPT)
    _, package = saved("depth", families.depth)
    with pytest.raises(sdonnx.RequestError, match="depth_image"):
        sdonnx.load(package).resolve(PROMPT, image=random_image())
    _, package = saved("sdxl", families.sdxl)
    for field, value in {"depth_image": random_image(), "image_guidance_scale": 1.5, "refiner_start": 0.8}.items():
        with pytest.raises(sdonnx.RequestError, match=field):
            sdonnx.load(package).resolve(PROMPT, **{field: value})
    beyond = {"original_size": (0, 5), "crop_top_left": (1,), "target_size": 7, "aesthetic_score": 11}
    for field, value in beyond.items():
        with pytest.raises(sdonnx.RequestError, match=field):
            sdonnx.load(package).resolve(PROMPT, **{field: value})


def test_sdxl_by_optimum_and_ours_in_optimum(saved, tmp_path):
    pipe, package = saved("sdxl", families.sdxl)
    common = {"num_inference_steps": 3, "guidance_scale": 6.0, "negative_prompt": NEGATIVE, **SIZE}
    wanted = reference(pipe, prompt=PROMPT, **common)
    traced = export(str(package.parent / "directory"), tmp_path / "traced", via="optimum")
    assert_equal(sdonnx.load(traced).generate(PROMPT, seed=SEED, **common), wanted)
    theirs = ORTStableDiffusionXLPipeline.from_pretrained(package, provider="CPUExecutionProvider")
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(SEED)
    assert psnr(theirs(prompt=PROMPT, generator=generator, **common).images[0], wanted[1]) > 50


LEAST_DECIBELS = {"fp16": 55, "int8-weights": 36, "int8": 20, "int4": 17}
CALIBRATED = ["sdxl", "refiner", "sd1 inpaint", "pix2pix", "depth", "lcm"]
NOT_CALIBRATED = [("sdxl", precision) for precision in ("fp16", "int8-weights", "int4")]


@pytest.mark.parametrize(("name", "precision"), [*((name, "int8") for name in CALIBRATED), *NOT_CALIBRATED])
def test_precisions_of_families(saved, tmp_path, name, precision):
    """Calibration gives a model that is given images some; the loss is that of rounding, on random weights."""
    makers = {**families.TEXT_TO_IMAGE, **families.WITH_IMAGES, "depth": families.depth, "lcm": families.lcm}
    _, package = saved(name, makers[name])
    small = export(str(package.parent / "directory"), tmp_path / "small", precision=precision, calibration="fast")
    manifest = sdonnx.Package.open(package).manifest
    asked = {"seed": SEED, "num_inference_steps": 3, **SIZE, **example_images(manifest, random_image())}
    whole, rounded = (sdonnx.load(root).generate(PROMPT, **asked) for root in (package, small))
    assert LEAST_DECIBELS[precision] < psnr(rounded.images[0], whole.images[0]) < 100
