"""Budgets of memory: predictions against the system's measurements; how budgets are held and refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
from sdonnx_export.export import export
from sdonnx_runtime.execution.process_memory import available_memory
from sdonnx_runtime.graphs import shape_inference as shapes
from sdonnx_runtime.memory.budget import Budget
from support.controls import controlnet
from support.families import sd1, sdxl
from support.images import photograph
from support.paths import ROOT

import sdonnx

ASKED = {"width": 64, "height": 96, "num_inference_steps": 4, "guidance_scale": 5.0, "seed": 3}
PICTOGRAM = ROOT / "models" / "pictogram" / "checkpoint"

WORKER = """
import json, sys
import sdonnx
from sdonnx_runtime.execution.process_memory import (peak_memory, resident_memory)
asked = dict(width=int(sys.argv[3]), height=int(sys.argv[3]), num_inference_steps=2, seed=1)
asked["tiling"] = sys.argv[4] or None
with sdonnx.load(sys.argv[1], memory=sys.argv[2]) as pipe:
    plan = pipe.plan("a cat", always=True, **asked)
    pipe.generate("a cat", **asked)
least, peak = plan.minimum_budget, peak_memory()
print(json.dumps({"predicted": plan.peak, "least": least, "peak": peak, "after": resident_memory()}))
"""


def worked(memory, side=512, enter="", package="pictogram", tiling=""):
    """What an image took in a process of its own, in which ``enter`` is run first."""
    command = [sys.executable, "-c", enter + WORKER, str(package), str(memory), str(side), tiling]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process has no peak of its own")


def up_to_three_times(measurement):
    """Repeat a measurement that fails, since other processes disturb it: the test fails after three misses.

    The comparisons themselves keep their tolerances, such as the 10 % between a predicted and a measured peak.
    """

    @wraps(measurement)
    def run(*arguments, **fixtures):
        for _ in range(2):
            with suppress(AssertionError):
                return measurement(*arguments, **fixtures)
        return measurement(*arguments, **fixtures)

    return run


@on_linux
@pytest.mark.parametrize("precision", ["fp16", "int8"])
@up_to_three_times
def test_a_predicted_peak_is_within_10_percent_of_the_measured_one(precision, export_once, tmp_path_factory):
    package = "pictogram"
    if precision == "int8":
        output = tmp_path_factory.mktemp("int8") / "package"
        package = export_once(PICTOGRAM, output, precision="int8", calibration="fast")
    found = {memory: json.loads(worked(memory, package=package).stdout) for memory in ("2GB", "min")}
    if precision == "fp16":
        middle = (found["2GB"]["predicted"] + found["min"]["predicted"]) // 2
        found["middle"] = json.loads(worked(f"{middle}B", package=package).stdout)
        assert found["min"]["peak"] < found["middle"]["peak"] * 0.9 < found["2GB"]["peak"] * 0.8, found
    for each in found.values():
        assert each["predicted"] == pytest.approx(each["peak"], rel=0.1), found
        assert each["after"] < found["min"]["peak"] * 0.7, found  # the arena is handed back
    assert found["min"]["peak"] < found["2GB"]["peak"] * 0.8, found


@on_linux
@up_to_three_times
def test_a_predicted_peak_of_an_image_that_tiles():
    """Of a VAE that runs whole: padded buffers leave more of the arena unused."""
    found = json.loads(worked("2GB", side=384, tiling="xy").stdout)
    assert found["predicted"] == pytest.approx(found["peak"], rel=0.1), found


FIRST = """
import sdonnx
from sdonnx_runtime.execution.arena import PROCESS_MEMORY
from sdonnx_runtime.execution.strategy import ExecutionPlan
PROCESS_MEMORY.configure(ExecutionPlan(arena_region={region}))
with sdonnx.load("pictogram") as first:
    PROCESS_MEMORY.share_arena()
    first.generate("a dog", width=64, height=64, num_inference_steps=1, seed=1)
