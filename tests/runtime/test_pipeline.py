"""The loop as a program sees it: seeds, counts, guidance, streaming, cancelling, what stays loaded."""

import gc
import json
import random
import shutil
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from sdonnx_runtime.execution import staged_model as chain
from sdonnx_runtime.memory import budget

import sdonnx

SMALL = {"width": 64, "height": 64, "num_inference_steps": 3, "sampler": "euler_ancestral"}


@pytest.fixture(scope="module")
def pipe(package):
    with sdonnx.load(package) as pipeline:
        yield pipeline


@pytest.fixture
def opened(monkeypatch):
    """Names of the components in the order in which sessions are opened, and how many are alive at once."""
    log, alive, most = [], set(), [0]
    real = chain.Session

    class Watched(real):
        def __init__(self, path: Path, **options):
            super().__init__(path, **options)
            log.append(path.parent.name)
            alive.add(id(self))
            most[0] = max(most[0], len(alive))

        def __del__(self):
            alive.discard(id(self))

    monkeypatch.setattr("sdonnx_runtime.execution.staged_model.Session", Watched)
    return log, alive, most


@pytest.mark.core
def test_images_of_a_batch_equal_those_made_alone(pipe):
    batch = pipe.generate("a cat", seed=7, num_images=3, **SMALL)
    assert batch.seeds == (7, 8, 9)
    for index, seed in enumerate(batch.seeds):
        alone = pipe.generate("a cat", seed=seed, **SMALL)
        np.testing.assert_array_equal(alone.images[0], batch.images[index])
        np.testing.assert_array_equal(alone.latents[0], batch.latents[index])
    assert not np.array_equal(batch.latents[0], batch.latents[1])


def test_zero_is_a_seed_and_a_guidance_scale(pipe):
    zero = pipe.generate("a cat", seed=0, guidance_scale=0, **SMALL)
    assert zero.seeds == (0,)
    assert zero.request.guidance_scale == 0
    none = pipe.generate("a cat", seed=0, guidance_scale=1, **SMALL)
    np.testing.assert_array_equal(zero.latents, none.latents)  # as in diffusers and in the model cards of Turbo models
    other = pipe.generate("a cat", seed=0, guidance_scale=7.5, **SMALL)
    assert np.abs(zero.latents - other.latents).max() > 1e-2


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
@pytest.mark.parametrize("start", ["noise", "image", "mask"])
def test_a_variation_goes_from_one_seeds_image_to_anothers(pipe, sampler, start):
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    images = {"image": image, "strength": 0.7} if start != "noise" else {}
    images |= {"mask_image": image} if start == "mask" else {}
    settings = {**SMALL, "sampler": sampler, **images}
    ends = [pipe.generate("a cat", seed=seed, **settings).latents for seed in (3, 9)]
    for strength, end in zip((0, 1), ends, strict=True):
        varied = pipe.generate("a cat", seed=3, variation=(9, strength), **settings)
        np.testing.assert_allclose(varied.latents, end, atol=1e-5)
    alone = pipe.generate("a cat", seed=3, variation=(9, 0.3), **settings)
    assert 1e-3 < np.abs(alone.latents - ends[0]).max() < np.abs(ends[1] - ends[0]).max()
    both = pipe.generate("a cat", seed=3, variation=(8, 0.3), num_images=2, **settings)
    assert both.seeds == (3, 3)
    np.testing.assert_array_equal(both.latents[1], alone.latents[0])


def test_a_random_seed_is_reported_and_repeats(pipe):
    first = pipe.generate("a cat", **SMALL)
    again = pipe.generate("a cat", seed=first.seeds[0], **SMALL)
    np.testing.assert_array_equal(first.latents, again.latents)


