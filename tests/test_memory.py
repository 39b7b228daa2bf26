"""Budgets of memory: what plans predict, beside what the system says, and how they are kept to and refused."""

import json
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from drawings import photograph
from families import sd1, sdxl
from sdonnx_export.export import export
from sdonnx_runtime.execution.process_memory import available_memory, cgroup_memory
from sdonnx_runtime.graphs import shape_inference as shapes
from sdonnx_runtime.memory.budget import Budget
from test_control import controlnet

import sdonnx

ASKED = {"width": 64, "height": 96, "num_inference_steps": 4, "guidance_scale": 5.0, "seed": 3}
PICTOGRAM = Path(__file__).parents[1] / "models" / "pictogram" / "checkpoint"

WORKER = """
import json, sys
import sdonnx
from sdonnx_runtime.execution.process_memory import (peak_memory, resident_memory)
asked = dict(width=int(sys.argv[3]), height=int(sys.argv[3]), num_inference_steps=2, seed=1)
with sdonnx.load(sys.argv[1], memory=sys.argv[2]) as pipe:
    plan = pipe.plan("a cat", whole=True, **asked)
    pipe.generate("a cat", **asked)
print(json.dumps({"predicted": plan.peak, "least": plan.least, "peak": peak_memory(), "after": resident_memory()}))
"""


