"""How sessions run: on a thread of their own; on a device with memory of its own, without copies that are not needed.

The CPU stands in for the device: its OrtValues are bound as those of a GPU, and its results are known.
"""

import _thread
import os
import signal
import threading
import time
import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from PIL import Image
from sdonnx_runtime.errors import DeviceError
from sdonnx_runtime.execution.devices.table import DEVICES
from sdonnx_runtime.execution.running.device_array import ALL_OUTPUTS, DeviceArray, freeze
from sdonnx_runtime.execution.running.shared_weights import SharedWeights
from sdonnx_runtime.execution.running.worker import Worker
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.graphs.initializers import TensorData, read_initializers
from sdonnx_runtime.packages.package import Package

import sdonnx

GRAPH = """<ir_version: 9, opset_import: ["" : 20]>
g (float[N, 2] x, float[N, 2] c) => (float[N, 2] y, float[N, 2] z) { y = Add(x, c) z = Mul(x, c) }"""


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    ir.save(ir.from_onnx_text(GRAPH), path)
    return path


@pytest.fixture
def on_device(monkeypatch):
    """Sessions on the CPU run as on a device with memory of its own; counts what is bound, by kind and name."""
    counts, binding = Counter(), onnxruntime.IOBinding
    upload, pass_on, read = binding.bind_cpu_input, binding.bind_ortvalue_input, DeviceArray.numpy

    def counted(kind, real):
        def bind(self, name, value):
            counts[kind, name] += 1
            real(self, name, value)

        return bind

    def counted_read(self):
        counts["read"] += 1
        return read(self)

    monkeypatch.setitem(DEVICES, "cpu", replace(DEVICES["cpu"], memory="cpu"))
    monkeypatch.setattr(binding, "bind_cpu_input", counted("upload", upload))
    monkeypatch.setattr(binding, "bind_ortvalue_input", counted("pass", pass_on))
    monkeypatch.setattr(DeviceArray, "numpy", counted_read)
    return counts


