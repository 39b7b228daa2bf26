"""Linear layers whose outputs are split in half, as two layers: against torch's gated linear unit."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from sdonnx_runtime.graphs.onnx_proto import decode_model
from sdonnx_runtime.graphs.split_linears import split_linears

RNG = np.random.default_rng(0)
WEIGHT, BIAS = RNG.standard_normal((6, 8)).astype(np.float32), RNG.standard_normal(8).astype(np.float32)
STORED = {
    "fp32": ({"weight": WEIGHT}, []),
    "fp16": (
        {"stored": WEIGHT.astype(np.float16)},
        [helper.make_node("Cast", ["stored"], ["weight"], to=TensorProto.FLOAT)],
    ),
}


def make_model(precision, *, readers=1, axis=-1, halves=None):
    """A linear layer whose weight is stored so, and a split of its outputs, one half of which the sigmoid gates."""
    constants, nodes = STORED[precision]
    nodes = [
        *nodes,
        helper.make_node("MatMul", ["x", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        helper.make_node("Split", ["sum"], ["hidden", "gate"], axis=axis, num_outputs=2)
        if halves is None
        else helper.make_node("Split", ["sum", "halves"], ["hidden", "gate"], axis=axis),
        helper.make_node("Sigmoid", ["gate"], ["gate.open"]),
        helper.make_node("Mul", ["hidden", "gate.open"], ["y"]),
        *(helper.make_node("Identity", ["sum"], [f"z{index}"]) for index in range(1, readers)),
    ]
    ports = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 6])]
    names = ["y", *(f"z{index}" for index in range(1, readers))]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    tensors = [
        numpy_helper.from_array(value, name)
        for name, value in {**constants, "bias": BIAS, "halves": np.array(halves or [4, 4])}.items()
    ]
    graph = helper.make_graph(nodes, "graph", ports, outputs, tensors)
    imports = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9).SerializeToString()


def rewrite(data):
    model = decode_model(memoryview(data))
    nodes = split_linears(model.nodes, model.initializers)
    tensors = [each.encoded for each in model.initializers.values()]
    return model.encode_part("part", nodes, tensors, model.inputs, model.outputs)


def split_inputs(data):
    model = decode_model(memoryview(data))
    return {node.inputs[0] for node in model.nodes if node.op == "Split"}, set(model.initializers)


@pytest.mark.parametrize("precision", STORED)
def test_equals_torchs_gated_linear_unit(precision):
    x = RNG.standard_normal((2, 4, 6)).astype(np.float32)
    rewritten = rewrite(make_model(precision))
    split, initializers = split_inputs(rewritten)
    assert split <= initializers
    weight = WEIGHT.astype(np.float16 if precision == "fp16" else np.float32).astype(np.float32)
    sums = torch.nn.functional.linear(torch.from_numpy(x), torch.from_numpy(weight.T.copy()), torch.from_numpy(BIAS))
    expected = torch.nn.functional.glu(sums).numpy()
    found = onnxruntime.InferenceSession(rewritten).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("changes", [{"readers": 2}, {"axis": 1}, {"halves": [2, 6]}])
def test_others_stay_as_they_are(changes):
    data = make_model("fp32", **changes)
    assert [node.op for node in decode_model(memoryview(rewrite(data))).nodes] == [
        node.op for node in decode_model(memoryview(data)).nodes
    ]
