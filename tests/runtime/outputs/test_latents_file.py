"""What was sampled is never lost: latents in files, and decoding them later."""

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from sdonnx_runtime.outputs.latents_file import is_left_over, load_latents, save_latents
from support.cli import limit_file_size, run_cli, start_cli

import sdonnx

FAST = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 5}
TYPED = ["--size", "64x64", "--steps", "2", "--seed", "5"]


@pytest.fixture(scope="module")
def made(package):
    with sdonnx.load(package) as pipe:
        return pipe.generate("a cat", num_images=2, sigmas=(9.0, 1.0), sampler="euler", **FAST)


def test_a_file_gives_back_what_was_saved(made, tmp_path):
    save_latents(tmp_path / "a.npz", made.latents, made.request, made.model)
    latents, request, model = load_latents(tmp_path / "a.npz")
    np.testing.assert_array_equal(latents, made.latents)
    assert (request, model) == (made.request, made.model)


COMPUTES = [("bf16", "bf16"), ("f32", None), ("auto", None), ("of <another> program", None)]


@pytest.mark.parametrize(("compute", "left"), COMPUTES)
def test_what_latents_were_computed_in_is_in_the_decoded_image(made, package, tmp_path, compute, left):
    save_latents(tmp_path / "a.npz", made.latents, made.request, made.model, compute=compute, temporary=True)
    assert is_left_over(tmp_path / "a.npz")
    assert load_latents(tmp_path / "a.npz")[1] == made.request
    ran = run_cli("decode", "a.npz", "-m", package, "-o", "a.png", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    with Image.open(tmp_path / "a-5.png") as image:
        assert json.loads(image.info["sdonnx"]).get("compute") == left


def test_decoding_equals_diffusers(made, checkpoint, package):
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae")
    with torch.no_grad():
        wanted = vae.decode(torch.from_numpy(made.latents) / vae.config.scaling_factor).sample
    with sdonnx.load(package) as pipe:
        found = pipe.decode(made.latents)
    for one, other in zip(found, VaeImageProcessor().postprocess(wanted, output_type="pil"), strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_a_failing_decode_keeps_what_was_sampled(package, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(package, broken)
    graph = broken / "vae_decoder" / "model.onnx"
    graph.write_bytes(b"\0" * graph.stat().st_size)
    ran = run_cli("run", "a cat", "-m", broken, *TYPED, "-o", "cat.png", cwd=tmp_path)
    assert ran.returncode == 1
    assert "latents saved; resume with: sdonnx decode cat.npz" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "cat.png").exists()
    decoded = run_cli("decode", "cat.npz", "-m", package, "-o", "cat.png", cwd=tmp_path)
    assert decoded.returncode == 0, decoded.stderr
    with sdonnx.load(package) as pipe:
        wanted = pipe.generate("a cat", **FAST).images[0]
    with Image.open(tmp_path / "cat.png") as found:
        np.testing.assert_array_equal(found, wanted)
        assert "a cat" in found.text["parameters"]


ENDED = """
import os, sys
import sdonnx_runtime.generation
sdonnx_runtime.generation.decode = lambda *_: os._exit(9)
from sdonnx.cli.app import main
main()
"""


def test_what_was_sampled_outlives_the_process(package, tmp_path):
    """A decode that takes more memory than there is ends it without a word."""
    run = [sys.executable, "-c", ENDED, "run", "a cat", "-m", str(package), *TYPED, "-o", "cat.png"]
    assert subprocess.run(run, cwd=tmp_path, check=False).returncode == 9
    assert [path.name for path in tmp_path.iterdir()] == ["cat.npz"]
    decoded = run_cli("decode", "cat.npz", "-m", package, "-o", "cat.png", cwd=tmp_path)
    assert decoded.returncode == 0, decoded.stderr
    assert run_cli("run", "a cat", "-m", package, *TYPED, "-o", "dog.png", cwd=tmp_path).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.npz", "cat.png", "dog.png"]


def test_recovered_latents_overwrite_no_file(package, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(package, broken)
    graph = broken / "vae_decoder" / "model.onnx"
    graph.write_bytes(b"\0" * graph.stat().st_size)
    (tmp_path / "cat.npz").write_text("years of work")
    ran = run_cli("run", "a cat", "-m", broken, *TYPED, "-o", "cat.png", cwd=tmp_path)
    assert "latents saved; resume with: sdonnx decode cat-2.npz" in ran.stderr
    assert (tmp_path / "cat.npz").read_text() == "years of work"
    assert load_latents(tmp_path / "cat-2.npz")[0].shape == (1, 4, 8, 8)
    ran = run_cli("run", "a cat", "-m", broken, *TYPED, "--save-latents", "asked.npz", cwd=tmp_path)
    assert "latents saved; resume with: sdonnx decode asked.npz" in ran.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked.npz", "broken", "cat-2.npz", "cat.npz"]


@pytest.mark.parametrize(("prompt", "limit", "left"), [("a cat " * 4000, 70_000, "a.png"), ("a cat", 9_000, "a.npz")])
def test_images_and_latents_outlive_each_other(prompt, limit, left, package, tmp_path):
    """Latents hold the prompt in four bytes a letter, images twice in one, so either can be the one without room."""
    keeping = ["-o", "a.png", "--save-latents", "a.npz"]
    ran = start_cli("run", prompt, "-m", package, *TYPED, *keeping, cwd=tmp_path, preexec_fn=limit_file_size(limit))
    assert ran.returncode == 1
    assert "can't be written" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == [left]


def test_a_preview_that_fails_stops_nothing(package, tmp_path):
    showing = ["-o", "a.png", "--preview", "shown/p.png"]
    (tmp_path / "shown").mkdir()
    lost = """
import pathlib, shutil
import sdonnx_runtime.generation as generation
from sdonnx.cli.app import main
real = generation.Progress.preview
generation.Progress.preview = lambda step: (shutil.rmtree("shown", ignore_errors=True), real(step))[1]
main()
"""
    arguments = [sys.executable, "-c", lost, "run", "a cat", "-m", str(package), *TYPED, *showing]
    ran = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("preview disabled") == 1
    assert (tmp_path / "a.png").is_file()


def test_latents_are_saved_on_request(package, tmp_path):
    ran = run_cli("run", "a cat", "-m", package, *TYPED, "-o", "a.png", "--save-latents", "kept.npz", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    latents, request, _ = load_latents(tmp_path / "kept.npz")
    assert latents.shape == (1, 4, 8, 8)
    assert request.seed == 5


def test_files_that_are_no_latents(made, package, tmp_path):
    save_latents(tmp_path / "whole.npz", made.latents, made.request, made.model)
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("no latents")
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    np.savez(tmp_path / "flat.npz", latents=np.zeros(3, np.float32), recipe=np.load(tmp_path / "whole.npz")["recipe"])
    for name in ("cut.npz", "text.npz", "other.npz", "flat.npz", "none.npz", "image.png"):
        ran = run_cli("decode", name, "-m", package, cwd=tmp_path)
        assert ran.returncode == 2, name
        assert name in ran.stderr
        assert "Traceback" not in ran.stderr
        assert name == "flat.npz" or "give one that 'sdonnx run --save-latents' wrote" in " ".join(ran.stderr.split())
    with sdonnx.load(package) as pipe, pytest.raises(sdonnx.RequestError, match=r"\(1, 3, 8, 8\)"):
        pipe.decode(np.zeros((1, 3, 8, 8), np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "abc"}, "seed is 'abc'"),
        ({"seed": None}, "seed is missing"),
        ({"sampler": None}, "sampler is missing"),
        ({"sampler": ["euler"]}, "sampler is ("),
        ({"schedule": "nope"}, "schedule is 'nope'"),
        ({"timestep_spacing": 3}, "timestep_spacing is 3"),
        ({"prompt": None}, "prompt is None"),
        ({"prompt": "\ud800"}, "which is not valid Unicode"),
        ({"variation": 5}, "variation is 5"),
        ({"variation": [5, "much"]}, "variation[1] is 'much'"),
        ({"sigmas": {"a": 1}}, "give a list of numbers"),
        ({"guidance_scale": 10**400}, "guidance_scale is 1000"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"strength": 7}, "strength is 7"),
        ({"eta": "x"}, "eta is 'x'"),
        ({"s_noise": 1e300}, "s_noise is 1e+300"),
        ({"num_images": 3}, "expected float32 (images, channels, h, w)"),
        ({"num_images": 10**30}, "num_images is"),
        ({"mask_blur": None}, "mask_blur is None"),
        ({"image": "cat.png"}, "image is str"),
        ({"model": 5}, "holds no latents, or is damaged"),
        ({"steps": 5}, "holds no latents, or is damaged"),
    ],
)
def test_a_request_in_a_latents_file_that_was_changed_is_refused(made, tmp_path, change, message):
    save_latents(tmp_path / "a.npz", made.latents, made.request, made.model)
    with np.load(tmp_path / "a.npz") as file:
        latents, recipe = file["latents"], json.loads(str(file["recipe"]))
    np.savez(tmp_path / "a.npz", latents=latents, recipe=np.array(json.dumps({**recipe, **change})))
    with pytest.raises(sdonnx.RequestError) as error:
        load_latents(tmp_path / "a.npz")
    assert message in str(error.value)
    assert "a.npz" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "header", ["{'descr': ('<f4'", "{'descr' '<f4'}", "{'descr': '<f4', 'shape': (10**9, 10**9)}", "\0"]
)
def test_numpys_headers_that_are_damaged(made, tmp_path, header):
    save_latents(tmp_path / "whole.npz", made.latents, made.request, made.model)
    with zipfile.ZipFile(tmp_path / "whole.npz") as whole, zipfile.ZipFile(tmp_path / "a.npz", "w") as changed:
        changed.writestr("recipe.npy", whole.read("recipe.npy"))
        text = header.encode() + b"\n"
        changed.writestr("latents.npy", b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + bytes(64))
    with pytest.raises(sdonnx.RequestError, match="no latents, or is damaged"):
        load_latents(tmp_path / "a.npz")


