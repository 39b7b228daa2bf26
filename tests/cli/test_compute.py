"""``--compute``: what commands say of it, and write into images."""

import json

from PIL import Image
from sdonnx_runtime.execution.devices.computing import computes, resolve_compute
from support.cli import run_cli

SMALL = ("--steps", 1, "--size", "64x64", "--seed", 1)


def test_a_device_that_does_not_compute_so(package, tmp_path):
    run = run_cli("run", "a cat", "-m", package, "--device", "cpu", "--compute", "bf16", cwd=tmp_path)
    assert run.returncode == 1
    assert "device 'cpu' computes in f32, not in bf16; use --compute f32 or --device openvino" in run.stderr
    assert [*tmp_path.iterdir()] == []


def test_a_value_that_there_is_not(package):
    run = run_cli("upscale", package, "-m", package, "--compute", "half")
    assert (run.returncode, "'half' is not one of 'auto', 'f32', 'bf16', 'f16'" in run.stderr) == (2, True)


def test_info_says_what_a_device_computes_in(package):
    report = json.loads(run_cli("info", package, "--device", "cpu", "--json").stdout)
    assert report["computes_in"] == "f32 on cpu"
    alone = run_cli("info", package, "--compute", "f32")
    assert "--compute requires --device" in alone.stderr


def test_auto_takes_openvino_and_says_so_once(openvino, package, tmp_path):
    """Of two images, also those in f32; the images say in what they were computed where it is not f32."""
    used = resolve_compute("openvino")
    (tmp_path / "lines.txt").write_text("a cat\na dog\n", encoding="utf-8")
    for asked, compute in (("auto", used), ("f32", "f32")):
        batch = ("--batch-file", "lines.txt", "-o", f"{asked}.png")
        run = run_cli("run", *batch, "-m", package, *SMALL, "--threads", 1, "--compute", asked, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        (note,) = (line for line in run.stderr.splitlines() if line.startswith("computing in "))
        assert note.startswith(f"computing in {compute} on openvino (")
        assert ("; --compute f32 gives those" in note) is (compute != "f32")
        (path, _) = sorted(tmp_path.glob(f"{asked}*.png"))
        with Image.open(path) as image:
            said = json.loads(image.info["sdonnx"]).get("compute", "f32")
            assert said == compute
            assert (f", Compute: {compute}" in image.info["parameters"]) is (compute != "f32")
    info = run_cli("info", package, "--device", "openvino", "--json")
    others = [f"{each} with --compute {each}" for each in computes("openvino", "f32")[1:]]  # as its hardware can
    assert json.loads(info.stdout)["computes_in"].split("; ") == [f"{used} on openvino", *others]
