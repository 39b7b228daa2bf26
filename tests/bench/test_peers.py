"""bench/peers.py: that it runs, what it writes, and that it notices a runtime that computes something else."""

import json
import subprocess
import sys
from pathlib import Path

import openvino_models
import peers
import runtimes
from openvino_runtimes import OpenVinoInt8, OpenVinoInt8Default

SCRIPT = Path(peers.__file__)


def run(*arguments, script=SCRIPT):
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True)


def test_a_tiny_run_writes_what_it_promises(tmp_path):
    written = tmp_path / "figures.json"
    options = ["--size", "tiny", "--only", "sdonnx,sdcpp", "--repeats", 1, "--steps", 1, "--json", written]
    ran = run("--work", tmp_path / "work", *options)
    assert ran.returncode == 0, ran.stderr
    row = json.loads(written.read_text())[0]
    assert (row["runtime"], row["precision"]) == ("sdonnx", "fp32")
    promised = ("export_s", "load_s", "first_step_s", "step_s", "decode_s", "peak_rss_mb", "decode_peak_rss_mb")
    assert all(row[key] > 0 for key in promised)
    assert "sdcpp q8_0 (f32) is left out" in ran.stdout
    assert "| sdonnx | fp32 | f32 |" in ran.stdout
    assert run("--work", tmp_path / "work", "--size", "sd15").returncode == 1
    compared, options = ("sdonnx:fp32:f32", "sdonnx:int8:f32"), ["--size", "tiny", "--turns", 2, "--json", written]
    turns = run("--work", tmp_path / "work", *options, *compared, script=SCRIPT.with_name("turns.py"))
    assert turns.returncode == 0, turns.stderr
    assert [each.split(" | ")[0] for each in turns.stdout.splitlines()[2:]] == [f"| {each}" for each in compared]
    assert [(key, len(seconds)) for key, seconds in json.loads(written.read_text()).items()] == [
        (key, 2) for key in compared
    ]


def test_an_unknown_runtime_lists_the_known(tmp_path):
    assert (
        "give some of sdonnx:fp32:f32, "
        in run("--work", tmp_path, "tensorrt", script=SCRIPT.with_name("turns.py")).stderr
    )
    ran = run("--work", tmp_path, "--only", "tensorrt")
    assert ran.returncode == 2
    assert "sdonnx, openvino, torch, optimum, sdcpp, sdonnx-openvino, openvino-genai" in ran.stderr


def test_images_of_one_step_are_timed_with_the_pipeline_open_and_from_the_start_of_a_process(tmp_path):
    written = tmp_path / "figures.json"
    options = ["--size", "tiny-turbo", "--only", "sdonnx,optimum", "--repeats", 1, "--steps", 1, "--json", written]
    ran = run("--work", tmp_path, *options)
    assert ran.returncode == 0, ran.stderr
    row = json.loads(written.read_text())[0]
    assert all(row[name] > 0 for name in ("cold_s", "first_image_s", "image_s"))
    assert "step_s" not in row
    assert "optimum fp32 (f32) is left out: it is not measured with models of few steps" in ran.stdout
    manifest = json.loads((tmp_path / "sdonnx-fp32" / "vae_decoder" / "config.json").read_text())
    assert manifest["_class_name"] == "AutoencoderTiny"


def test_runtimes_that_share_their_files_are_measured_apart(tmp_path):
    all_of_them = [kind(tmp_path, "tiny") for kind in runtimes.RUNTIMES]
    rows = [(each.name, each.precision, each.compute) for each in all_of_them]
    assert len(set(rows)) == len(rows)
    held, default = (kind(tmp_path, "tiny") for kind in (OpenVinoInt8, OpenVinoInt8Default))
    assert held.folder == default.folder
    assert set(openvino_models.OPTIONS[held.compute]) - set(openvino_models.OPTIONS[default.compute]) == {
        "INFERENCE_PRECISION_HINT"
    }


def test_float32_runtimes_must_agree():
    found = [("a", "fp32", "f32", 1.0), ("b", "fp32", "f32", 1.0001), ("c", "fp32", "f32", 1.1)]
    found += [("d", "int8", "f32", 1.2), ("e", "fp32", "default", 1.2)]
    rows = [
        {"runtime": name, "precision": stored, "compute": computed, "unet_checksum": value, "vae_decoder_checksum": 1.0}
        for name, stored, computed, value in found
    ]
    assert peers.find_mismatches(rows) == ["c's unet output differs from a's"]
