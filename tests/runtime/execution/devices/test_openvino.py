"""OpenVINO as a device: what it is asked for, what it computes, and how often it compiles a graph."""

import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from sdonnx_models import bundled
from sdonnx_runtime.errors import DeviceError
from sdonnx_runtime.execution.devices import openvino as openvino_module
from sdonnx_runtime.execution.devices import sized_sessions
from sdonnx_runtime.execution.devices.adapters import choose_adapter, device_statuses
from sdonnx_runtime.execution.devices.computing import computes
from sdonnx_runtime.execution.devices.openvino import openvino_options
from sdonnx_runtime.execution.devices.table import DEVICES, DeviceName
from sdonnx_runtime.execution.ort import candidates
from sdonnx_runtime.execution.session import Cancelled, Session
from sdonnx_runtime.execution.staged_model import open_model
from sdonnx_runtime.execution.strategy import ExecutionStrategy
from support.plugins import install_openvino, openvino_device

import sdonnx

OPENVINO = DEVICES["openvino"]


CPU, GPU, SECOND_GPU = (
    openvino_device(kind, name) for kind, name in [("CPU", "Core Ultra 7"), ("GPU", "Arc 140V"), ("GPU", "Arc B580")]
)


def test_a_name_chooses_openvino_s_device(monkeypatch):
    install_openvino(monkeypatch, GPU, CPU, SECOND_GPU)
    for name, device in [("openvino", CPU), ("openvino:cpu", CPU), ("openvino:gpu", GPU), ("openvino:2", SECOND_GPU)]:
        assert choose_adapter(DeviceName.parse(name)).ep_device is device
    assert candidates("auto") == ["openvino", "cpu"]
    expected = (
        r"no device 'openvino:npu' here; choose openvino:gpu \(Arc 140V, GPU\), openvino:cpu \(Core Ultra 7, CPU\)"
    )
    with pytest.raises(DeviceError, match=expected):
        choose_adapter(DeviceName.parse("openvino:npu"))
    status = next(each for each in device_statuses() if each.device == "openvino")
    assert status.adapters == {0: "Arc 140V, GPU", 1: "Core Ultra 7, CPU", 2: "Arc B580, GPU"}


def test_a_cpu_that_the_plugin_does_not_list(monkeypatch, package):
    install_openvino(monkeypatch)
    with pytest.raises(DeviceError, match="requires .*Intel CPU, GPU or NPU; .* Intel's CPUs alone.* --device cpu"):
        candidates("openvino")
    install_openvino(monkeypatch, GPU)
    assert candidates("auto") == ["cpu"]
    expected = r"no device 'openvino' here; choose openvino:gpu \(Arc 140V, GPU\); .* Intel's CPUs alone"
    with pytest.raises(DeviceError, match=expected):
        Session(package / "unet" / "model.onnx", device="openvino")


F16 = {"INFERENCE_PRECISION_HINT": "f16"}
UNROUNDED = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}  # activations stay floating-point