def test_what_a_recipe_or_latents_can_not_be(made, tmp_path):
    deep = '{"model": "m", "prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"
    for recipe in (deep, "[]", "5", '{"model": "m"}'):
        np.savez(tmp_path / "a.npz", latents=made.latents, recipe=np.array(recipe))
        with pytest.raises(sdonnx.RequestError, match="no latents, or is damaged"):
            load_latents(tmp_path / "a.npz")
    save_latents(tmp_path / "a.npz", made.latents * np.nan, made.request, made.model)
    with pytest.raises(sdonnx.RequestError, match="not finite"):
        load_latents(tmp_path / "a.npz")


@pytest.mark.parametrize("choices", [{}, {"variation": (7, 0.3)}, {"strength": 0.5, "schedule": "karras", "eta": 1.0}])
def test_recipes_of_all_kinds_come_back(package, tmp_path, choices):
    start = {"image": Image.new("RGB", (64, 64), "teal")} if "strength" in choices else {}
    with sdonnx.load(package) as pipe:
        made = pipe.generate("a cat", sampler="euler_ancestral", num_images=2, **FAST, **choices, **start)
    save_latents(tmp_path / "a.npz", made.latents, made.request, made.model)
    assert load_latents(tmp_path / "a.npz")[1] == replace(made.request, image=None)
    decoded = run_cli("decode", "a.npz", "-m", package, "-o", "a.png", cwd=tmp_path)
    assert decoded.returncode == 0, decoded.stderr
    assert len(list(tmp_path.glob("a-*.png"))) == 2


def test_latents_of_another_model(made, package, tmp_path):
    save_latents(tmp_path / "a.npz", made.latents, made.request, "somebody/else")
    refused = run_cli("decode", "a.npz", cwd=tmp_path)
    assert refused.returncode == 2
    assert "the latents were made by the model 'somebody/else'; give its package with -m" in refused.stderr
    warned = run_cli("decode", "a.npz", "-m", package, "-o", "a.png", cwd=tmp_path)
    assert warned.returncode == 0
    assert "the latents were made by 'somebody/else', but are decoded by 'tiny'" in " ".join(warned.stderr.split())