def pair(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal((2, *shape)).astype(np.float32)
    return {"x": values[0], "c": values[1].copy()}


def own_threads(path):
    return [each for each in threading.enumerate() if each.name == f"sdonnx {path.parent.name}"]


@pytest.mark.core
def test_a_session_runs_on_one_thread_which_ends_with_it(graph):
    sessions = [Session(graph) for _ in range(4)]
    assert not own_threads(graph)
    for _ in range(3):
        for session in sessions:
            session.run(pair(1, 2))
    assert len(own_threads(graph)) == 4
    with pytest.raises(DeviceError):
        session.run({**pair(1, 2), "c": np.ones((1, 3), np.float32)})
    del session, sessions
    end = time.monotonic() + 5
    while own_threads(graph) and time.monotonic() < end:
        time.sleep(0.01)
    assert not own_threads(graph)


def test_an_impatient_second_interrupt_waits_for_the_end_of_the_call():
    class Owner:
        pass

    owner, interrupted, ended = Owner(), threading.Event(), []

    def work():
        assert interrupted.wait(10)
        _thread.interrupt_main()
        time.sleep(0.3)
        ended.append(True)

    worker = Worker(owner, "impatient")
    with pytest.raises(KeyboardInterrupt):
        worker.call(_thread.interrupt_main, lambda: None)
        worker.call(work, interrupted.set)
    if not interrupted.is_set():  # the interrupt came between the calls
        threading.Timer(0.05, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            worker.call(work, interrupted.set)
    assert ended == [True]
    assert worker.call(lambda: 3, lambda: None) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
def test_a_session_that_has_run_runs_in_a_fork_too(graph):
    session, values = Session(graph, threads=1), pair(1, 2)  # ONNX Runtime's own threads have no copy in a fork
    session.run(values)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        os._exit(not np.array_equal(session.run(values)["y"], values["x"] + values["c"]))
    assert os.waitpid(child, 0)[1] == 0


def test_unchanged_inputs_are_not_uploaded_again(graph, on_device):
    session, values = Session(graph), pair(3, 2)
    freeze(values["c"])
    for turn in range(3):
        values["x"] += turn  # in place: the same array with other values
        found = session.run(values)
        np.testing.assert_array_equal(found["y"], values["x"] + values["c"])
    assert on_device == {("upload", "x"): 3, ("upload", "c"): 1}
    session.run({"x": values["x"][:1], "c": values["c"]})  # x is repeated, c is as before
    session.run({"x": pair(6, 2)["x"], "c": values["c"]})  # c is repeated
    found = session.run({"x": values["x"], "c": freeze(values["c"] + 1)})
    np.testing.assert_array_equal(found["y"], values["x"] + values["c"] + 1)
    assert on_device["upload", "c"] == 3


def test_a_view_counts_as_unchanged_only_if_what_it_shows_can_not_change(graph, on_device):
    session, values = Session(graph), pair(3, 2)
    view = freeze(values["c"][:])
    for turn in range(2):
        values["c"] += turn
        np.testing.assert_array_equal(session.run({**values, "c": view})["y"], values["x"] + values["c"])
    assert on_device["upload", "c"] == 2


def test_kept_outputs_go_to_another_session_without_a_copy(graph, on_device):
    first, second, values = Session(graph), Session(graph), pair(3, 2)
    found = first.run(values, keep=("y",))
    kept = found["y"]
    assert (type(kept), kept.shape, kept.dtype, len(kept), kept.ndim) == (DeviceArray, (3, 2), np.float32, 3, 2)
    assert isinstance(found["z"], np.ndarray)
    first.run(pair(3, 2, seed=1), keep=ALL_OUTPUTS)  # which leaves what was kept as it is, and what was not
    np.testing.assert_array_equal(found["z"], values["x"] * values["c"])
    expected = values["x"] + values["c"]
    for _ in range(2):
        np.testing.assert_array_equal(second.run({"x": kept, "c": values["c"]})["z"], expected * values["c"])
    assert (on_device["pass", "x"], on_device["upload", "x"], on_device["read"]) == (1, 2, 0)
    np.testing.assert_array_equal(kept.numpy(), expected)
    twice = second.run({"x": kept, "c": np.ones((6, 2), np.float32)})  # it is repeated, on the host
    np.testing.assert_array_equal(twice["y"], np.concatenate([expected + 1] * 2))


def test_an_array_of_another_device_is_copied(graph, on_device):
    values = pair(3, 2)
    kept = replace(Session(graph).run(values, keep=ALL_OUTPUTS)["y"], device="cuda:1")
    found = Session(graph).run({**values, "x": kept})
    np.testing.assert_array_equal(found["y"], values["x"] + values["c"] + values["c"])
    assert on_device["read"] == 1


def test_where_outputs_can_not_stay_on_the_device_they_are_copied(graph, monkeypatch, caplog):
    monkeypatch.setitem(DEVICES, "cpu", replace(DEVICES["cpu"], memory="nowhere"))
    session, values = Session(graph), pair(3, 2)
    for _ in range(2):
        found = session.run(values, keep=("y",))
        np.testing.assert_array_equal(found["y"], values["x"] + values["c"])
    assert caplog.text.count("outputs don't stay on the device") == 1
    with pytest.raises(DeviceError):
        session.run({**values, "c": np.ones((1, 3), np.float32)}, keep=("y",))


@pytest.mark.core
def test_on_the_cpu_nothing_is_bound(graph):
    found = Session(graph).run(pair(3, 2), keep=ALL_OUTPUTS)
    assert all(isinstance(each, np.ndarray) for each in found.values())


MIDDLE = "mid_block_additional_residual"


@pytest.fixture
def drawn(package, control):
    """The latents of four steps with DeepCache, of which the second takes features, and a ControlNet."""

    def draw(**settings):
        conditioning = sdonnx.Control(image=Image.new("RGB", (64, 64), "red"), **settings)
        asked = {"seed": 1, "num_inference_steps": 4, "width": 64, "height": 64, "sampler": "euler"}
        with sdonnx.load(package, controls=[control]) as pipe:
            return pipe.generate("a cat", cache_interval=2, controls=(conditioning,), **asked).latents

    return draw


def test_features_and_residuals_stay_on_the_device(drawn, on_device, monkeypatch):
    found, bound = drawn(), Counter(on_device)
    assert bound["read"] == 0
    assert bound["pass", "cached_features"] == 1
    assert bound["pass", MIDDLE] == 4  # of three full steps; the graph of cached ones gets the last ones
    assert ("upload", MIDDLE) not in bound
    assert bound["upload", "encoder_hidden_states"] == 3  # the ControlNet, and two graphs of the U-Net
    assert bound["upload", "controlnet_cond"] == 1
    assert bound["upload", "timestep"] == 3 + 4
    monkeypatch.undo()
    np.testing.assert_array_equal(found, drawn())


def test_scaled_residuals_are_those_of_the_cpu(drawn, on_device, monkeypatch):
    found = drawn(scale=0.5, end=0.6)
    assert ("pass", MIDDLE) not in on_device
    assert on_device["pass", "cached_features"] == 1
    monkeypatch.undo()
    np.testing.assert_array_equal(found, drawn(scale=0.5, end=0.6))


@pytest.fixture
def shared(on_device, monkeypatch):
    """As `on_device`, where sessions also take weights from each other's memory; counts what sessions were given."""
    add, given = onnxruntime.SessionOptions.add_initializer, Counter()

    def counted(self, name, value):
        given[name, value.data_ptr()] += 1
        add(self, name, value)

    monkeypatch.setattr(onnxruntime.SessionOptions, "add_initializer", counted)
    monkeypatch.setitem(DEVICES, "cpu", replace(DEVICES["cpu"], shares_memory=True))
    return given


UNET = {
    "sample": np.ones((1, 4, 8, 8), np.float32), "timestep": np.array(1, np.float32),
    "encoder_hidden_states": np.ones((2, 77, 64), np.float32),
}  # fmt: skip


@pytest.fixture
def graphs(package):
    """Two graphs of a U-Net, the names of the weights that are worth sharing in each, and a way to open both."""
    paths = [Package.open(package).graph("unet", variant) for variant in ("plain", "caching")]
    names = [
        {name for name, each in read_initializers(path).items() if each.external and each.length >= 1 << 16}
        for path in paths
    ]

    def open_both(**options):
        weights = SharedWeights()
        return [Session(path, shared_weights=weights, **options) for path in paths], weakref.ref(weights)

    return open_both, names


def test_graphs_of_a_component_share_its_weights(graphs, on_device, shared, monkeypatch):
    open_both, (first, second) = graphs
    sessions, weights = open_both()
    assert len({name for name, _ in shared}) == len(shared) == on_device["upload", "x"]
    assert {name for (name, _), times in shared.items() if times == 2} == first & second != set()
    found = [session.run(UNET)["out_sample"] for session in sessions]
    del sessions[0]
    assert weights() is not None
    np.testing.assert_array_equal(sessions[0].run(UNET)["out_sample"], found[1])
    sessions.clear()
    assert weights() is None
    monkeypatch.undo()
    np.testing.assert_array_equal(found, [session.run(UNET)["out_sample"] for session in open_both()[0]])


def test_graphs_share_the_weights_that_adapters_changed(graphs, shared):
    open_both, (first, _) = graphs
    name = min(first)
    initializer = read_initializers(open_both()[0][0].path)[name]
    shared.clear()
    changed = TensorData.of(initializer.read() * 2, initializer.data_type)
    sessions, _ = open_both(weights={name: changed})
    doubled = [session.run(UNET)["out_sample"] for session in sessions]
    assert len([each for each, _ in shared if each == name]) == 1
    np.testing.assert_array_equal(
        doubled[0], Session(sessions[0].path, weights={name: changed}).run(UNET)["out_sample"]
    )
    assert not np.array_equal(doubled[0], Session(sessions[0].path).run(UNET)["out_sample"])


def test_where_memory_can_not_be_shared_each_session_has_its_own(graphs, shared, monkeypatch, caplog):
    monkeypatch.delattr(onnxruntime.OrtValue, "data_ptr")
    with caplog.at_level("INFO", "sdonnx_runtime"):
        sessions, _ = graphs[0]()
    assert "each session has weights of its own" in caplog.text
    assert not shared
    assert np.isfinite(sessions[1].run(UNET)["out_sample"]).all()
