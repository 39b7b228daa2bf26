"""bench/peers.py: that it runs, what it writes, and that it notices a runtime that computes something else."""

import json
import subprocess
import sys
from pathlib import Path

import peers

SCRIPT = Path(peers.__file__)


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


def test_a_tiny_run_writes_what_it_promises(tmp_path):
    written = tmp_path / "figures.json"
    options = ["--size", "tiny", "--only", "sdonnx,sdcpp", "--repeats", 1, "--steps", 1, "--json", written]
    ran = run("--work", tmp_path / "work", *options)
    assert ran.returncode == 0, ran.stderr
    row = json.loads(written.read_text())[0]
    assert (row["runtime"], row["precision"]) == ("sdonnx", "fp32")
    promised = ("export_s", "load_s", "first_step_s", "step_s", "decode_s", "peak_rss_mb", "decode_peak_rss_mb")
    assert all(row[key] > 0 for key in promised)
    assert "sdcpp q8_0 is left out" in ran.stdout
    assert "| sdonnx | fp32 |" in ran.stdout
    assert run("--work", tmp_path / "work", "--size", "sd15").returncode == 1


def test_an_unknown_runtime_lists_the_known(tmp_path):
    ran = run("--work", tmp_path, "--only", "tensorrt")
    assert ran.returncode == 2
    assert "sdonnx, openvino, torch, optimum, sdcpp" in ran.stderr


def test_float32_runtimes_must_agree():
    found = [("a", "fp32", 1.0), ("b", "fp32", 1.0001), ("c", "fp32", 1.1), ("d", "int8", 1.2)]
    rows = [
        {"runtime": name, "precision": precision, "unet_checksum": value, "vae_decoder_checksum": 1.0}
        for name, precision, value in found
    ]
    assert peers.find_mismatches(rows) == ["c's unet output differs from a's"]
