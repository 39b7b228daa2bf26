"""bench/gpu.py on the CPU: sdonnx and diffusers agree there, what is wrong is told, a failure is alone."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import gpu
import gpu_steps
import pytest
from torch import nn

LAYERS = ("conv 3x3 320 to 4", "conv 3x3 stride 2, padding 0", "resize by 2 and conv", "group norm 160 with SiLU",
          "self-attention, heads of 40", "GEGLU feed-forward 256", "CLIP layer 768, causal")  # fmt: skip


@pytest.fixture
def setting(tmp_path):
    sizes = {**gpu.SIZES["tiny"], "side": 4}
    return gpu_steps.Setting(device="cpu", target="generic", precision="fp16", work=tmp_path, **sizes)


@pytest.fixture
def pieces(setting):
    return {piece.name: piece for piece in gpu_steps._pieces(setting)}


def test_layers_compute_what_torch_does(setting, pieces, monkeypatch):
    monkeypatch.setattr(gpu_steps, "_pieces", lambda _setting: [pieces[name] for name in LAYERS])
    rows = list(gpu_steps.compare_layers(setting))
    assert [row["what"] for row in rows] == list(LAYERS)
    assert all(row["ok"] and row["error"] < 1e-5 for row in rows), rows


def test_a_wrong_layer_and_one_that_fails_are_told(setting, pieces, monkeypatch):
    norm, other = pieces["group norm 160 with SiLU"], pieces["layer norm 320"]
    wrong = replace(norm, theirs=lambda: nn.GroupNorm(32, 160))  # without SiLU
    broken = replace(norm, name="broken", ours=other.ours)
    monkeypatch.setattr(gpu_steps, "_pieces", lambda _setting: [wrong, broken, other])
    lines = [gpu.format_row(row) for row in gpu_steps.compare_layers(setting)]
    assert lines[0].endswith("WRONG")
    assert lines[1].startswith("FAILED: ")
    assert lines[2].startswith("error ")
    assert "WRONG" not in lines[2]


@pytest.mark.parametrize("model, component", [("sd", "vae_decoder"), ("sdxl", "unet")])
def test_models_compute_what_diffusers_does(setting, model, component):
    (expected,) = gpu_steps.run_torch(setting, model=model, component=component, reference=True)
    assert "error" not in expected
    (found,) = gpu_steps.run_graph(setting, model=model, component=component)
    assert found["error"] < 1e-5
    assert found["ms"] > 0


def test_a_run_writes_each_result(tmp_path):
    written = tmp_path / "gpu.json"
    command = [sys.executable, gpu.__file__, "--device", "cpu", "--size", "tiny", "--only", "nodes", "--json", written]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "nodes: left out: the CPU is the device" in ran.stdout
    (row,) = json.loads(written.read_text())["results"]
    assert (row["group"], row["left_out"]) == ("nodes", "the CPU is the device")


def test_a_crash_and_the_deadline_end_a_step_alone():
    crash = gpu.Step(group="unet", name="", run=os._exit)
    assert list(gpu.run_step(crash, 3, time.monotonic() + 60)) == [{"failed": "its process ended with exit code 3"}]
    assert list(gpu.run_step(crash, 3, time.monotonic())) == [{"left_out": "the time was over"}]


def test_times_are_compared_once_both_are_known(setting, capsys):
    report = gpu.Report(setting, None)
    figures = {"fastest_ms": 1.0, "vram_mb": None}
    report.add(gpu.Step(group="unet", name="diffusers eager", run=print), {"ms": 20.0, **figures})
    assert "/ diffusers" not in capsys.readouterr().out
    report.add(gpu.Step(group="unet", name="sdonnx generic", run=print), {"ms": 15.0, **figures})
    assert "unet: sdonnx generic / diffusers eager: time 0.75 (aim 0.85)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option, message", [("--device=tpu", "there is no device 'tpu'"), ("--only=nothing", "give some of device")]
)
def test_wrong_options_are_refused(option, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device=cpu", option])
    with pytest.raises(SystemExit):
        gpu.main()
    assert message in capsys.readouterr().err
