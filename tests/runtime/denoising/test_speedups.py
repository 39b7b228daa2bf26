"""DeepCache and guidance intervals: each does what its paper says, against loops over diffusers' U-Net written here."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image
from sdonnx_runtime.denoising.denoiser import guidance_interval
from sdonnx_runtime.denoising.step_cache import DeepCache, unet_graphs
from sdonnx_runtime.packages.manifest import MANIFEST
from sdonnx_runtime.packages.variant import CACHED_FEATURES
from sdonnx_runtime.sampling.noise import Noise
from sdonnx_runtime.sampling.registry import SAMPLERS, sampler_options
from sdonnx_runtime.sampling.schedule import make_schedule
from sdonnx_runtime.sampling.scheduler_config import SchedulerConfig
from support.ldm import VARIATIONS, tiny_pipeline
from support.samplers import SD15
from typer.testing import CliRunner

import sdonnx
from sdonnx.cli.app import app

SMALL = {"width": 64, "height": 64}


@pytest.fixture(scope="module", params=VARIATIONS)
def pair(request, export_once, tmp_path_factory):
    """A diffusers pipeline and our package of it."""
    directory = tmp_path_factory.mktemp("fast")
    pipe = tiny_pipeline(**VARIATIONS[request.param])
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(directory / "diffusers")
    return pipe, export_once(directory / "diffusers", directory / "package")


def repeating(unet, whole):
    """Lets the block before diffusers' last residual block repeat, unless ``whole`` holds, what it gave before.

    What comes before it is computed all the same and thrown away, so that nothing of ours is needed.
    """
    block, kept = unet.up_blocks[-1], []

    def hook(_module, _inputs, output):
        if whole[0]:
            kept[:] = [output]
            return output
        rows = len(_inputs[0])
        return (kept[0][0][-rows:],) if isinstance(output, tuple) else kept[0][-rows:]

    layers = block.attentions if hasattr(block, "attentions") else block.resnets
    return layers[-2].register_forward_hook(hook)


def sample_with_diffusers(pipe, *, guidance, reuse=1, interval=(0, np.inf), steps=8):
    """Euler's method over diffusers' U-Net; latents, and how many rows each step took."""
    scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(steps)
    ids = pipe.tokenizer(["", "a cat"], padding="max_length", return_tensors="pt").input_ids
    x = torch.from_numpy(Noise(5)((1, 4, 8, 8))) * scheduler.init_noise_sigma
    whole, age, before, taken = [True], 0, 0, []
    handle = repeating(pipe.unet, whole)
    with torch.no_grad():
        text = pipe.text_encoder(ids)[0]
        for index, t in enumerate(scheduler.timesteps):
            guided = guidance != 1 and interval[0] < scheduler.sigmas[index] <= interval[1]
            rows = 2 if guided else 1
            whole[0] = age % reuse == 0 or index == steps - 1 or rows > before
            age, before = (1 if whole[0] else age + 1), (rows if whole[0] else before)
            scaled = torch.cat([scheduler.scale_model_input(x, t)] * rows)
            output = pipe.unet(scaled, t, text[-rows:]).sample
            output = output[:1] + guidance * (output[1:] - output[:1]) if guided else output
            x = scheduler.step(output, t, x).prev_sample
            taken.append(rows)
    handle.remove()
    return x.numpy(), taken


@pytest.mark.parametrize(
    "settings",
    [
        {"reuse": 2, "guidance": 7.5},
        {"reuse": 3, "guidance": 1.0},
        {"reuse": 3, "guidance": 4.0},
        {"interval": (0.5, 3.0), "guidance": 4.0},
        {"interval": (1.7, np.inf), "guidance": 4.0, "reuse": 2},
        {"interval": (0.5, 3.0), "guidance": 4.0, "reuse": 4},
    ],
)
def test_step_caching_and_guidance_intervals_equal_a_loop_over_diffusers_unet(pair, settings):
    pipe, package = pair
    wanted, rows = sample_with_diffusers(pipe, **settings)
    low, high = settings.get("interval", (None, None))
    asked = {"sampler": "euler", "num_inference_steps": 8, "seed": 5, "guidance_scale": settings["guidance"], **SMALL}
    lossy = {"cache_interval": settings.get("reuse", 1)}
    if low is not None:
        lossy["guidance_interval"] = (low, min(high, 1e6))
        assert set(rows) == {1, 2}
    with sdonnx.load(package, memory="max") as ours:
        found = ours.generate("a cat", **asked, **lossy).latents
        without = ours.generate("a cat", **asked).latents
    scale = np.abs(wanted).max()
    assert np.abs(found - wanted).max() < 1e-4 * scale
    assert np.abs(without - wanted).max() > 1e-3 * scale


def test_none_of_it_is_the_plain_loop(package):
    settings = {"num_inference_steps": 5, "seed": 5, **SMALL}
    with sdonnx.load(package, memory="max") as pipe:
        plain = pipe.generate("a cat", **settings).latents
        none = {"cache_interval": 1, "token_downsampling": False, "guidance_interval": (0, 1e6)}
        same = pipe.generate("a cat", **none, **settings).latents
        np.testing.assert_array_equal(same, plain)
        alone = pipe.generate("a cat", guidance_interval=(1e5, 1e6), **settings).latents
        np.testing.assert_array_equal(alone, pipe.generate("a cat", guidance_scale=1, **settings).latents)


def test_the_interval_is_open_below_and_closed_above():
    """As in the paper: sigma_lo < sigma <= sigma_hi."""
    model = guidance_interval((1.0, 2.0), lambda x, _sigma, _t: x + 1, lambda x, _sigma, _t: x)
    assert [model(0, sigma, 0) for sigma in (0.5, 1.0, 1.1, 2.0, 2.1)] == [0, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache_interval": 0}, "cache_interval is 0; give a whole number from 1 to 1000"),
        ({"cache_interval": True}, "cache_interval is True; give a whole number"),
        ({"guidance_interval": 3}, "guidance_interval is 3; give a tuple of 2 numbers"),
        ({"guidance_interval": (2, 1)}, "guidance_interval is (2, 1); give the lower number first"),
        ({"guidance_interval": (-1, 1)}, "guidance_interval[0] is -1; give a number from 0 to 1000000.0"),
        ({"guidance_interval": (0, float("inf"))}, "guidance_interval[1] is inf; give a number from 0 to 1000000.0"),
        ({"guidance_steps": (0.5, 1.5)}, "guidance_steps[1] is 1.5; give a number from 0 to 1"),
    ],
)
def test_values_out_of_range(package, change, message):
    with pytest.raises(sdonnx.RequestError) as error:
        sdonnx.load(package).resolve("a cat", **change)
    assert message in str(error.value)


def graphs_by_step(sampler, reuse, steps, begin=0):
    """The graph of each U-Net call: a list for each step."""
    config = SchedulerConfig.from_dict(SD15)
    schedule = make_schedule(config, sampler, steps).starting_at(begin)
    taken = [[]]

    def unet(inputs, variant):
        taken[-1].append(variant.name)
        return {
            "out_sample": inputs["sample"] * 0.1,
            **({CACHED_FEATURES: np.zeros((1, 2))} if variant.cache == "caching" else {}),
        }

    run = DeepCache(unet, unet_graphs(reuse, token_downsampling=False), reuse)

    def denoise(x, sigma, t):
        return x - sigma * run({"sample": x, "timestep": np.array(t)})

    noise = partial(np.ones, dtype=np.float32)
    for step in SAMPLERS[sampler](denoise, noise((1, 4, 2, 2)), schedule, noise, **sampler_options(config, sampler)):
        run.next_step(last=step.index + 2 == step.total)
        taken.append([])
    return taken[:-1]


K, R = "caching", "cached"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (("euler", 3, 8), [[K], [R], [R], [K], [R], [R], [K], [K]]),
        (("euler", 3, 8, 3), [[K], [R], [R], [K], [K]]),
        (("euler", 1000, 4), [[K], [R], [R], [K]]),
        (("euler", 2, 1), [[K]]),
        (("dpmpp_2m", 2, 5), [[K], [R], [K], [R], [K]]),
        (("heun", 2, 6), [[K, K], [R, R], [K, K], [R, R], [K, K], [K]]),
        (("dpm2", 3, 5), [[K, K], [R, R], [R, R], [K, K], [K]]),
        (("dpm2_ancestral", 3, 5), [[K, K], [R, R], [R, R], [K, K], [K]]),
        (("euler", 1, 3), [["plain"]] * 3),
    ],
)
def test_steps_are_counted_and_the_first_and_last_are_whole(asked, expected):
    assert graphs_by_step(*asked) == expected


def test_a_step_back_to_more_noise_is_whole():
    """Restart sampling lifts the state from 0.1 or more to 2 or less, half-way through."""
    config = SchedulerConfig.from_dict(SD15)
    sigmas = make_schedule(config, "restart", 16).sigmas[:-1]
    inside = [index for index, sigma in enumerate(sigmas) if 0.1 <= sigma <= 2]
    first_again = inside[-1]
    taken = graphs_by_step("restart", 1000, 16)
    assert [index for index, step in enumerate(taken) if K in step] == [0, first_again, len(taken) - 1]


def test_a_larger_batch_than_the_cached_one_runs_the_whole_unet():
    """As where guidance begins; the conditional row alone, where it ends, is the last of what is kept."""
    taken = []

    def unet(inputs, variant):
        taken.append((variant.name, inputs.get(CACHED_FEATURES)))
        rows = len(inputs["text"])
        return {"out": np.zeros((rows, 1)), **({CACHED_FEATURES: np.arange(rows)} if variant.name == K else {})}

    run = DeepCache(unet, unet_graphs(10, token_downsampling=False), 10)
    for rows in (1, 1, 2, 2, 1):
        run({"sample": np.zeros((1, 1)), "timestep": np.array(5.0), "text": np.zeros((rows, 3))})
        run.next_step(last=False)
    assert [variant for variant, _ in taken] == [K, R, K, R, R]
    assert [None if kept is None else kept.tolist() for _, kept in taken] == [None, [0], None, [0, 1], [1]]


def test_images_of_every_kind_reuse_steps(package):
    """From noise, from an image, with a mask; several at once are those made alone."""
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    with sdonnx.load(package, memory="max") as pipe:
        for start in ({}, {"image": image}, {"image": image, "mask_image": image}):
            settings = {**SMALL, "num_inference_steps": 7, **start}
            both = pipe.generate("a cat", seed=3, num_images=2, cache_interval=3, **settings)
            alone = pipe.generate("a cat", seed=4, cache_interval=3, **settings)
            np.testing.assert_array_equal(both.latents[1], alone.latents[0])
            whole = pipe.generate("a cat", seed=4, **settings)
            assert np.abs(whole.latents - alone.latents).max() > 1e-4


def test_a_package_without_its_graphs_says_so(package, tmp_path):
    old = shutil.copytree(package, tmp_path / "old")
    manifest = json.loads((old / MANIFEST).read_text())
    manifest["components"]["unet"]["graphs"] = {"plain": "unet/model.onnx"}
    (old / MANIFEST).write_text(json.dumps(manifest))
    ran = CliRunner().invoke(app, ["run", "a cat", "-m", str(old), "--cache-interval", "2"])
    assert isinstance(ran.exception, sdonnx.RequestError)
    assert "has no U-Net graph 'caching', which cache_interval or token_downsampling requires" in str(ran.exception)


def test_fast_is_a_preset_whose_parts_can_be_chosen_otherwise(package, tmp_path):
    def asked(*options):
        command = ["run", "a cat", "-m", str(package), "--size", "64x64", "--steps", "2", "--seed", "1", "--json"]
        ran = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "cat.png"), *options])
        assert ran.exit_code == 0, ran.output
        return json.loads(ran.stdout)["request"]

    assert sdonnx.FAST.items() <= asked("--fast").items()
    changed = asked("--fast", "--cache-interval", "1", "--no-token-downsampling", "--guidance-interval", "0.3,5.4")
    fields = {"cache_interval": 1, "token_downsampling": False}
    assert {**fields, "guidance_interval": [0.3, 5.4]}.items() <= changed.items()
    assert asked("--guidance-interval", "0.1:0.9")["guidance_steps"] == [0.1, 0.9]
    plain = asked()
    assert {"cache_interval": 1, "token_downsampling": False, "guidance_interval": None}.items() <= plain.items()


@pytest.mark.parametrize("text", ["3", "1,2,3", "low,high", "0.1:0.5:0.9"])
def test_an_interval_is_two_numbers(package, text):
    ran = CliRunner().invoke(app, ["run", "a cat", "-m", str(package), "--guidance-interval", text])
    assert isinstance(ran.exception, sdonnx.RequestError)
    assert f"'{text}'" in str(ran.exception)
