"""``sdonnx upscale``, and what other commands say of an upscaler."""

import json

import pytest
from PIL import Image
from safetensors.torch import save_file
from sdonnx_runtime import upscaling
from sdonnx_runtime.execution.devices.computing import resolve_compute
from support.cli import run_cli
from support.images import photograph
from support.upscalers import random_upscaler


@pytest.fixture(scope="module")
def package(export_once, tmp_path_factory):
    folder = tmp_path_factory.mktemp("upscaler")
    save_file(random_upscaler("Compact").state_dict(), folder / "compact.safetensors")
    return export_once(folder / "compact.safetensors", folder / "compact-onnx")


@pytest.fixture
def folder(tmp_path):
    """A directory with two images."""
    for name in ("a.png", "b.jpg"):
        photograph(20, 12).save(tmp_path / name)
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_parameters_of_an_image_stay(package, folder):
    made = run_cli("run", "a cat", "-m", "pictogram", "--size", "16x16", "--steps", 1, "-o", "cat.png", cwd=folder)
    assert made.returncode == 0, made.stderr
    ran = run_cli("upscale", "cat.png", "-m", package, "-o", "large.png", "--memory", "3GB", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    assert "peak" in ran.stderr
    with Image.open(folder / "cat.png") as small, Image.open(folder / "large.png") as large:
        assert large.size == (4 * small.width, 4 * small.height)
        assert {key: large.text[key] for key in small.text} == small.text
        assert large.text["postprocessing"] == ("Postprocess upscale by: 4, Postprocess upscaler: compact.safetensors")


def test_what_it_was_computed_in_is_written_where_it_is_not_f32(package, folder, openvino):
    used = resolve_compute("openvino")
    ran = run_cli("upscale", "a.png", "-m", package, "-o", "large.png", "--threads", 1, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    said = "Postprocess upscale by: 4, Postprocess upscaler: compact.safetensors"
    with Image.open(folder / "large.png") as large:
        assert large.text["postprocessing"] == said + ("" if used == "f32" else f", Postprocess compute: {used}")


def test_several_images(package, folder):
    ran = run_cli("upscale", "a.png", "b.jpg", "-m", package, "--scale", "1.5", "--json", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    found = [(image["path"], image["source"], image["width"], image["height"]) for image in report["images"]]
    assert found == [("a-1.5x.png", "a.png", 30, 18), ("b-1.5x.png", "b.jpg", 30, 18)]
    assert (report["model"], report["scale"]) == ("compact.safetensors", 1.5)
    assert run_cli("upscale", "a.png", "b.jpg", "-m", package, "-o", "c.png", cwd=folder).returncode == 0
    assert run_cli("upscale", "a.png", "-m", package, "--scale", "1.5", cwd=folder).returncode == 0
    made = ["a-1.5x-2.png", "a-1.5x.png", "b-1.5x.png", "c-a.png", "c-b.png"]
    assert names(folder) == sorted([*made, "a.png", "b.jpg"])


REFUSED = {
    "no image": (["c.png"], 2, "c.png does not exist; give the file of an image"),
    "no image at all": (["text.png"], 2, "text.png can't be read: it is not an image, or damaged"),
    "over itself": (["a.png", "-o", "a.png"], 2, "a.png is an input of this command"),
    "another format": (["a.png", "-o", "a.webp"], 2, "give a name that ends in .png"),
    "two of a name": (["a.png", "more/a.png", "-o", "c.png"], 2, "two of the images would be saved as c-a.png"),
    "a scale": (["a.png", "--scale", "99"], 2, "scale is 99.0; give a number above 0, 16 at most"),
    "memory": (["a.png", "--memory", "lots"], 2, "memory is 'lots'"),
    "a device": (["a.png", "--threads", "9999"], 2, "threads is 9999"),
    "no folder": (["a.png", "-o", "no/a.png"], 1, "make its directory first"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line(case, package, folder):
    arguments, code, message = REFUSED[case]
    (folder / "text.png").write_text("no image")
    (folder / "more").mkdir()
    photograph(8, 8).save(folder / "more" / "a.png")
    before = names(folder)
    ran = run_cli("upscale", *arguments, "-m", package, cwd=folder)
    assert (ran.returncode, ran.stderr.count("\n")) == (code, 1), ran.stderr
    assert message in ran.stderr
    assert names(folder) == before


def test_a_stopped_upscale_leaves_nothing(package, folder, monkeypatch):
    def interrupt(_values):
        raise KeyboardInterrupt

    monkeypatch.setattr(upscaling, "_to_bytes", interrupt)
    assert run_cli("upscale", "a.png", "-m", package, "-o", "c.png", cwd=folder).returncode != 0
    assert names(folder) == ["a.png", "b.jpg"]


def test_other_commands(package, folder):
    ran = run_cli("run", "a cat", "-m", package, cwd=folder)
    assert ran.returncode == 1
    assert "is an upscaler; it enlarges images: sdonnx upscale IMAGE -m PACKAGE" in ran.stderr
    assert "sdonnx upscale" in run_cli("bench", package).stderr
    assert "sdonnx upscale" in run_cli("tokens", "a cat", "-m", package).stderr
    described = run_cli("info", package).stdout
    assert "4x (SRVGGNetCompact); use it with sdonnx upscale" in described
    assert "latents" not in described
    ran = run_cli("upscale", "a.png", "-m", "pictogram", cwd=folder)
    assert "is Stable Diffusion 1, not an upscaler" in ran.stderr


def test_a_plan(package):
    planned = json.loads(run_cli("plan", package, "--size", "700x500", "--memory", "2GB", "--json").stdout)
    (component,) = planned["components"]
    assert (component["component"], component["strategy"]) == ("upscaler", "tiles 512")
    assert "512x512 on cpu: peak" in run_cli("plan", package).stdout
    ran = run_cli("plan", package, "--guidance", "3")
    assert (ran.returncode, "it has --size alone" in ran.stderr) == (2, True)
