"""Sessions on devices: through the plugin API, with fixed sizes, and what they say of nodes left to the CPU."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from sdonnx_runtime.errors import DeviceError
from sdonnx_runtime.execution import ort
from sdonnx_runtime.execution.devices import opening
from sdonnx_runtime.execution.devices.node_assignment import RECORD, NodeAssignment, check_assignment
from sdonnx_runtime.execution.devices.table import DEVICES, Device, DeviceName
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.execution.staged_model import open_model
from sdonnx_runtime.execution.strategy import ExecutionStrategy
from sdonnx_runtime.graphs.onnx_proto import decode_model
from sdonnx_runtime.graphs.shape_nodes import shape_nodes
from support.plugins import ep_device, install_plugin


@pytest.fixture
def unet(package):
    return package / "unet" / "model.onnx"


def feeds(batch=1, size=16, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((batch, 4, size, size), np.float32),
        "timestep": np.array(1, np.float32),
        "encoder_hidden_states": rng.standard_normal((batch, 77, 64), np.float32),
    }


def test_a_session_through_the_plugin_api_has_the_bits_of_the_provider(unet, monkeypatch):
    """The wheel's own CPU provider is an OrtEpDevice too: opened as one of a plugin, it is the same provider."""
    plugin = Device(provider="CPUExecutionProvider", title="Fake", plugin="fake_plugin", memory_pattern=False)
    monkeypatch.setitem(DEVICES, "fake", plugin)
    monkeypatch.setattr(ort.PLUGINS, "modules", {"fake_plugin"})
    monkeypatch.setattr(ort, "find_spec", lambda _: object())
    added = []
    add = onnxruntime.SessionOptions.add_provider_for_devices
    monkeypatch.setattr(
        onnxruntime.SessionOptions,
        "add_provider_for_devices",
        lambda self, *arguments: added.append(arguments) or add(self, *arguments),
    )
    session = Session(unet, device="fake:0")
    assert session.device == "fake:0"
    ((devices, options),) = added
    assert [each.ep_name for each in devices] == ["CPUExecutionProvider"]
    assert options == {}
    expected = Session(unet, device="cpu").run(feeds())
    np.testing.assert_array_equal(session.run(feeds())["out_sample"], expected["out_sample"])


@pytest.mark.core
def test_fixed_sizes_compute_what_free_ones_do(unet, monkeypatch):
    free = Session(unet, device="cpu")
    monkeypatch.setitem(DEVICES, "cpu", replace(DEVICES["cpu"], fixed_sizes=True))
    sized = Session(unet, device="cpu")
    assert (sized.inputs, sized.outputs) == (free.inputs, free.outputs)
    opened = []
    create = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: opened.append(create(*a, **k)) or opened[-1])
    for batch, size, sessions in [(1, 16, 1), (2, 16, 2), (1, 16, 2), (1, 8, 3), (1, 16, 3), (2, 16, 4)]:
        given = feeds(batch, size)
        found, expected = (each.run(given)["out_sample"] for each in (sized, free))
        np.testing.assert_allclose(found, expected, atol=1e-5)  # known sizes are optimized further
        assert len(opened) == sessions  # two are kept
    assert opened[0].get_inputs()[0].shape == [1, 4, 16, 16]


def test_a_session_with_fixed_sizes_says_at_once_that_its_device_is_absent(unet):
    with pytest.raises(DeviceError, match=r"sdonnx\[directml\]"):
        Session(unet, device="directml")


def test_all_stages_take_the_next_device_if_one_with_fixed_sizes_fails(unet, monkeypatch):
    expected = open_model(unet, {}, ExecutionStrategy(staged=True), device="cpu").run(feeds())["out_sample"]
    monkeypatch.setitem(DEVICES, "directml", replace(DEVICES["directml"], provider="CPUExecutionProvider"))
    tried, real = [], opening._open_on

    def open_on(what, name, sizes):
        tried.append(name.base)
        if name.base == "directml":
            raise DeviceError("no driver")
        return real(what, name, sizes)

    monkeypatch.setattr(opening, "_open_on", open_on)
    staged = open_model(unet, {}, ExecutionStrategy(staged=True), device="auto")
    np.testing.assert_array_equal(staged.run(feeds())["out_sample"], expected)
    assert tried[:2] == ["directml", "cpu"]
    assert tried.count("directml") == 1 < tried.count("cpu")


