"""Devices: which options sessions are opened with, and the errors of devices that are absent or fail."""

import sys
import threading
import time

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from sdonnx_runtime.errors import DeviceError, PackageError, RequestError
from sdonnx_runtime.execution.devices.opening import provider_options
from sdonnx_runtime.execution.devices.table import DEVICES
from sdonnx_runtime.execution.ort import candidates
from sdonnx_runtime.execution.session import Cancelled, Session


@pytest.fixture
def unet(package):
    return package / "unet" / "model.onnx"


def feeds(batch=1, size=16):
    return {
        "sample": np.zeros((batch, 4, size, size), np.float32),
        "timestep": np.array(1, np.float32),
        "encoder_hidden_states": np.zeros((batch, 77, 64), np.float32),
    }


def test_options_are_those_that_onnxruntime_documents():
    assert provider_options("cuda")["arena_extend_strategy"] == "kSameAsRequested"
    assert provider_options("cuda", 2**31)["gpu_mem_limit"] == "2147483648"
    assert provider_options("cpu") == {}
    assert not DEVICES["directml"].memory_pattern
    assert provider_options("directml", 1) == {}


@pytest.mark.core
@pytest.mark.parametrize("device", ["cuda", "directml"])
def test_an_absent_device_is_named_with_its_extra(device, unet):
    with pytest.raises(DeviceError, match=rf'pip install "sdonnx\[{device}\]"'):
        Session(unet, device=device)


def test_an_unknown_device_lists_the_known(unet):
    with pytest.raises(RequestError, match="choose auto, cuda, directml, webgpu, openvino, cpu"):
        Session(unet, device="tpu")


@pytest.mark.core
def test_auto_takes_the_best_available_device(unet, monkeypatch):
    assert Session(unet).device == "cpu"
    built = ["DmlExecutionProvider", "CPUExecutionProvider", "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: built)
    assert candidates("auto") == ["cuda", "directml", "cpu"]


@pytest.mark.core
def test_a_device_that_is_built_in_but_does_not_start(unet, monkeypatch, caplog):
    """ONNX Runtime leaves a provider out of the session when its driver is missing; that is never silent."""
    built = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: built)
    with pytest.raises(DeviceError, match="device 'cuda' failed to initialise"):
        Session(unet, device="cuda")
    assert Session(unet, device="auto").device == "cpu"
    assert "device 'cuda' failed to initialise" in caplog.text


def test_without_onnxruntime_the_extras_are_named(unet, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeviceError, match=r"ONNX Runtime is not installed.*sdonnx\[cpu\]"):
        Session(unet)


@pytest.mark.core
def test_a_damaged_graph_is_a_package_error(tmp_path, unet):
    broken = tmp_path / "model.onnx"
    broken.write_bytes(unet.read_bytes()[:1000])
    with pytest.raises(PackageError, match=r"model.onnx can't be loaded"):
        Session(broken)
    with pytest.raises(PackageError, match="missing"):
        Session(tmp_path / "other.onnx")


@pytest.mark.core
def test_inputs_are_cast_and_shaped_as_the_graph_wants(tmp_path):
    graph = ir.from_onnx_text(
        """<ir_version: 9, opset_import: ["" : 20]>
        g (int64[1] timestep, float[N] x) => (int64[1] t, float[N] y) { t = Identity(timestep) y = Identity(x) }"""
    )
    ir.save(graph, tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx")
    found = session.run({"timestep": np.array(7.0, np.float32), "x": np.ones(2), "unused": np.ones(1)})
    assert found["t"].dtype == np.int64
    assert found["t"].tolist() == [7]
    assert found["y"].dtype == np.float32
    with pytest.raises(PackageError, match="requires input 'x'"):
        session.run({"timestep": np.array(7.0, np.float32)})


@pytest.mark.core
def test_values_that_are_not_finite_are_never_passed_on(unet):
    with pytest.raises(PackageError, match=r"'out_sample' is not finite, because its input 'timestep'.*--precision"):
        Session(unet).run({**feeds(), "timestep": np.array(np.nan, np.float32)})


@pytest.mark.core
def test_cancel_stops_inside_a_run(unet):
    session = Session(unet, threads=1)
    work = feeds(batch=4, size=64)
    start = time.perf_counter()
    session.run(work)
    whole = time.perf_counter() - start
    timer = threading.Timer(whole / 10, session.cancel)
    timer.start()
    with pytest.raises(Cancelled):
        session.run(work)
    np.testing.assert_array_equal(session.run(feeds())["out_sample"].shape, (1, 4, 16, 16))
