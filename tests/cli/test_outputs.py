"""Output files of the command line: names that are free, inputs that stay, pipes, and latents that survive."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sdonnx_runtime.errors import SdonnxError
from sdonnx_runtime.outputs import metadata
from sdonnx_runtime.outputs.latents_file import load_latents, save_latents
from sdonnx_runtime.storage.staging import lock_file
from support.cli import run_cli, start_cli

FAST = ["-m", "pictogram", "--size", "16x16", "--steps", "1", "--seed", "7"]

posix = pytest.mark.skipif(sys.platform == "win32", reason="these are POSIX' files")


def run(*arguments, cwd):
    return run_cli("run", *arguments, *FAST, cwd=cwd)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_simultaneous_runs_without_a_name_lose_no_image(tmp_path):
    ran = [start_cli("run", "a cat", *FAST, cwd=tmp_path, start=subprocess.Popen) for _ in range(4)]
    assert [process.wait() for process in ran] == [0] * 4
    assert names(tmp_path) == ["sdonnx-7-2.png", "sdonnx-7-3.png", "sdonnx-7-4.png", "sdonnx-7.png"]


@pytest.mark.parametrize("batch", [True, False])
def test_several_images_without_a_name(batch, tmp_path):
    (tmp_path / "lines.txt").write_text("a cat\n")
    what = ["--batch-file", "lines.txt"] if batch else ["a cat"]
    for _ in range(2):
        ran = run(*what, "--count", 2, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
    stem = "lines-0001" if batch else "sdonnx"
    images = [f"{stem}-7-2.png", f"{stem}-7.png", f"{stem}-8-2.png", f"{stem}-8.png"]
    (tmp_path / "lines.txt").unlink()
    assert names(tmp_path) == images
    assert images[2] in ran.stderr, "the names that were taken are told"


@pytest.mark.parametrize("output", ["cat.png", None])
def test_a_grid(output, tmp_path):
    more = [] if output is None else ["-o", output]
    for count in (1, 3):
        assert run("a cat", "--count", count, "--grid", *more, cwd=tmp_path).returncode == 0
    stem, first = ("cat", "cat-7.png") if output else ("sdonnx-7", "sdonnx-7-2.png")
    assert {f"{stem}-grid.png", first, f"{stem}.png"} < set(names(tmp_path)), "a single image has none"
    assert len(names(tmp_path)) == 5
    with Image.open(tmp_path / f"{stem}-grid.png") as grid, Image.open(tmp_path / first) as image:
        assert grid.size == (2 * image.width, 2 * image.height)
        assert grid.text == image.text
        assert grid.crop((0, 0, *image.size)).tobytes() == image.tobytes()


def test_a_grid_replaces_no_input(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a-grid.png")
    ran = run("a cat", "--count", 2, "--grid", "--image", "a-grid.png", "--strength", 1, "-o", "a.png", cwd=tmp_path)
    assert (ran.returncode, "a-grid.png is an input" in ran.stderr) == (2, True), ran.stderr
    assert names(tmp_path) == ["a-grid.png"]


def test_decoding_without_a_name(tmp_path):
    run("a cat", "-o", "a.png", "--save-latents", "a.npz", cwd=tmp_path)
    for _ in range(2):
        assert run_cli("decode", "a.npz", cwd=tmp_path).returncode == 0
    assert names(tmp_path) == ["a.npz", "a.png", "sdonnx-7-2.png", "sdonnx-7.png"]


@pytest.mark.parametrize(
    "output", [["-o", "cat.png"], ["-o", "./cat.png"], ["--preview", "cat.png"], ["-o", "link.png"]]
)
@posix
def test_an_input_image_is_never_replaced(output, tmp_path):
    Image.new("RGB", (16, 16), "teal").save(tmp_path / "cat.png")
    (tmp_path / "link.png").symlink_to("cat.png")
    before = (tmp_path / "cat.png").read_bytes()
    ran = run("a cat", "--image", "cat.png", "--strength", 1, *output, cwd=tmp_path)
    assert ran.returncode == 2
    assert "is an input of this command; give the output another name" in ran.stderr
    assert (tmp_path / "cat.png").read_bytes() == before


def test_a_checkpoint_is_not_replaced_by_figures(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    command = ["sensitivity", "model.safetensors", "--write", "./model.safetensors"]
    ran = run_cli(*command, cwd=tmp_path)
    assert (ran.returncode, "is an input of this command" in ran.stderr) == (2, True), ran.stderr
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


@posix
def test_an_image_through_a_pipe(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    ran = run("a cat", "-o", pipe, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    reader.join()
    assert Image.open(io.BytesIO(read[0])).format == "PNG"
    assert names(tmp_path) == ["pipe"]
    refused = run("a cat", "-o", pipe, "--count", 2, cwd=tmp_path)
    assert (refused.returncode, "takes one image, and these are 2" in refused.stderr) == (2, True)


@posix
def test_an_image_on_stdout(tmp_path):
    command = [sys.executable, "-m", "sdonnx", "run", "a cat", *FAST, "-o", "/dev/stdout"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert ran.returncode == 0, ran.stderr
    assert Image.open(io.BytesIO(ran.stdout)).format == "PNG"
    assert names(tmp_path) == []


def test_long_names(tmp_path):
    name = "x" * 246 + ".png"
    assert run("a cat", "-o", name, cwd=tmp_path).returncode == 0
    ran = run("a cat", "-o", f"longer-{name}", cwd=tmp_path)
    assert ran.returncode == 1
    assert "choose a shorter name" in ran.stderr
    assert names(tmp_path) == [name]


def test_an_image_that_cannot_be_saved_keeps_its_latents(tmp_path, monkeypatch):
    def fail(path, *_, **__):
        raise SdonnxError(f"{path} can't be written: No space left on device")

    monkeypatch.setattr(metadata, "write_file", fail)
    ran = run("a cat", "-o", "a.png", cwd=tmp_path)
    assert ran.returncode == 1
    assert "No space left on device; latents saved; resume with: sdonnx decode a.npz" in ran.stderr
    assert names(tmp_path) == ["a.npz"]
    monkeypatch.undo()
    assert run("another", "-o", "a.png", cwd=tmp_path).returncode == 0
    assert names(tmp_path) == ["a.npz", "a.png"], "the user was told of the latents"
    assert run_cli("decode", "a.npz", "-o", "b.png", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("kind", ["left over", "alive", "asked for", "another file"])
def test_latents_beside_an_image(kind, tmp_path):
    """Those of a process that was killed while it decoded are deleted once their image is there; no others are."""
    run("a cat", "-o", "made.png", "--save-latents", "made.npz", cwd=tmp_path)
    latents, request, model = load_latents(tmp_path / "made.npz")
    path = tmp_path / "a.npz"
    if kind == "another file":
        np.savez(path, latents=latents)
    else:
        save_latents(path, latents, request, model, temporary=kind != "asked for")
    with path.open("rb+") as stream:
        if kind == "alive":
            lock_file(stream)
        else:
            stream.close()
        assert run("a dog", "-o", "a.png", cwd=tmp_path).returncode == 0
    assert Path(path).exists() == (kind != "left over")
    assert names(tmp_path) == sorted({"made.npz", "made.png", "a.png", *(["a.npz"] if kind != "left over" else [])})


def test_no_provenance_leaves_out_the_xmp_packet(tmp_path):
    options = ("--steps", 1, "--size", "32x32", "--seed", 1)
    packets = []
    for option in ((), ("--no-provenance",)):
        made, decoded, latents = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "a.npz"
        assert run_cli("run", "a cat", "-o", made, "--save-latents", latents, *options, *option).returncode == 0
        assert run_cli("decode", latents, "-o", decoded, *option).returncode == 0
        for path in (made, decoded):
            with Image.open(path) as image:
                packets.append("xmp" in image.info)
    assert packets == [True, True, False, False]