@pytest.mark.parametrize(("guidance", "rows"), [(1, 1), (1.0, 1), (7.5, 2), (0, 1), (0.5, 2)])
def test_guidance_1_or_0_runs_the_unet_on_a_batch_of_1(package, monkeypatch, guidance, rows):
    seen = []
    real = chain.Session.run

    def run(self, feeds, keep=()):
        if "timestep" in feeds:
            seen.append(len(feeds["encoder_hidden_states"]))
        return real(self, feeds, keep)

    monkeypatch.setattr(chain.Session, "run", run)
    sdonnx.load(package).generate("a cat", seed=1, guidance_scale=guidance, **SMALL)
    assert seen == [rows] * SMALL["num_inference_steps"]


@pytest.mark.core
def test_one_component_is_in_memory_at_a_time(package, opened):
    log, alive, most = opened
    sdonnx.load(package).generate("a cat", seed=1, num_images=2, **SMALL)
    assert log == ["text_encoder", "unet", "vae_decoder"]
    assert most == [1]
    assert not alive


@pytest.mark.parametrize("limit", ["max", "auto", "enough", "tight"])
def test_keep_loaded_opens_each_component_once_where_memory_allows_it(package, opened, limit, monkeypatch):
    log, alive, _ = opened
    resident = budget.resident_memory()  # under `kept_memory` it grows by more than is between these limits
    monkeypatch.setattr(budget, "resident_memory", lambda: resident)
    with sdonnx.load(package, memory="max", keep_loaded=True) as pipeline:
        plan = pipeline.plan("a cat", always=True, **SMALL)
    sizes = {"enough": plan.peak + 10**7, "tight": (plan.peak + plan.minimum_budget) // 2}
    with sdonnx.load(package, memory=sizes.get(limit, limit), keep_loaded=True) as pipeline:
        first = pipeline.generate("a cat", seed=1, **SMALL)
        opened_first = list(log)
        again = pipeline.generate("a cat", seed=1, **SMALL)
        assert np.array_equal(first.latents, again.latents)
        if limit == "tight":
            assert len(log) > len(opened_first)
            assert not alive
        else:
            assert log == ["text_encoder", "unet", "vae_decoder"]
            assert len(alive) == 3
            assert pipeline.held_bytes > 0
    assert not alive


@pytest.mark.parametrize("options", [{"keep_loaded": True}, {"memory": "max"}])
def test_a_second_image_with_kept_components_needs_no_files_of_the_tokenizer(package, tmp_path, options):
    copy = shutil.copytree(package, tmp_path / "package")
    with sdonnx.load(copy, **options) as pipeline:
        first = pipeline.generate("a cat", seed=1, **SMALL)
        shutil.rmtree(copy / "tokenizer")
        again = pipeline.generate("a cat", seed=1, **SMALL)
        assert np.array_equal(first.latents, again.latents)
        pipeline.close()
        with pytest.raises(sdonnx.PackageError, match="tokenizer"):
            pipeline.generate("a cat", seed=1, **SMALL)


@pytest.mark.parametrize("options", [{}, {"memory": "min", "keep_loaded": True}])
def test_where_components_are_unloaded_the_tokenizer_is_too(package, tmp_path, options):
    copy = shutil.copytree(package, tmp_path / "package")
    with sdonnx.load(copy, **options) as pipeline:
        pipeline.generate("a cat", seed=1, **SMALL)
        shutil.rmtree(copy / "tokenizer")
        with pytest.raises(sdonnx.PackageError, match="tokenizer"):
            pipeline.generate("a cat", seed=1, **SMALL)


def test_a_tokenizer_of_another_text_encoder_is_refused(package, tmp_path):
    copy = shutil.copytree(package, tmp_path / "package")
    config = copy / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 1000}))
    with (
        sdonnx.load(copy) as pipeline,
        pytest.raises(sdonnx.PackageError, match="has ids up to 49407, text_encoder has 1000 embeddings; export"),
    ):
        pipeline.generate("a cat", seed=1, **SMALL)