"""


@on_linux
@pytest.mark.parametrize("region", [1 << 24, 2 << 30])
def test_two_budgets_in_one_process(region):
    """The first pipeline's arena stays; the second one's plan is made for it."""
    found = json.loads(worked("450MB", enter=FIRST.format(region=region)).stdout)
    assert found["predicted"] == pytest.approx(found["peak"], rel=0.1), found
    assert found["peak"] < min(1.01 * found["predicted"], 450e6), found


@on_linux
def test_an_arena_of_another_region_size_is_not_used():
    worker = """
from sdonnx_runtime.execution.arena import PROCESS_MEMORY
from sdonnx_runtime.execution.strategy import ExecutionPlan
assert PROCESS_MEMORY.arena_region is None
plans = [ExecutionPlan(arena_region=1 << power) for power in (27, 28)]
assert all(PROCESS_MEMORY.configure(plan) for plan in plans)  # there is no arena yet
assert PROCESS_MEMORY.share_arena()
assert PROCESS_MEMORY.arena_region == 1 << 28
assert [PROCESS_MEMORY.configure(plan) for plan in plans] == [False, True]
assert PROCESS_MEMORY.configure(ExecutionPlan())  # nothing was predicted for it
"""
    done = subprocess.run([sys.executable, "-c", worker], capture_output=True, text=True, timeout=60, check=True)
    assert "regions of 268 MB, the plan was made for 134 MB" in done.stderr


@on_linux
@up_to_three_times
def test_images_leave_nothing_behind():
    worker = """
import sdonnx
from sdonnx_runtime.execution.process_memory import (resident_memory)
with sdonnx.load("pictogram") as pipe:
    for seed in range(45):
        pipe.generate("a cat", num_inference_steps=2, seed=seed)
        if seed in (2, 44):
            print(resident_memory())
"""
    printed = subprocess.run(
        [sys.executable, "-c", worker], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    third, last = map(int, printed.split())
    assert last < 1.02 * third


AGAIN = """
import sys
import sdonnx
from sdonnx_runtime.execution.process_memory import peak_memory
asked = dict(width=64, height=64, num_inference_steps=1, seed=1)
with sdonnx.load("pictogram", device="cpu", memory="min") as pipe:
    least = pipe.plan("a cat", **asked).minimum_budget
with sdonnx.load("pictogram", device="cpu", memory=least + 1_000_000, keep_loaded=bool(int(sys.argv[1]))) as pipe:
    for _ in range(4):
        pipe.generate("a cat", **asked)
        print(least, peak_memory())
"""


@on_linux
@pytest.mark.parametrize("keep_loaded", [0, 1])
def test_memory_that_is_enough_for_an_image_is_enough_for_the_next(keep_loaded):
    """What is reserved for the process is not reserved again once it is resident."""
    command = [sys.executable, "-c", AGAIN, str(keep_loaded)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    made = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(made) == 4
    least, peak = made[-1]
    assert peak == pytest.approx(least, rel=0.1)


TOUCH_CODE = """
import ctypes, re
from pathlib import Path
import sdonnx
from sdonnx_runtime.execution.process_memory import resident_memory
with sdonnx.load("pictogram", memory="min") as pipe:
    before = pipe.plan("a cat").minimum_budget, resident_memory()
    for first, last in re.findall("^(.*?)-(.*?) r-xp .*\\.so", Path("/proc/self/maps").read_text(), re.MULTILINE):
        (ctypes.c_char * (int(last, 16) - int(first, 16))).from_address(int(first, 16))[::4096]
    touched = resident_memory()
    after = pipe.plan("a cat").minimum_budget, resident_memory()
    pipe.generate("a cat", num_inference_steps=1, seed=1)