@pytest.mark.parametrize(
    ("device", "asked", "config"),
    [
        (
            "CPU",
            {"compute": "f32", "threads": 3},
            {"CPU": {**UNROUNDED, "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 3}},
        ),
        ("CPU", {}, {"CPU": UNROUNDED}),
        ("GPU.1", {"compute": "f16", "threads": 3}, {"GPU.1": F16, "GPU": F16}),  # a GPU has no threads
    ],
)
def test_options_are_json_for_openvino_s_device(device, asked, config):
    (text,) = openvino_options(device, **asked).values()
    assert json.loads(text) == config
    assert openvino_options("GPU") == {}
    assert openvino_options(device, **asked, built_in=True) == {"device_type": device, "load_config": text}


@pytest.fixture
def unet(package):
    return package / "unet" / "model.onnx"


def feeds(batch=1, size=16):
    rng = np.random.default_rng(batch * size)
    return {
        "sample": rng.standard_normal((batch, 4, size, size), np.float32),
        "timestep": np.array(1, np.float32),
        "encoder_hidden_states": rng.standard_normal((batch, 77, 64), np.float32),
    }


@pytest.fixture
def opened(monkeypatch):
    """The graphs that sessions are opened for from now on, with their sizes."""
    real, found = sized_sessions.open_session, []

    def open_session(opening, sizes):
        found.append((opening.path.stem, sizes))
        return real(opening, sizes)

    monkeypatch.setattr(sized_sessions, "open_session", open_session)
    return found


def test_a_session_computes_what_the_cpu_provider_does(unet, openvino):
    session = Session(unet, device="openvino", compute="f32", threads=1)
    found, expected = session.run(feeds(2)), Session(unet, device="cpu").run(feeds(2))
    np.testing.assert_allclose(found["out_sample"], expected["out_sample"], atol=1e-4)
    assert session.assignment.on_device["MultiHeadAttention"] > 0
    assert not session.assignment.on_cpu
    if "BF16" in choose_adapter(DeviceName("openvino")).ep_device.ep_metadata["OPTIMIZATION_CAPABILITIES"].split():
        rounded = Session(unet, device="openvino", compute="bf16", threads=1).run(feeds(2))
        assert 1e-4 < np.abs(rounded["out_sample"] - expected["out_sample"]).max() < 0.1


def test_no_graph_is_compiled_twice_for_an_image(package, openvino, opened):
    """Guidance on some steps alone is 1 row, then 2, then 1; each size of the two passes has a session of its own."""
    request = sdonnx.Request(
        prompt="x", width=64, height=64, seed=1, num_inference_steps=6, guidance_steps=(0.3, 0.7), hires_scale=2.0,
        hires_strength=0.9,
    )  # fmt: skip
    with sdonnx.load(package, device="openvino", threads=1, keep_loaded=True) as pipe:
        pipe.generate(request)
        unets = [sizes for stem, sizes in opened if "tokens" in sizes and "width" in sizes]
        assert len(unets) == len({tuple(sizes.items()) for sizes in unets}) == 4
        opened.clear()
        pipe.generate(request, hires_scale=None, hires_strength=None, guidance_steps=None, seed=2)
        assert len([sizes for _, sizes in opened if "tokens" in sizes and "width" in sizes]) == 1


def test_opening_is_told_from_running(package, openvino, opened):
    """Sessions of fixed sizes are opened when these are known, and each opening is announced."""
    announced = []
    with sdonnx.load(package, device="openvino", threads=1, keep_loaded=True) as pipe:
        stream = pipe.stream("x", width=64, height=64, seed=1, num_inference_steps=3, guidance_steps=(0.5, 1.0))
        stream.on_opening(lambda name: announced.append((name, len(opened))))
        assert len([*stream]) == 3
    unets = [count for name, count in announced if name == "unet"]
    ends = [count for name, count in announced if name is None]
    assert len(unets) == 2  # 1 row, then 2
    assert all(end == start + 1 for (_, start), end in zip(announced[::2], ends, strict=True))


def test_tiles_of_all_sizes_share_a_session(package, openvino, opened):
    path, tiles = package / "vae_decoder" / "model.onnx", ExecutionStrategy(tile=24)
    latents = {"latent_sample": np.random.default_rng(0).standard_normal((1, 4, 32, 40), np.float32)}
    model = open_model(path, {}, tiles, tile_size=24, device="openvino", compute="f32", threads=1)
    expected = open_model(path, {}, tiles, tile_size=24, device="cpu").run(latents)["sample"]
    np.testing.assert_allclose(model.run(latents)["sample"], expected, atol=1e-4)
    assert opened == [("model", {})]


def test_a_graph_runs_in_stages_on_other_devices_alone(unet, openvino, notes):
    staged = ExecutionStrategy(staged=True)
    for compute, remedy in {
        "auto": "--device cpu",
        "f32": "--device cpu",
        "bf16": "--device cpu --compute f32",
    }.items():
        if compute in ("auto", *computes("openvino", "f32")):
            with pytest.raises(DeviceError, match=f"can't run a model in stages.* a higher --memory, or {remedy}$"):
                open_model(unet, {}, staged, device="openvino", compute=compute)
    expected = open_model(unet, {}, staged, device="cpu").run(feeds())["out_sample"]
    np.testing.assert_array_equal(open_model(unet, {}, staged, device="auto").run(feeds())["out_sample"], expected)
    assert notes() == ["not using openvino: it can't run a model in stages; using cpu"]


def test_a_graph_of_operators_that_openvino_lacks_is_not_compiled(unet, openvino, monkeypatch, caplog):
    monkeypatch.setitem(DEVICES, "openvino", replace(OPENVINO, lacks=frozenset({"MultiHeadAttention"})))
    expected = r"unet has \d+ MultiHeadAttention, which device 'openvino' does not.*--device cpu.*--target openvino$"
    with pytest.raises(DeviceError, match=expected):
        Session(unet, device="openvino").run(feeds())
    session, on_cpu = Session(unet, device="auto"), Session(unet, device="cpu")
    for batch in (1, 2):
        np.testing.assert_array_equal(*(each.run(feeds(batch))["out_sample"] for each in (session, on_cpu)))
    (message,) = caplog.messages
    assert message.endswith("trying cpu")


def test_cancelling_takes_effect_when_the_run_ends(unet, openvino):
    """The graph is one node to ONNX Runtime, which returns what a run computed that was to stop."""
    session = Session(unet, device="openvino", threads=1)
    session.run(large := feeds(2, 64))
    thread = ThreadPoolExecutor(1).submit(session.run, large)
    while session._options is None:
        time.sleep(1e-3)
    time.sleep(0.02)
    session.cancel()
    with pytest.raises(Cancelled):
        thread.result()
    assert np.isfinite(session.run(large)["out_sample"]).all()


def test_a_stream_that_another_thread_closes_ends(package, openvino):
    with sdonnx.load(package, device="openvino", threads=1) as pipe:
        stream = pipe.stream("x", width=64, height=64, num_inference_steps=500, guidance_scale=1.0, seed=1)
        next(stream)
        closing = Thread(target=stream.close)
        closing.start()
        assert sum(1 for _ in stream) < 490
        closing.join()
        again = pipe.generate("x", width=64, height=64, num_inference_steps=1, guidance_scale=1.0, seed=1)
        assert again.images[0].size == (64, 64)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc counts the time of threads")
def test_threads_are_openvino_s_too(unet, openvino):
    session, large = Session(unet, device="openvino", threads=1), feeds(2, 32)
    session.run(large)
    before = thread_times()
    while (spent := sum((times := thread_times() - before).values())) < 10:
        session.run(large)
    assert max(times.values()) >= spent - 1


def thread_times():
    """The processor time of this process's threads, in ticks."""
    fields = {
        task.name: (task / "stat").read_text().rpartition(")")[2].split() for task in Path("/proc/self/task").iterdir()
    }
    return Counter({name: int(values[11]) + int(values[12]) for name, values in fields.items()})


def test_an_error_of_openvino_is_one_line_that_says_the_reason(unet, openvino, monkeypatch):
    monkeypatch.setattr(openvino_module, "EXACT", {"CPU": {"NO_SUCH": "x"}})
    with pytest.raises(DeviceError, match="^device 'openvino' failed to initialise: [^\n]*NO_SUCH[^\n]*--device cpu$"):
        Session(unet, device="openvino").run(feeds())


def test_openvino_takes_all_of_the_bundled_model(openvino):
    package = sdonnx.Package.open(bundled()["pictogram"])
    for name in package.manifest.components:
        session = Session(package.graph(name), device="openvino")
        session.open_for_any_size()
        assert not session.assignment.on_cpu


def test_a_package_of_operators_that_openvino_lacks_is_refused_when_it_is_loaded(package, monkeypatch):
    monkeypatch.setitem(DEVICES, "openvino", replace(OPENVINO, lacks=frozenset({"MultiHeadAttention"})))
    with pytest.raises(DeviceError, match=r"tiny-onnx: \w+ has \d+ MultiHeadAttention, which device"):
        sdonnx.load(package, device="openvino")
