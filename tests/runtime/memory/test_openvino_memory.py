"""Budgets of memory on OpenVINO: predictions against the system's measurements; how budgets are held and refused."""

import json
import re
import subprocess
import sys

import pytest
from diffusers import UNet2DConditionModel
from sdonnx_export.models.components import build
from sdonnx_export.operators.int8 import Int8Operators
from sdonnx_runtime.graphs.shape_inference import TensorInfo
from sdonnx_runtime.memory import budget
from sdonnx_runtime.memory.budget import Budget
from sdonnx_runtime.memory.estimates import Graph
from sdonnx_runtime.memory.openvino import Compilation
from sdonnx_runtime.memory.planner import LoadedComponent
from support.cli import run_cli
from support.graphs import UNET, part_of, saved

import sdonnx

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process has no peak of its own")


WORKER = """
import json, sys
import sdonnx

from sdonnx_runtime.execution.process_memory import peak_memory
compute, memory, side, bounds = json.loads(sys.argv[1])
asked = dict(num_inference_steps=2, seed=1, width=side, height=side, guidance_steps=bounds and tuple(bounds))
with sdonnx.load("pictogram", device="openvino", compute=compute, memory=memory) as pipe:
    plan = pipe.plan("a cat", always=True, **asked)
    pipe.generate("a cat", **asked)
how = {each.component: [each.strategy.one_size, each.strategy.tile] for each in plan.components}
print(json.dumps({"predicted": plan.peak, "least": plan.minimum_budget, "peak": peak_memory(), "how": how}))
"""