def test_a_device_that_auto_comes_to_has_a_session_for_each_size(unet, monkeypatch):
    """CUDA has one for all sizes; where it fails, the next device gets the sizes."""
    expected = Session(unet, device="cpu").run(feeds())["out_sample"]
    for name in ("cuda", "directml"):
        monkeypatch.setitem(DEVICES, name, replace(DEVICES[name], provider="CPUExecutionProvider"))
    tried, real = [], opening._open_on

    def open_on(what, name, sizes):
        tried.append((name.base, bool(sizes)))
        if name.base == "cuda":
            raise DeviceError("no driver")
        return real(what, DeviceName("cpu"), {})

    monkeypatch.setattr(opening, "_open_on", open_on)
    np.testing.assert_array_equal(Session(unet, device="auto").run(feeds())["out_sample"], expected)
    assert tried == [("cuda", True), ("directml", True)]


def test_shape_nodes_are_those_whose_inputs_onnx_infers_to_be_integers(package):
    integers = {onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL}
    for name in ("unet", "text_encoder", "vae_decoder"):
        path = package / name / "model.onnx"
        model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
        graph = model.graph
        types = {
            each.name: each.type.tensor_type.elem_type for each in (*graph.input, *graph.output, *graph.value_info)
        }
        types |= {each.name: each.data_type for each in graph.initializer}
        expected = {
            (node.name, node.op_type)
            for node in graph.node
            if node.op_type == "Shape" or (node.input and {types.get(each) for each in node.input if each} <= integers)
        }
        found = shape_nodes(decode_model(memoryview(path.read_bytes())))
        assert found == expected
        assert found


def test_nodes_on_the_cpu_are_told_from_those_that_compute_shapes(unet):
    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        pytest.skip("this ONNX Runtime does not say which nodes a device runs")
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry(RECORD, "1")
    session = onnxruntime.InferenceSession(unet, settings, providers=["CPUExecutionProvider"])
    all_left = NodeAssignment.read(session, DeviceName("cuda"), unet, None)
    assert not all_left.on_device
    assert all_left.share_on_cpu == 1
    assert all_left.on_cpu["MultiHeadAttention"] > 0
    assert all_left.on_cpu["Shape"] == 0
    assert all_left.shape_nodes > 0
    assert all_left.describe("cuda").startswith(
        f"0 nodes on cuda, {all_left.shape_nodes} integer shape nodes on the CPU;"
    )
    all_run = NodeAssignment.read(session, DeviceName("cpu"), unet, None)
    assert sum(all_run.on_device.values()) == sum(all_left.on_cpu.values()) + all_left.shape_nodes
    assert (all_run.on_cpu, all_run.share_on_cpu) == ({}, 0)


def test_a_graph_that_a_device_runs_only_a_part_of(unet, caplog):
    few = NodeAssignment(on_device={"MatMul": 9}, on_cpu={"Gelu": 2, "MatMul": 1}, shape_nodes=3)
    for _ in range(2):
        check_assignment(few, DeviceName("directml"), unet)
    (message,) = caplog.messages  # once
    assert message.startswith("unet on device 'directml': 3 compute nodes on the CPU: 2 Gelu, 1 MatMul")
    int8 = NodeAssignment(on_device={"Gelu": 90}, on_cpu={"MatMulInteger": 20, "ConvInteger": 5}, shape_nodes=0)
    with pytest.raises(
        DeviceError, match="20 MatMulInteger, 5 ConvInteger.*made for the CPU.*--target cuda or --precision"
    ):
        check_assignment(int8, DeviceName("cuda", 1), unet)


def test_a_process_has_one_adapter_of_webgpu(monkeypatch):
    """ONNX Runtime ignores the power preference of later sessions, as the first one's adapter is kept."""
    install_plugin(monkeypatch, [ep_device(Discrete="1"), ep_device(Discrete="0")])
    monkeypatch.setattr(opening, "ADAPTERS", opening.OpenedAdapters())
    first = opening._choose(DeviceName("webgpu"))
    opening.ADAPTERS.add(DeviceName("webgpu"), first.options)
    assert opening._choose(DeviceName("webgpu", 0)).options == first.options  # the fastest, too
    with pytest.raises(DeviceError, match="'webgpu:1' can't be used in a process that has used 'webgpu'"):
        opening._choose(DeviceName("webgpu", 1))


def test_cuda_s_libraries_are_loaded_once_and_quietly(monkeypatch, capsys):
    loaded = []

    def preload():
        loaded.append(sys.stdout.write("Failed to load libcudnn.so.9"))

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload, raising=False)
    libraries = opening.CudaLibraries()
    libraries.load()
    libraries.load()
    assert len(loaded) == 1
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(ort, "load_onnxruntime", lambda: SimpleNamespace())  # before 1.21
    opening.CudaLibraries().load()
