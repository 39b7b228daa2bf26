"""``sdonnx run --server``: files, JSON and exit codes are those of a local run."""

import json

import pytest
from PIL import Image
from sdonnx_models import DEFAULT, bundled
from support.remote import FAST, names, run, same_files, states
from support.server import running_server


@pytest.mark.parametrize(
    "options",
    [
        ["--seed", "7", "--no-enlarge", "-o", "o.png"],
        ["--seed", "7", "--count", "2", "--variation", "3:0.2", "--sigmas", "9,3,0.5", "--grid"],
        ["--seed", "7", "--image", "../rgba.png", "--strength", "0.8", "--hires", "2x:0.5:2"],
        ["--seed", "7", "--image", "../cmyk.jpg", "--mask", "../mask.png", "--only-masked", "8"],
    ],
)
def test_files_and_json_are_those_of_a_local_run(server, folders, options):
    here, there = folders
    noise = Image.effect_noise((64, 64), 90)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    Image.merge("RGBA", [noise, mask, noise, mask]).save(here.parent / "rgba.png")
    Image.merge("RGB", [noise, mask, noise]).convert("CMYK").save(here.parent / "cmyk.jpg")
    mask.save(here.parent / "mask.png")
    local = run("a red apple", *FAST, *options, "--json", cwd=here)
    remote = run("a red apple", *FAST, *options, "--json", "--server", server.url, cwd=there)
    assert (remote.returncode, remote.stderr) == (0, ""), remote.stderr
    same_files(here, there)
    expected, report = json.loads(local.stdout), json.loads(remote.stdout)
    assert report["timings"].keys() == expected["timings"].keys()
    assert {**report, "timings": None} == {**expected, "timings": None}


def test_controls_are_those_that_the_server_has(package, control, folders):
    here, there = folders
    Image.effect_noise((64, 64), 90).save(here.parent / "pose.png")
    options = [*FAST, "--seed", "1", "--control-preprocessor", "canny"]
    run("a cat", "-m", package, "--control", f"{control}:../pose.png:0.8:0:0.9", *options, cwd=here)
    with running_server(packages=(package, control)) as other:
        options += ["--server", other.url, "-m", package.name]
        ran = run("a cat", "--control", f"{control.name}:../pose.png:0.8:0:0.9", *options, cwd=there)
        assert ran.returncode == 0, ran.stderr
        same_files(here, there)
        for wrong in (["--control", "depth:../pose.png"], ["--control", "edges-onnx:../pose.png", "--vae", "taesd"]):
            ran = run("a cat", *wrong, *options, cwd=there)
            assert (ran.returncode, "serves no" in ran.stderr) == (1, True), ran.stderr


def test_an_upscaler_is_one_that_the_server_has(upscaler, folders):
    here, there = folders
    options = [*FAST, "--seed", "1", "--hires", "1.5x:0.5:2", "--hires-upscaler"]
    local = run("a cat", *options, upscaler[1], "--json", cwd=here)
    assert json.loads(local.stdout)["request"]["hires_upscaler"] == "sharp.safetensors", local.stderr
    with running_server(packages=(bundled()[DEFAULT], upscaler[1])) as other:
        options = [*FAST, "--seed", "1", "--hires", "1.5x:0.5:2", "--server", other.url, "--hires-upscaler"]
        remote = run("a cat", *options, "sharp-onnx", "--json", cwd=there)
        assert json.loads(remote.stdout)["request"] == json.loads(local.stdout)["request"]
        same_files(here, there)
        ran = run("a cat", *options, "blurry", cwd=there)
        assert (ran.returncode, "serves no upscaler 'blurry'" in ran.stderr) == (1, True), ran.stderr


def test_an_image_that_is_not_enlarged_is_the_servers_file(server, tmp_path):
    assert run("a cat", *FAST, "--no-enlarge", "-o", "o.png", "--server", server.url, cwd=tmp_path).returncode == 0
    (stored,) = server.context.store.of_job(server.context.queue.jobs[-1].id)
    assert (tmp_path / "o.png").read_bytes() == server.context.store.read(stored.name)


def test_a_preview_is_written(server, tmp_path):
    options = [*FAST, "-o", "o.png", "--preview", "p.png", "--server", server.url]
    assert run("a red apple", *options, cwd=tmp_path).returncode == 0
    assert Image.open(tmp_path / "p.png").size == (64, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu"], "--device has no effect on a --server"),
        (["--threads", "2"], "--threads has no effect on a --server"),
        (["--memory", "auto"], "--memory has no effect on a --server"),
        (["--lora", "x.safetensors"], "--lora has no effect on a --server; put the file into the server's --lora-dir"),
        (["--lora-dir", "."], "--lora-dir has no effect"),
        (["--embedding", "x.pt"], "--embedding has no effect"),
        (["--refiner", "x"], "--refiner has no effect"),
        (["--save-latents", "x.npz"], "--save-latents has no effect"),
        (["--outpaint", "8,8,8,8"], "--outpaint has no effect"),
        (["--server", "ftp://a"], "'ftp://a' is not a server's address"),
        (["--server", "http://:secret@a:b"], "'a:b' is not a server's address"),
        (["-o", "o.bmp"], "give a name that ends in .png"),
        (["--steps", "0"], "num_inference_steps is 0"),
        (["--size", "66x64"], "width 66 is not a multiple of 4"),
    ],
)
def test_what_is_refused(server, tmp_path, options, message):
    before = len(states(server))
    ran = run("a cat", *FAST, "--server", server.url, *options, cwd=tmp_path)
    assert (ran.returncode, message in ran.stderr, "secret" in ran.stderr) == (2, True, False), ran.stderr
    assert len(states(server)) == before
    assert names(tmp_path) == []
