"""Damaged ``.onnx`` files: each is one clear error, or runs unplanned; `support.fuzz` mutates them at random."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sdonnx_models import bundled
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.graphs.initializers import read_initializers
from sdonnx_runtime.graphs.partition import read_stages
from sdonnx_runtime.graphs.shape_inference import TensorInfo, UnsupportedGraph
from sdonnx_runtime.memory.estimates import Graph, estimate_stages

VAE = bundled()["pictogram"] / "vae_decoder"


def save(path, nodes, *, values=(), weights=(), doc=""):
    """A graph of x (1, 16, 8, 8) to y; ``values`` are initializers in the file, ``weights`` in another."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 16, 8, 8)) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [*values, *weights], value_info=ports)
    path.write_bytes(helper.make_model(graph, doc_string=doc).SerializeToString())
    return path


def external(name, shape, **where):
    """An initializer in ``model.onnx_data``."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "model.onnx_data", **where}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


@pytest.fixture
def path(tmp_path):
    (tmp_path / "model.onnx_data").write_bytes(bytes(4096))
    return tmp_path / "model.onnx"


@pytest.mark.parametrize(
    ("shape", "where"),
    [
        ((16, 16, 3, 3), {"offset": 0, "length": 9216}),
        ((16, 4, 3, 3), {"offset": 4000, "length": 2304}),
        ((16, 4, 3, 3), {"offset": -1, "length": 2304}),
        ((1 << 62, 1, 1, 1), {"offset": 0, "length": 1 << 63}),
        ((1 << 40, 1 << 20, 1, 1), {"offset": 0, "length": 64}),
        ((16, 4, 3, 3), {"offset": "0x", "length": 2304}),
        ((16, 4, 3, 3), {"location": "../model.onnx_data", "offset": 0, "length": 2304}),
    ],
)
def test_weight_outside_of_its_file_raises_package_error(path, shape, where):
    conv = helper.make_node("Conv", ["x", "w"], ["y"])
    save(path, [conv], weights=[external("w", shape, **where)])
    with pytest.raises(PackageError) as error:
        read_stages(path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("shape", [(16, 4, 3, 4), (0, 4, 3, 3), (-16, -4, 3, 3), (2,) * 40])
def test_weight_of_another_size_than_its_shape_is_not_read(path, shape):
    save(path, [helper.make_node("Conv", ["x", "w"], ["y"])], weights=[external("w", shape, offset=0, length=2304)])
    read_stages(path)
    with pytest.raises(PackageError, match="is damaged at 'w'"):
        read_initializers(path)["w"].read()
    with pytest.raises(PackageError, match="is damaged at 'w'"):
        read_initializers(path)["w"].map()


def test_weight_is_mapped_as_onnx_reads_it():
    graph = onnx.load(VAE / "model.onnx")
    whole = next(each for each in graph.graph.initializer if each.name == "decoder.conv_in.weight")
    assert np.array_equal(read_initializers(VAE / "model.onnx")[whole.name].map(), numpy_helper.to_array(whole))


def constant(name, *values):
    return numpy_helper.from_array(np.array(values, np.int64), name)


HUGE = {
    "a value doubled forty times": (
        [helper.make_node("Shape", ["x"], ["s0"])]
        + [helper.make_node("Concat", [f"s{i}"] * 2, [f"s{i + 1}"], axis=0) for i in range(40)]
        + [helper.make_node("Reshape", ["x", "s40"], ["y"])]
    ),
    "a side multiplied without end": (
        [helper.make_node("Tile", [f"x{i}" if i else "x", "times"], [f"x{i + 1}"]) for i in range(4000)]
        + [helper.make_node("Relu", ["x4000"], ["y"])]
    ),
    "a division by zero": [
        helper.make_node("Gather", ["x", "none"], ["e"]),
        helper.make_node("Reshape", ["e", "zero"], ["y"]),
    ],
    "a rank without end": (
        [helper.make_node("Unsqueeze", [f"x{i}" if i else "x", "first"], [f"x{i + 1}"]) for i in range(2000)]
        + [helper.make_node("Relu", ["x2000"], ["y"])]
    ),
    "attributes that are missing": [helper.make_node("Transpose", ["x"], ["y"])],
    "inputs that are missing": [helper.make_node("Conv", ["x"], ["y"])],
}


@pytest.mark.parametrize("name", HUGE)
def test_shapes_of_a_hostile_graph_are_not_planned(path, name):
    none = numpy_helper.from_array(np.zeros(0, np.int64), "none")
    values = [constant("times", *[1 << 62] * 4), constant("zero", 0, -1), constant("first", 0), none]
    save(path, HUGE[name], values=values)
    with pytest.raises((UnsupportedGraph, PackageError)):
        estimate_stages(Graph(path=path, inputs=(("x", TensorInfo((1, 16, 8, 8))),)), cut=True)


def test_attribute_that_is_not_utf8_is_not_planned(path):
    save(path, [helper.make_node("Transpose", ["x"], ["y"], perm=[0, 1, 2, 3])])
    path.write_bytes(path.read_bytes().replace(b"perm", b"per\xff"))
    with pytest.raises(UnsupportedGraph):
        estimate_stages(Graph(path=path, inputs=(("x", TensorInfo((1, 16, 8, 8))),)), cut=True)


def test_stages_that_copy_the_graph_are_refused(path):
    """Each stage repeats a value that all read, so many small ones would take the square of the file's size."""
    shared = numpy_helper.from_array(np.zeros(4096, np.float32), "shared")
    nodes = [helper.make_node("Add", [f"x{i}" if i else "x", "shared"], [f"x{i + 1}"]) for i in range(1000)]
    nodes[-1].output[0] = "y"
    for index, node in enumerate(nodes):
        node.metadata_props.add(key="stage", value=str(index % 2))
    described = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, (1, 16, 8, 8)) for i in range(1, 1000)]
    save(path, nodes, values=[shared])
    model = onnx.load(path)
    model.graph.value_info.extend(described)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(PackageError, match="its stages together are larger than it is"):
        read_stages(path)


def test_fields_without_number_are_refused(path):
    path.write_bytes(b"\x3a\x84\x80\x80\x01" + b"\x0a\x00" * (1 << 20) + b"\x0a\x02\x12\x00")
    with pytest.raises(PackageError, match="more than 200000 entries"):
        read_stages(path)


def test_missing_weights_file_raises_package_error(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes((VAE / "model.onnx").read_bytes())
    weight = next(each for each in read_initializers(path).values() if each.external)
    with pytest.raises(PackageError, match="is damaged at"):
        weight.read()
    with pytest.raises(PackageError, match="is missing or cut at"):
        read_stages(path)