def worked(memory, side=512, enter="", package="pictogram"):
    """What a picture took in a process of its own, in which ``enter`` is run first."""
    command = [sys.executable, "-c", enter + WORKER, str(package), str(memory), str(side)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak can't be told from those before it")


@on_linux
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_prediction_is_within_10_percent_of_what_the_system_says(precision, tmp_path):
    package = "pictogram"
    if precision == "int8":
        package = export(str(PICTOGRAM), tmp_path / "int8", precision="int8", calibration="fast")
    found = {memory: json.loads(worked(memory, package=package).stdout) for memory in ("2GB", "min")}
    middle = (found["2GB"]["predicted"] + found["min"]["predicted"]) // 2
    found["middle"] = json.loads(worked(f"{middle}B", package=package).stdout)
    for each in found.values():
        assert each["predicted"] == pytest.approx(each["peak"], rel=0.1), found
        assert each["after"] < found["min"]["peak"] * 0.7, found  # the arena is handed back
    assert found["min"]["peak"] < found["middle"]["peak"] * 0.9 < found["2GB"]["peak"] * 0.8, found


@on_linux
def test_pictures_leave_nothing_behind():
    worker = """
import sdonnx
from sdonnx_runtime.execution.process_memory import (resident_memory)
with sdonnx.load("pictogram") as pipe:
    for seed in range(45):
        pipe.generate("a cat", num_inference_steps=2, seed=seed)
        if seed in (2, 44):
            print(resident_memory())
"""
    said = subprocess.run(
        [sys.executable, "-c", worker], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    third, last = map(int, said.split())
    assert last < 1.02 * third


@contextmanager
def control_group(limit):
    """A group of so many bytes; gives what a process runs to be in it."""
    first, *_ = [line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for root, name in (
        (Path("/sys/fs/cgroup"), "memory.max"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    ):
        folder = root / "sdonnx-test"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if not (folder / name).exists():  # a folder and no group
                continue
            (folder / name).write_text(str(limit))
            yield f"from pathlib import Path; import os; Path('{folder}/cgroup.procs').write_text(str(os.getpid()))\n"
            return
        except OSError:
            continue
        finally:
            folder.rmdir()
    pytest.skip(f"no control group of memory can be made here (this process is in {first})")


@on_linux
def test_a_control_group_is_kept_to():
    alone = json.loads(worked("min").stdout)
    with control_group(alone["least"] * 11 // 10) as enter:
        assert json.loads(worked(f"{alone['least'] + (5 << 20)}B", enter=enter).stdout)["peak"] < alone["least"] * 1.1
    with control_group(alone["least"] * 6 // 10) as enter:
        refused = worked("auto", enter=enter)
    assert refused.returncode == 1
    assert re.search(r"DeviceError: \d+ MB of memory are there, and this takes \d+ MB at least", refused.stderr)


@pytest.mark.parametrize(
    ("membership", "files", "left"),
    [
        ("0::/app/x", {"app/memory.max": "500", "app/memory.current": "200", "app/x/memory.max": "max"}, [300]),
        (
            "0::/app",
            {"app/memory.max": "500", "app/memory.current": "200", "app/memory.stat": "anon 90\ninactive_file 50\n"},
            [350],
        ),
        (
            "1:cpu:/a\n4:memory:/a/b",
            {"memory/a/memory.limit_in_bytes": "900", "memory/a/memory.usage_in_bytes": "1"},
            [899],
        ),
        (
            "4:memory:/gone",
            {"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "1"},
            [],
        ),
    ],
)
def test_limits_of_control_groups(membership, files, left, tmp_path):
    """As the kernel's documentation has them, cgroup-v1/memory.rst and cgroup-v2.rst."""
    for name, text in {**files, "membership": membership}.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    assert cgroup_memory(tmp_path / "root" / "membership", tmp_path / "root") == left


def test_what_is_free_is_some_of_what_there_is():
    free = available_memory()
    assert free is not None
    assert free > 1 << 26
    if sys.platform == "linux":
        total = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
        assert free < total


def test_too_little_is_refused_and_what_would_do_is_named():
    with pytest.raises(sdonnx.RequestError, match="20MB of memory is too little for this; give ") as refusal:
        sdonnx.load("pictogram", memory="20MB").generate("a cat", seed=1)
    least = int(re.search(r"give (\d+)MB", str(refusal.value))[1])
    pipe = sdonnx.load("pictogram", memory=f"{least + 20}MB")  # what this process has may have grown since
    assert pipe.plan("a cat").peak <= (least + 20) * 10**6
    with pytest.raises(sdonnx.RequestError, match="too little"):
        sdonnx.load("pictogram", memory="20MB").decode(np.zeros((1, 4, 8, 8), np.float32))


@pytest.mark.parametrize(
    ("asked", "size"), [("600MB", 6e8), ("2GiB", 2**31), ("1.5g", 1.5e9), ("700 kB", 7e5), (800, 800)]
)
def test_sizes(asked, size):
    assert Budget(asked).bytes_of_device() == size


@pytest.mark.parametrize("asked", ["", "much", "-1GB", "0MB", "6X", "1e9", 0, -5, "1GBit"])
def test_what_is_no_size(asked):
    with pytest.raises(sdonnx.RequestError, match="give a size such as 600MB or 2GB, or auto, max or min"):
        sdonnx.load("pictogram", memory=asked)


def test_what_is_not_known_can_only_be_run_whole_or_as_small_as_can_be(monkeypatch):
    monkeypatch.delitem(shapes._RULES, "Conv")
    for memory in ("auto", "max", "min"):
        sdonnx.load("pictogram", memory=memory).generate("a cat", seed=1, width=72, height=72, num_inference_steps=1)
    with pytest.raises(sdonnx.RequestError, match="can't be told, for its graphs are of another program"):
        sdonnx.load("pictogram", memory="1GB").generate("a cat", seed=1, width=104)


def test_everything_that_is_asked_for_is_in_the_plan(tmp_path):
    """With a net, a second pass, a picture to start from and reuse."""

    def made(family):
        family().save_pretrained(tmp_path / family.__name__)
        return export(str(tmp_path / family.__name__), tmp_path / f"{family.__name__}-onnx")

    controlnet(sd1().unet).save_pretrained(tmp_path / "net")
    package = export(str(tmp_path / "net"), tmp_path / "package")
    pipe = sdonnx.load(made(sd1), controls=[package], memory="min")
    asked = {"image": photograph(), "strength": 0.5, "reuse": 2, "hires_scale": 2, "hires_upscaler": "lanczos"}
    plan = pipe.plan("a cat AND a dog", controls=(sdonnx.Control(image=photograph()),), **{**ASKED, **asked})
    assert {choice.component for choice in plan.choices} == {
        "text_encoder", "control.0/controlnet", "unet", "vae_encoder", "vae_decoder",
    }  # fmt: skip
    xl = sdonnx.load(made(sdxl), memory="min").plan("a cat", **ASKED)
    assert [choice.component for choice in xl.choices] == ["text_encoder", "text_encoder_2", "unet", "vae_decoder"]
    alone, shown = (
        sdonnx.load("pictogram", preview_vae=vae, memory="min").plan("a cat", width=256, height=256).choices
        for vae in (None, "pictogram")
    )
    assert all(more.peak > less.peak + 10**7 for less, more in zip(alone, shown, strict=True))
