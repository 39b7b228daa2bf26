"""MultiHeadAttention that is rewritten when a graph is opened: what ONNX Runtime's own kernel of it gives."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from sdonnx_runtime.graphs.attention import decompose_attention, dequantize_scores
from sdonnx_runtime.graphs.onnx_proto import decode_model


def attention_model(shapes, inputs, **attributes):
    """A MultiHeadAttention, of ``inputs`` by their names."""
    node = helper.make_node("MultiHeadAttention", inputs, ["y"], domain="com.microsoft", **attributes)
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph([node], "attention", given, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9).SerializeToString()


def decompose(data, has_to=lambda _heads: True):
    model = decode_model(memoryview(data))
    nodes = decompose_attention(model.nodes, has_to)
    return model.encode_part("part", nodes, [], model.inputs, model.outputs)


def run(data, feeds):
    return onnxruntime.InferenceSession(data).run(None, feeds)[0]


def operators(data):
    return [node.op_type for node in onnx.load_from_string(data).graph.node]


@pytest.mark.parametrize(
    ("shapes", "attributes"),
    [
        ({"q": (2, 9, 32), "k": (2, 9, 32), "v": (2, 9, 32)}, {"num_heads": 4}),
        ({"q": (2, 9, 32), "k": (2, 77, 32), "v": (2, 77, 32)}, {"num_heads": 2}),
        ({"q": (2, 9, 32), "k": (2, 9, 32), "v": (2, 9, 32)}, {"num_heads": 4, "unidirectional": 1}),
        ({"q": (2, 9, 32), "k": (2, 9, 32), "v": (2, 9, 32), "bias": (1, 1, 9, 9)}, {"num_heads": 4}),
        ({"q": (1, 64, 512), "k": (1, 64, 512), "v": (1, 64, 512)}, {"num_heads": 1}),
    ],
)
def test_equals_the_kernel(shapes, attributes):
    inputs = ["q", "k", "v", *(["", "", "bias"] if "bias" in shapes else [])]
    whole = attention_model(shapes, inputs, **attributes)
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    decomposed = decompose(whole)
    assert "MultiHeadAttention" not in operators(decomposed)
    np.testing.assert_allclose(run(decomposed, feeds), run(whole, feeds), atol=5e-6)


@pytest.mark.parametrize(
    ("inputs", "attributes"),
    [
        (["q", "k", "v", "", "mask"], {"num_heads": 4}),
        (["q", "k", "v"], {"num_heads": 4, "scale": 0.5}),
    ],
)
def test_attention_with_more_than_a_bias_is_kept(inputs, attributes):
    shapes = {"q": (2, 9, 32), "k": (2, 9, 32), "v": (2, 9, 32), "mask": (2, 9)}
    assert operators(decompose(attention_model(shapes, inputs, **attributes))) == ["MultiHeadAttention"]


def test_attention_is_chosen_by_its_heads():
    shapes = {"q": (2, 9, 32), "k": (2, 9, 32), "v": (2, 9, 32)}
    whole = attention_model(shapes, ["q", "k", "v"], num_heads=4)
    assert operators(decompose(whole, lambda heads: heads == 1)) == ["MultiHeadAttention"]
    assert "MultiHeadAttention" not in operators(decompose(whole, lambda heads: heads == 4))


def quantized_attention(*, more_readers):
    """A MultiHeadAttention of quantized and dequantized queries and keys; the keys may be read once more."""
    rounded = [
        helper.make_node(op, [f"{name}{ends[0]}", "scale", "zero"], [f"{name}{ends[1]}"])
        for name in "qk"
        for op, ends in (("QuantizeLinear", ("", ".int8")), ("DequantizeLinear", (".int8", ".rounded")))
    ]
    attend = helper.make_node(
        "MultiHeadAttention", ["q.rounded", "k.rounded", "v"], ["y"], domain="com.microsoft", num_heads=4
    )
    more = [helper.make_node("Identity", ["k.rounded"], ["z"])] if more_readers else []
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (2, 9, 32)) for name in "qkv"]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "yz"[: 1 + more_readers]]
    constants = {"scale": np.array(0.5, np.float32), "zero": np.array(0, np.int8)}
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph([*rounded, attend, *more], "attention", ports, outputs, tensors)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9).SerializeToString()


@pytest.mark.parametrize("more_readers", [False, True])
def test_queries_and_keys_that_nothing_else_reads_are_not_rounded(more_readers):
    model = decode_model(memoryview(quantized_attention(more_readers=more_readers)))
    tensors = [each.encoded for each in model.initializers.values()]
    nodes = list(dequantize_scores(model.nodes))
    assert sum(node.op == "QuantizeLinear" for node in nodes) == more_readers
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((2, 9, 32), np.float32) for name in "qkv"}
    found = run(model.encode_part("part", nodes, tensors, model.inputs, model.outputs), feeds)
    keys = 0.5 * np.rint(feeds["k"] / 0.5) if more_readers else feeds["k"]
    plain = attention_model(dict.fromkeys("qkv", (2, 9, 32)), [*"qkv"], num_heads=4)
    np.testing.assert_allclose(found, run(plain, {**feeds, "k": keys}), atol=5e-6)