@pytest.fixture
def measured(openvino, monkeypatch, tmp_path):
    """What an image takes in a process of its own, which compiles all graphs."""

    def measure(compute="f32", memory="2GB", side=128, guidance_steps=None):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(memory)))
        command = [sys.executable, "-c", WORKER, json.dumps((compute, memory, side, guidance_steps))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return measure


@pytest.mark.parametrize(("compute", "side"), [("auto", 128), ("f32", 256)])
def test_a_predicted_peak_is_within_15_percent_of_the_measured_one(compute, side, measured):
    found = measured(compute, side=side)
    assert found["predicted"] == pytest.approx(found["peak"], rel=0.15), found


def test_a_session_for_each_of_two_sizes_where_there_is_room(measured):
    """Guidance on the first of two steps alone: the U-Net runs with two batch entries, then with one."""
    both = measured(guidance_steps=(0, 0.5))
    one = measured(memory=both["predicted"] - 10**7, guidance_steps=(0, 0.5))
    assert [each["how"]["unet"][0] for each in (both, one)] == [False, True]
    for found in (both, one):
        assert found["predicted"] == pytest.approx(found["peak"], rel=0.15), found
    assert one["peak"] < both["peak"] * 0.85


def test_too_small_a_limit_is_refused_with_what_the_cpu_takes(openvino, monkeypatch):
    with (
        sdonnx.load("pictogram", memory="20MB", device="openvino") as pipe,
        pytest.raises(sdonnx.RequestError, match="20MB of memory is too little for this on openvino; give ") as refused,
    ):
        pipe.generate("a cat", seed=1)
    with pytest.raises(sdonnx.RequestError, match="give ") as refused_by_cpu:
        sdonnx.load("pictogram", memory="20MB", device="cpu").plan("a cat")
    least, on_cpu = map(
        int, re.search(r"give (\d+)MB.*--device cpu, which can do it in (\d+)MB$", str(refused.value)).groups()
    )
    assert on_cpu == pytest.approx(int(re.search(r"give (\d+)MB", str(refused_by_cpu.value))[1]), abs=10)
    assert least > on_cpu + 50
    monkeypatch.setattr(budget, "available_memory", lambda: 10**7)
    expected = (
        r"at least \d+ MB of memory on openvino; .* try it with --memory \d+MB, or use --device cpu, which can do it in"
    )
    with pytest.raises(sdonnx.DeviceError, match=expected):
        sdonnx.load("pictogram", device="openvino").plan("a cat")
    plan = sdonnx.load("pictogram", memory=f"{least + 20}MB", device="openvino").plan("a cat")
    assert plan.peak <= (least + 20) * 10**6


@pytest.mark.parametrize("memory", ["min", "between"])
def test_auto_takes_the_cpu_where_openvino_takes_too_much(memory, openvino):
    budgets = list[int]()
    for device in ("cpu", "openvino"):
        with sdonnx.load("pictogram", device=device) as pipe:
            budgets.append(pipe.plan("a cat", always=True).minimum_budget)
    least = budgets[-1]
    memory = memory if memory == "min" else sum(budgets) // 2
    with sdonnx.load("pictogram", memory=memory) as pipe:
        plan = pipe.plan("a cat")
        assert plan.peak < least
        assert list(plan.execution.avoided) == ["openvino"]
        assert pipe.generate("a cat", seed=1, num_inference_steps=1, width=72, height=72).compute == "f32"
    with sdonnx.load("pictogram", memory=2 * least) as pipe:
        assert not pipe.plan("a cat", always=True).execution.avoided


def test_with_the_least_memory_auto_takes_the_cpu_without_a_plan():
    """Also for a decoder of VAEs, which runs in tiles, not in stages."""
    for memory, device, avoided in [("min", "auto", ["openvino"]), ("min", "openvino", []), ("auto", "auto", [])]:
        assert list(Budget(memory).unplanned(device).avoided) == avoided


def test_a_large_image_is_decoded_in_tiles(openvino):
    asked = {"width": 768, "height": 768}
    with sdonnx.load("pictogram", device="openvino", compute="f32", memory="min") as pipe:
        decoder = pipe.plan("a cat", **asked).components[-1]
    with sdonnx.load("pictogram", device="openvino", compute="f32") as pipe:
        whole = pipe.plan("a cat", always=True, **asked).components[-1]
    assert decoder.strategy.tile is not None
    assert whole.strategy.tile is None
    assert whole.peak - decoder.peak > 3e8


def test_the_command(openvino, tmp_path):
    planned = json.loads(run_cli("plan", "pictogram", "--device", "openvino", "--json").stdout)
    assert [each["strategy"] for each in planned["components"]] == ["whole"] * 3
    assert planned["minimum_budget"] == planned["peak"] == max(each["peak"] for each in planned["components"])
    shown = run_cli("plan", "pictogram", "--device", "openvino", "--memory", "16GB").stdout
    assert re.search(
        r"64x64 on openvino: peak [\d,]+ MB \(predicted, Python included\); possible from [\d,]+ MB", shown
    )
    assert "openvino, which --device auto prefers here" not in shown
    on_cpu = run_cli("plan", "pictogram").stdout
    assert "64x64 on cpu: peak" in on_cpu
    assert on_cpu.endswith("openvino, which --device auto prefers here, takes more: see --device openvino\n")
    ran = run_cli("run", "a cat", "--device", "openvino", "--memory", "30MB", cwd=tmp_path)
    assert ran.returncode != 0
    assert re.search("30MB of memory is too little for this on openvino; .* --device cpu", ran.stderr)


def test_what_was_not_measured_is_not_promised(tmp_path):
    """Int8 that OpenVINO leaves to ONNX Runtime in part, and its devices but the CPU."""
    graph = saved(build("unet", part_of(UNet2DConditionModel(**UNET)), "int8", Int8Operators), tmp_path)
    sizes = {"sample": (1, 4, 8, 8), "timestep": (), "encoder_hidden_states": (2, 77, 48)}
    inputs = tuple((name, TensorInfo(shape)) for name, shape in sizes.items())
    phases = [[LoadedComponent(component="unet", graphs=(Graph(path=graph, inputs=inputs),))]]
    for device, reason in {"openvino": "it computes in int8", "openvino:gpu": "only OpenVINO's CPU"}.items():
        with pytest.raises(sdonnx.RequestError, match=f"cannot estimate the memory of tiny on {device}: {reason}"):
            Budget("2GB").plan(lambda: phases, 0, "tiny", device=device, compiled=Compilation(compute="f32"))
        assert (
            Budget("auto").plan(lambda: phases, 1 << 60, "tiny", device=device, compiled=Compilation(compute="f32"))
            is None
        )