def test_stream_tells_of_each_step(pipe):
    stream = pipe.stream("a cat", seed=3, num_images=2, **SMALL)
    with pytest.raises(sdonnx.RequestError, match="no result"):
        _ = stream.result
    steps = list(stream)
    assert [(step.image, step.step) for step in steps] == [(i, s) for i in range(2) for s in range(3)]
    assert {(step.num_images, step.num_steps) for step in steps} == {(2, 3)}
    assert all(step.latents.shape == step.denoised.shape == (1, 4, 8, 8) for step in steps)
    result = stream.result
    np.testing.assert_array_equal(result.latents[1], steps[-1].latents[0])
    assert result.timings.steps == tuple(step.seconds for step in steps)
    assert set(result.timings.load) == set(result.timings.run) == {"text_encoder", "unet", "vae_decoder"}


def test_stream_tells_which_component_it_opens(package, opened):
    log, _, _ = opened
    with sdonnx.load(package, memory="max") as pipeline:
        for expected in (["text_encoder", None, "unet", None, "vae_decoder", None], []):
            told, before = [], len(log)
            stream = pipeline.stream("a cat", seed=3, **SMALL)
            stream.on_opening(lambda name, told=told: told.append((name, len(log))))
            for _ in stream:
                pass
            assert [name for name, _ in told] == expected
            assert [count - before for _, count in told] == [0, 1, 1, 2, 2, 3][: len(told)]


def test_leaving_the_loop_cancels_and_frees_the_pipeline(package, opened):
    _, alive, _ = opened
    pipeline = sdonnx.load(package)
    for _step in pipeline.stream("a cat", seed=3, **SMALL):
        break
    gc.collect()
    assert not alive
    assert len(pipeline.generate("a cat", seed=3, **SMALL).images) == 1


def test_a_second_generation_meanwhile_is_refused(package):
    pipeline = sdonnx.load(package)
    first = pipeline.stream("a cat", seed=3, **SMALL)
    next(first)
    with pytest.raises(sdonnx.RequestError, match="generating another image"):
        pipeline.generate("a dog", **SMALL)
    first.close()
    with pytest.raises(sdonnx.RequestError, match="no result"):
        _ = first.result
    pipeline.generate("a dog", **SMALL)


@pytest.mark.core
def test_close_from_another_thread_stops_inside_the_step(package):
    pipeline = sdonnx.load(package, threads=1)
    size = {"width": 768, "height": 768, "num_inference_steps": 50, "sampler": "euler"}
    stream = pipeline.stream("a cat", seed=1, **size)
    next(stream)
    timer = threading.Timer(0.2, stream.close)
    timer.start()
    steps = list(stream)
    timer.join()
    assert len(steps) < 49
    with pytest.raises(sdonnx.RequestError, match="cancelled"):
        _ = stream.result


