"""MultiHeadAttention as elementary operators: what ONNX Runtime's own kernel of it gives, on the CPU."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from sdonnx_runtime.graphs.decomposed_attention import decompose_attention
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
