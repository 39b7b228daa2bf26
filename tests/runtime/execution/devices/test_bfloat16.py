"""Graphs that are opened in bfloat16 on OpenVINO: which weights they have so, and what they compute."""

import logging
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from sdonnx_runtime.execution.devices.fitting import fit_to_bfloat16
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.graphs.bfloat16 import BFLOAT16, find_weights
from sdonnx_runtime.graphs.initializers import FLOAT, TensorData, read_initializers
from sdonnx_runtime.graphs.onnx_proto import ValueInfo, decode_model, make_node

FEEDS = {
    "unet": {
        "sample": np.random.default_rng(0).standard_normal((1, 4, 16, 16), np.float32),
        "timestep": np.array(801, np.float32),
        "encoder_hidden_states": np.random.default_rng(1).standard_normal((2, 77, 64), np.float32),
    },
    "vae_decoder": {"latent_sample": np.random.default_rng(2).standard_normal((1, 4, 16, 16), np.float32)},
    "text_encoder": {"input_ids": np.arange(77)[None]},
}


@pytest.fixture(scope="module")
def precise(checkpoint, export_once, tmp_path_factory):
    """A package in fp16."""
    return export_once(checkpoint, tmp_path_factory.mktemp("packages") / "tiny-fp16", precision="fp16")


def decibels(found, expected):
    return 20 * np.log10(np.abs(expected).max() / max(np.sqrt(np.square(found - expected).mean()), 1e-9))


def weight_types(model):
    """What the weights that a graph multiplies by are cast to."""
    cast = {node.outputs[0]: node for node in model.nodes if node.op == "Cast"}
    read = {node.inputs[1] for node in model.nodes if node.op in ("Conv", "MatMul")}
    return {cast[name].attributes["to"] for name in read}


@pytest.mark.parametrize("part", FEEDS)
def test_no_weight_that_is_multiplied_by_is_widened(precise, part):
    path = precise / part / "model.onnx"
    assert weight_types(decode_model(memoryview(path.read_bytes()))) == {FLOAT}
    assert weight_types(decode_model(memoryview(fit_to_bfloat16(path, None, {})))) == {BFLOAT16}


@pytest.mark.parametrize("part", FEEDS)
def test_outputs_are_those_of_float32_but_for_the_rounding(precise, part, openvino):
    path = precise / part / "model.onnx"
    expected = Session(path, device="cpu").run(FEEDS[part])
    for compute, least in (("f32", 90), ("bf16", 36)):
        found = Session(path, device="openvino", compute=compute, threads=1).run(FEEDS[part])
        for name, values in expected.items():
            assert found[name].dtype == values.dtype
            assert decibels(found[name], values) > least


def test_nothing_is_upsampled_or_split_when_it_runs(precise):
    """But weights, which OpenVINO folds."""
    for part in ("unet", "vae_decoder"):
        path = precise / part / "model.onnx"
        sizes = {"states": 1, "batch": 2, "height": 16, "width": 16, "tokens": 77}
        model = decode_model(memoryview(fit_to_bfloat16(path, None, sizes)))
        folded = {*model.initializers}
        for node in model.nodes:  # in the order of running
            folded |= {*node.outputs} if all(name in folded for name in node.inputs if name) else set()
        assert not [
            node.outputs for node in model.nodes if node.op in ("Resize", "Split") and node.outputs[0] not in folded
        ]


@pytest.mark.parametrize("precision", ["int4", "int8-weights"])
def test_weights_that_are_dequantized(precision, checkpoint, export_once, tmp_path_factory, openvino):
    """int4 has two to a byte."""
    package = export_once(checkpoint, tmp_path_factory.mktemp("packages") / f"tiny-{precision}", precision=precision)
    path, feeds = package / "unet" / "model.onnx", FEEDS["unet"]
    expected = Session(path, device="cpu").run(feeds)["out_sample"]
    found = Session(path, device="openvino", compute="bf16", threads=1).run(feeds)["out_sample"]
    assert decibels(found, expected) > 30


def test_weights_whose_files_are_links(precise, tmp_path, openvino, caplog):
    """As in the Hub's cache, under other names."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "unet").mkdir()
    for index, name in enumerate(("model.onnx", "model.onnx_data")):
        shutil.copy(precise / "unet" / name, tmp_path / "blobs" / f"blob{index}")
        (tmp_path / "unet" / name).symlink_to(tmp_path / "blobs" / f"blob{index}")
    caplog.set_level(logging.INFO)
    paths = [folder / "unet" / "model.onnx" for folder in (precise, tmp_path)]
    outputs = [Session(each, device="openvino", compute="bf16", threads=1).run(FEEDS["unet"]) for each in paths]
    np.testing.assert_array_equal(*(each["out_sample"] for each in outputs))
    assert "cast to bfloat16 by the device" not in caplog.text


def test_a_graph_that_is_quantized_stays_as_it_is(precise):
    graph = decode_model(memoryview((precise / "unet" / "model.onnx").read_bytes()))
    quantize = make_node("QuantizeLinear", ["sample", "scale", "zero"], "quantized", stage="")
    assert find_weights(graph)
    assert not find_weights(replace(graph, nodes=(*graph.nodes, quantize)))


def other_model(*nodes):
    """A graph that another program could have written, with a weight in float16."""
    weight = onnx.numpy_helper.from_array(np.ones((4, 4), np.float16), "weight")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, [4, 4]) for name in ("x", "y"))
    graph = onnx.helper.make_graph(nodes, "other", [x], [y], [weight])
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(made, full_check=True)
    return decode_model(memoryview(made.SerializeToString()))


def test_a_graph_that_is_written_in_float16_stays_as_it_is():
    product = onnx.helper.make_node("MatMul", ["x", "weight"], ["product"])
    power = onnx.helper.make_node("Pow", ["product", "product"], ["y"])
    assert find_weights(other_model(product, power)) == set()


def test_outputs_keep_their_order_and_types(precise):
    path = precise / "text_encoder" / "model.onnx"
    before, after = (decode_model(memoryview(each)) for each in (path.read_bytes(), fit_to_bfloat16(path, None, {})))
    assert len(before.outputs) > 1
    described = [[(name, ValueInfo.decode(each)) for name, each in graph.outputs.items()] for graph in (before, after)]
    assert described[0] == described[1]


@pytest.mark.parametrize("layer", ["conv_in", "up_blocks.0.upsamplers.0.conv", "ff.net.0.proj"])
def test_weights_that_replace_those_of_the_file(precise, openvino, layer):
    """Also those of which the rewritten graph has sums or halves."""
    path, feeds = precise / "unet" / "model.onnx", FEEDS["unet"]
    weights = {name: each for name, each in read_initializers(path).items() if name.endswith(f"{layer}.weight")}
    changed = {name: TensorData.of(-each.read(), each.data_type) for name, each in weights.items()}
    assert changed
    plain = Session(path, device="cpu").run(feeds)["out_sample"]
    expected = Session(path, device="cpu", weights=changed).run(feeds)["out_sample"]
    found = Session(path, device="openvino", compute="bf16", threads=1, weights=changed).run(feeds)["out_sample"]
    assert decibels(found, expected) > 30 > decibels(plain, expected)
