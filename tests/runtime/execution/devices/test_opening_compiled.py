"""Sessions on OpenVINO that are opened from compiled graphs on disk: which graph is opened, and what it computes."""

import json
import os
import shutil

import numpy as np
import pytest
from sdonnx_runtime.execution.devices import node_assignment, opening
from sdonnx_runtime.execution.devices.compiled_graphs import compiled_graphs
from sdonnx_runtime.execution.devices.node_assignment import NodeAssignment
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.graphs.initializers import TensorData, read_initializers


@pytest.fixture
def unet(package, tmp_path, monkeypatch, openvino):
    """A U-Net of its own, and no compiled graphs yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(package / "unet", tmp_path / "unet") / "model.onnx"


@pytest.fixture
def started(monkeypatch):
    """The graphs that sessions were started with."""
    graphs, start = [], opening._start
    monkeypatch.setattr(opening, "_start", lambda graph, *args: graphs.append(graph) or start(graph, *args))
    return graphs


def run(unet, batch=1, **options):
    rng = np.random.default_rng(batch)
    feeds = {
        "sample": rng.standard_normal((batch, 4, 16, 16), np.float32),
        "timestep": np.array(1, np.float32),
        "encoder_hidden_states": rng.standard_normal((batch, 77, 64), np.float32),
    }
    session = Session(unet, device="openvino", threads=1, **options)
    return session.run(feeds)["out_sample"], session


def find_kernel(unet):
    """A weight of a convolution, in the weights file."""
    return next(each for each in read_initializers(unet).values() if each.external and len(each.shape) == 4)


def halve(kernel):
    return kernel.read() * np.array(0.5, kernel.dtype)


@pytest.mark.parametrize("compute", ["f32", "auto"])
def test_an_image_is_the_same_from_a_compiled_graph(unet, started, compute):
    expected, plain = run(unet, compute=compute, cache=False)
    assert compiled_graphs().sizes() == {}
    first, _ = run(unet, compute=compute)
    (key,) = compiled_graphs().sizes()
    started.clear()
    second, session = run(unet, compute=compute)
    assert started == [str(compiled_graphs().root / key / "graph.onnx")]
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(second, expected)
    assert session.assignment == plain.assignment


def test_another_size_or_option_is_another_graph(unet, started):
    for number, options in enumerate([{}, {"batch": 2}, {"compute": "f32"}], start=1):
        run(unet, **options)
        assert len(compiled_graphs().sizes()) == number


def test_weights_that_are_replaced_are_not_those_of_a_compiled_graph(unet):
    """As a merged LoRA's are."""
    before, _ = run(unet)
    kernel = find_kernel(unet)
    weights = {kernel.name: TensorData.of(halve(kernel), kernel.data_type)}
    merged, _ = run(unet, weights=weights)
    expected, _ = run(unet, weights=weights, cache=False)
    np.testing.assert_array_equal(merged, expected)
    assert np.abs(merged - before).max() > 1e-3
    np.testing.assert_array_equal(run(unet)[0], before)
    assert len(compiled_graphs().sizes()) == 1


def test_a_weights_file_that_was_changed_is_compiled_again(unet):
    """Also if its size and the time of its last change are as before."""
    before, _ = run(unet)
    kernel = find_kernel(unet)
    times = kernel.file.stat().st_atime_ns, kernel.file.stat().st_mtime_ns
    halved = halve(kernel)
    with kernel.file.open("r+b") as stream:
        stream.seek(kernel.offset)
        stream.write(halved.tobytes())
    os.utime(kernel.file, ns=times)
    changed, _ = run(unet)
    np.testing.assert_array_equal(changed, run(unet, cache=False)[0])
    assert np.abs(changed - before).max() > 1e-3


def test_what_another_version_wrote_of_a_graph_is_not_read(unet):
    expected, session = run(unet)
    assert session.assignment is not None
    (key,) = compiled_graphs().sizes()
    entry = compiled_graphs().root / key / "entry.json"
    written = json.loads(entry.read_text())
    written["info"]["assignment"]["more"] = 1
    for info in (written["info"], {}):
        entry.write_text(json.dumps({**written, "info": info}))
        image, session = run(unet)
        np.testing.assert_array_equal(image, expected)
        assert session.assignment is None


def test_a_compiled_graph_warns_of_nodes_on_the_cpu(unet, monkeypatch, caplog):
    found = NodeAssignment(on_device={"Conv": 9}, on_cpu={"Gelu": 3}, shape_nodes=0)
    monkeypatch.setattr(NodeAssignment, "read", lambda *_: found)
    for _ in range(2):
        node_assignment._warn_once.cache_clear()  # as in another process
        run(unet)
        assert "unet on device 'openvino': 3 compute nodes on the CPU: 3 Gelu" in caplog.text
        caplog.clear()