print(*before, touched, *after)
"""


@on_linux
def test_a_plan_is_the_same_however_much_of_the_libraries_code_is_resident():
    """Which is up to the system: it maps as much around a page as its cache has in one piece."""
    done = subprocess.run([sys.executable, "-c", TOUCH_CODE], capture_output=True, text=True, timeout=60, check=True)
    least, before, touched, least_after, after = map(int, done.stdout.split())
    assert touched > before + 30e6
    assert after < before + 3e6
    assert abs(least_after - least) < 3e6


@contextmanager
def control_group(limit):
    """A group of so many bytes; gives what a process runs to be in it."""
    first, *_ = [line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for root, name in (
        (Path("/sys/fs/cgroup"), "memory.max"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    ):
        folder = root / f"sdonnx-test-{os.getpid()}"
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
@up_to_three_times
def test_the_limit_of_a_control_group_is_held():
    alone = json.loads(worked("min", 256).stdout)
    with control_group(alone["least"] * 11 // 10) as enter:
        held = json.loads(worked(f"{alone['least'] + (5 << 20)}B", 256, enter).stdout)
        refused = worked("auto", 512, enter)
    assert held["peak"] < alone["least"] * 1.1
    assert refused.returncode == 1
    assert re.search(r"DeviceError: this needs at least \d+ MB of memory; \d+ MB are available", refused.stderr)


def test_free_memory_is_less_than_all_memory():
    free = available_memory()
    assert free is not None
    assert free > 1 << 26
    if sys.platform == "linux":
        total = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
        assert free < total


def test_too_small_a_limit_is_refused_with_the_least_that_works():
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
    assert Budget(asked).device_limit == size


@pytest.mark.parametrize(
    "asked",
    [
        "",
        "much",
        "-1GB",
        "0MB",
        "6X",
        "1e9",
        0,
        -5,
        "1GBit",
        "1e99GB",
        "9" * 400 + "GB",
        "0.1B",
        "٣GB",
        True,
        10**20,
        float("inf"),
        None,
    ],
)
def test_an_invalid_memory_size_is_refused(asked):
    with pytest.raises(sdonnx.RequestError, match="give a size such as 600MB or 2GB, or auto, max or min"):
        sdonnx.load("pictogram", memory=asked)


def test_a_graph_with_an_unknown_operator_runs_without_a_limit_or_with_the_least_memory(monkeypatch):
    monkeypatch.delitem(shapes._RULES, "Conv")
    for memory in ("auto", "max", "min"):
        sdonnx.load("pictogram", memory=memory).generate("a cat", seed=1, width=72, height=72, num_inference_steps=1)
    with pytest.raises(sdonnx.RequestError, match="cannot estimate the memory of .*not exported by sdonnx"):
        sdonnx.load("pictogram", memory="1GB").generate("a cat", seed=1, width=104)


def test_a_graph_that_changes_is_read_again(package, tmp_path):
    copy = shutil.copytree(package, tmp_path / "copy")
    pipe = sdonnx.load(copy, memory="min")
    assert pipe.plan("a cat", **ASKED).peak == pytest.approx(pipe.plan("a cat", **ASKED).peak, rel=0.01)
    graph = copy / "unet" / "model.onnx"
    graph.write_bytes(b"\0" * graph.stat().st_size)
    with pytest.raises(sdonnx.PackageError, match="unet.model.onnx starts with zeros"):
        pipe.plan("a cat", **ASKED)


def test_the_plan_covers_controls_hires_img2img_and_step_caching(export_once, tmp_path):
    """With a net, a second pass, an image to start from and reuse."""

    def made(family):
        family().save_pretrained(tmp_path / family.__name__)
        return export_once(tmp_path / family.__name__, tmp_path / f"{family.__name__}-onnx")

    controlnet(sd1().unet).save_pretrained(tmp_path / "net")
    package = export(str(tmp_path / "net"), tmp_path / "package")
    pipe = sdonnx.load(made(sd1), controls=[package], memory="min")
    asked = {"image": photograph(), "strength": 0.5, "cache_interval": 2, "hires_scale": 2, "hires_upscaler": "lanczos"}
    plan = pipe.plan("a cat AND a dog", controls=(sdonnx.Control(image=photograph()),), **{**ASKED, **asked})
    assert {planned.component for planned in plan.components} == {
        "text_encoder", "control.0/controlnet", "unet", "vae_encoder", "vae_decoder",
    }  # fmt: skip
    xl = sdonnx.load(made(sdxl), memory="min").plan("a cat", **ASKED)
    assert [planned.component for planned in xl.components] == ["text_encoder", "text_encoder_2", "unet", "vae_decoder"]
    alone, shown = (
        sdonnx.load("pictogram", preview_vae=vae, memory="min").plan("a cat", width=256, height=256).components
        for vae in (None, "pictogram")
    )
    assert all(more.peak > less.peak + 10**7 for less, more in zip(alone, shown, strict=True))
