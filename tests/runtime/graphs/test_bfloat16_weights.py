"""Weights files in bfloat16: their values against ml_dtypes', what the new graph reads, and disks without room."""

import shutil
import tempfile
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.graphs.bfloat16 import BFLOAT16
from sdonnx_runtime.graphs.bfloat16_weights import open_bfloat16, store_bfloat16

EVERY_FLOAT16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FLOAT32 = np.concatenate([
    np.random.default_rng(0).standard_normal(100_001, np.float32),
    np.array([np.inf, -np.inf, 0, -0.0, 1e-45, 3.4e38, 1.00390625, 1.01171875], np.float32),
    np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32),
])  # fmt: skip
WEIGHTS = {"half": EVERY_FLOAT16, "single": FLOAT32, "both": EVERY_FLOAT16[:5], "other": FLOAT32[:7]}


@pytest.fixture
def path(tmp_path):
    """A graph with its weights in a file: three are cast to bfloat16, one of these is read as it is, too."""
    (tmp_path / "package").mkdir()
    initializers = [numpy_helper.from_array(values, name) for name, values in WEIGHTS.items()]
    casts = [make_node("Cast", [name], [f"{name}.cast"], to=BFLOAT16) for name in ("half", "single", "both")]
    nodes = [*casts, *(make_node("Identity", [name], [f"{name}.out"]) for name in ("both", "other"))]
    outputs = [make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, None) for name in ("both", "other")]
    nodes += [make_node("Identity", [each.output[0]], [f"{each.output[0]}.out"]) for each in casts]
    outputs += [make_tensor_value_info(f"{each.output[0]}.out", TensorProto.BFLOAT16, None) for each in casts]
    model = make_model(make_graph(nodes, "g", [], outputs, initializers), opset_imports=[make_opsetid("", 22)])
    path = tmp_path / "package" / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    return path


def read(encoded, folder):
    """The initializers of a graph by name, and its nodes."""
    (folder / "graph.onnx").write_bytes(encoded)
    graph = onnx.load(folder / "graph.onnx").graph
    return {each.name: numpy_helper.to_array(each) for each in graph.initializer}, graph.node


def test_weights_are_rounded_to_the_nearest_value(path, tmp_path):
    stored = store_bfloat16(path, path.read_bytes(), tmp_path / "new", threads=2)
    found, nodes = read(stored, tmp_path)
    assert found.keys() == {"half.cast", "single.cast", "both.cast", "both", "other"}
    assert {each.op_type for each in nodes} == {"Identity"}
    for name in ("half", "single", "both"):
        with np.errstate(invalid="ignore"):  # of NaNs
            expected = WEIGHTS[name].astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(found[f"{name}.cast"].astype(np.float32), expected)
    for name in ("both", "other"):
        np.testing.assert_array_equal(found[name], WEIGHTS[name])
        assert found[name].dtype == WEIGHTS[name].dtype


@pytest.mark.parametrize("replaced", [(), {"kernel"}])
def test_what_nodes_compute_of_weights_is_rounded_once(replaced, tmp_path):
    """Unless a session replaces a weight: these nodes stay for the device."""
    kernel = np.random.default_rng(1).standard_normal((4, 6, 3)).astype(np.float16)
    nodes = [
        make_node("Cast", ["kernel"], ["wide"], to=TensorProto.FLOAT),
        make_node("Split", ["wide"], ["a", "b", "c"], axis=-1, num_outputs=3),
        make_node("Add", ["b", "c"], ["d"]),
        make_node("Concat", ["a", "d"], ["taps"], axis=2),
        make_node("Cast", ["taps"], ["taps.bf16"], to=BFLOAT16),
        make_node("Identity", ["taps.bf16"], ["y"]),
    ]
    output = make_tensor_value_info("y", TensorProto.BFLOAT16, None)
    graph = make_graph(nodes, "g", [], [output], [numpy_helper.from_array(kernel, "kernel")])
    path = tmp_path / "model.onnx"
    model = make_model(graph, opset_imports=[make_opsetid("", 22)])
    onnx.save(model, path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    stored = store_bfloat16(path, path.read_bytes(), tmp_path / "new", 1, replaced)
    if replaced:
        assert stored is None
        return
    found, kept = read(stored, tmp_path)
    assert [each.op_type for each in kept] == ["Identity"]
    a, b, c = np.split(kernel.astype(np.float32), 3, axis=-1)
    expected = np.concatenate([a, b + c], axis=2).astype(ml_dtypes.bfloat16)
    assert found.keys() == {"taps.bf16"}
    np.testing.assert_array_equal(found["taps.bf16"].astype(np.float32), expected.astype(np.float32))


def test_weights_that_a_session_replaces_stay_as_they_are(path, tmp_path):
    stored = store_bfloat16(path, path.read_bytes(), tmp_path / "new", 1, {"half"})
    found, nodes = read(stored, tmp_path)
    assert found.keys() == {"half", "single.cast", "both.cast", "both", "other"}
    assert [each.input[0] for each in nodes if each.op_type == "Cast"] == ["half"]
    assert found["half"].dtype == np.float16


def test_a_graph_without_casts_has_no_new_file(path, tmp_path):
    assert store_bfloat16(path, path.read_bytes(), tmp_path / "new", 1, WEIGHTS) is None
    assert not (tmp_path / "new").exists()


def test_a_truncated_file_is_an_error(path, tmp_path):
    with path.with_name("model.onnx_data").open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(PackageError, match=r"model.onnx_data is damaged at '.*'; run 'sdonnx export' again"):
        store_bfloat16(path, path.read_bytes(), tmp_path / "new", threads=2)


def test_the_temporary_file_is_deleted(path, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with open_bfloat16(path, path.read_bytes(), folder=None, threads=1) as (model, folder):
        assert len(read(model, folder)[0]) == 5
        assert temporary in folder.parents
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("problem", ["full", "absent"])
def test_without_room_the_graph_stays_as_it_is(problem, path, tmp_path, monkeypatch):
    model = path.read_bytes()
    if problem == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with open_bfloat16(path, model, folder=tmp_path / "absent", threads=1) as found:
        assert found == (model, None)