@pytest.mark.parametrize("memory", ["max", "auto"])
def test_close_from_another_thread_at_any_moment_raises_nothing_and_frees_the_pipeline(package, memory):
    """While components load, inside a step, between two, while the image is decoded, and after the end."""
    moments = random.Random(0)
    with sdonnx.load(package, memory=memory) as pipeline:
        start = time.perf_counter()
        expected = pipeline.generate("a cat", seed=1, **SMALL)
        longest = 1.2 * (time.perf_counter() - start)
        for _ in range(12):
            stream = pipeline.stream("a cat", seed=1, **SMALL)
            timer = threading.Timer(moments.uniform(0, longest), stream.close)
            timer.start()
            steps = [step.step for step in stream]
            timer.join()
            assert steps == list(range(len(steps)))
            if len(steps) < SMALL["num_inference_steps"]:
                with pytest.raises(sdonnx.RequestError, match="no result"):
                    _ = stream.result
        np.testing.assert_array_equal(pipeline.generate("a cat", seed=1, **SMALL).images[0], expected.images[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tiling": "z"}, "tiling is 'z'; choose x, y, xy"),
        ({"width": 500}, "width 500 is not a multiple of 8; the nearest are 496 and 504"),
        ({"height": 0}, "height is 0"),
        ({"width": 64.0}, "width is 64.0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; give a whole number from 1 to 1000"),
        ({"num_inference_steps": 1001}, "from 1 to 1000"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale": "high"}, "guidance_scale is 'high'"),
        ({"guidance_scale": 1e300}, "guidance_scale is 1e+300; give a number from -1000 to 1000"),
        ({"sigmas": 5}, "sigmas is 5; give a list of numbers"),
        ({"timesteps": "999"}, "timesteps is '999'; give a list of numbers"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is"),
        ({"num_images": 0}, "num_images is 0"),
        ({"sampler": "eulr"}, "euler"),
        ({"variation": (1, 1.5)}, "variation[1] is 1.5; give a number from 0 to 1"),
        ({"variation": 7}, "variation is 7; give a tuple of 2 numbers"),
        ({"prompt": None}, "prompt is None"),
        ({"prompt": "a \udcff cat"}, "which is not valid Unicode; give UTF-8"),
        ({"negative_prompt": "\ud800"}, "negative_prompt is"),
        ({"guidance_scale": 10**400}, "give a number from -1000 to 1000"),
        ({"paste": "no"}, "paste is 'no'; give True or False"),
        ({"s_noise": 10**400, "sampler": "euler"}, "give a number from 0 to 1000"),
        ({"steps": 3}, "a request has no 'steps'; its fields are prompt"),
    ],
)
def test_a_request_that_can_not_be_served(pipe, change, message):
    with pytest.raises(sdonnx.RequestError) as error:
        pipe.generate(sdonnx.Request(prompt="a cat"), **change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_long_prompt_is_cut_with_a_warning(pipe, caplog):
    pipe.generate("a very tall tower " * 30, prompt_syntax="plain", seed=1, guidance_scale=1, **SMALL)
    assert "longer than 77 tokens; cut: " in caplog.text


@pytest.mark.parametrize("threads", [0, -1, 10**9])
def test_threads_that_no_machine_has(package, threads):
    with pytest.raises(sdonnx.RequestError, match=f"threads is {threads}; give .* from 1 to [0-9]+, the CPUs"):
        sdonnx.load(package, threads=threads)


def test_exported_members():
    public = {name for name, value in vars(sdonnx).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    assert public == set(sdonnx.__all__)
    errors = {sdonnx.RequestError, sdonnx.PackageError, sdonnx.DeviceError, sdonnx.ExportError}
    assert all(issubclass(error, sdonnx.SdonnxError) for error in errors)
    assert issubclass(sdonnx.RequestError, ValueError)


@pytest.mark.core
@pytest.mark.skipif(sys.platform == "win32", reason="the Hub's cache has no links there")
def test_a_package_is_taken_from_the_hubs_cache(package, tmp_path, monkeypatch):
    """huggingface-hub keeps files as blobs, and a snapshot as links to them."""
    cache = tmp_path / "hub" / "models--org--name"
    snapshot = cache / "snapshots" / "abc123"
    (cache / "blobs").mkdir(parents=True)
    for number, path in enumerate(path for path in package.rglob("*") if path.is_file()):
        shutil.copy(path, cache / "blobs" / f"blob{number}")
        link = snapshot / path.relative_to(package)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(cache / "blobs" / f"blob{number}")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    here = sdonnx.load(package).generate("a cat", seed=1, **SMALL)
    for memory in ("auto", "min"):
        found = sdonnx.load("org/name", memory=memory).generate("a cat", seed=1, **SMALL)
        np.testing.assert_array_equal(found.latents, here.latents)


def test_models_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(sdonnx.PackageError, match="no such directory, bundled model or Hub id"):
        sdonnx.load("nothing")
    with pytest.raises(sdonnx.PackageError, match="the Hub did not give it"):
        sdonnx.load("nobody/nothing")
