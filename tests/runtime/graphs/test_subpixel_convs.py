"""Convolutions of upsampled feature maps as four smaller ones: against torch's of what torch upsamples."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from sdonnx_runtime.graphs.onnx_proto import decode_model
from sdonnx_runtime.graphs.subpixel_convs import find_upsamplings, split_upsampled_convs

RNG = np.random.default_rng(0)
WEIGHT, BIAS = RNG.standard_normal((5, 3, 3, 3)).astype(np.float32), RNG.standard_normal(5).astype(np.float32)
NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
SAME = {"pads": [1, 1, 1, 1]}
LARGER = "like"
CONSTANT = helper.make_node("Constant", [], ["half"], value=numpy_helper.from_array(np.array([0.5], np.float32)))


def make_model(*, by="scales", conv=SAME, resize=NEAREST, bias=True, more_readers=False, kernel=3, more=()):
    """Upsampling by scales of 2, or to the size of another input, and a convolution."""
    weight = WEIGHT if kernel == 3 else np.zeros((5, 3, kernel, kernel), np.float32)
    constants = {"weight": weight, "bias": BIAS, "scales": np.array([1, 1, 2, 2], np.float32)}
    sizes = [
        helper.make_node("Shape", ["x"], ["outer"], end=2),
        helper.make_node("Shape", [LARGER], ["inner"], start=2),
        helper.make_node("Concat", ["outer", "inner"], ["sizes"], axis=0),
    ]
    nodes = [
        *more,
        *(sizes if by == "sizes" else []),
        helper.make_node("Resize", ["x", "", "scales"] if by == "scales" else ["x", "", "", "sizes"], ["up"], **resize),
        helper.make_node("Conv", ["up", "weight", *(["bias"] if bias else [])], ["y"], **conv),
        *([helper.make_node("Relu", ["up"], ["z"])] if more_readers else []),
    ]
    ports = {"x": ["n", 3, "h", "w"], **({LARGER: ["n", 1, "h2", "w2"]} if by == "sizes" else {})}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ports.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "z")[: 1 + more_readers]]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, tensors)
    imports = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9).SerializeToString()


def rewrite(data, sizes):
    model = decode_model(memoryview(data))
    found = find_upsamplings(model, sizes)
    nodes = split_upsampled_convs(model.nodes, found, model.initializers)
    tensors = [each.encoded for each in model.initializers.values()]
    return model.encode_part("part", nodes, tensors, model.inputs, model.outputs)


def operators(data):
    return [node.op for node in decode_model(memoryview(data)).nodes]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("by", "sizes"), [("scales", {}), ("sizes", {"n": 2, "h": 5, "w": 4, "h2": 10, "w2": 8})])
def test_equals_torchs_upsampling_and_convolution(by, sizes, bias):
    x = RNG.standard_normal((2, 3, 5, 4)).astype(np.float32)
    rewritten = rewrite(make_model(by=by, bias=bias), sizes)
    assert "Resize" not in operators(rewritten)
    assert operators(rewritten).count("Conv") == 4
    upsampled = torch.nn.functional.interpolate(torch.from_numpy(x), scale_factor=2, mode="nearest")
    weight, added = torch.from_numpy(WEIGHT), torch.from_numpy(BIAS) if bias else None
    expected = torch.nn.functional.conv2d(upsampled, weight, added, padding=1).numpy()
    feeds = {"x": x, **({LARGER: np.zeros((2, 1, 10, 8), np.float32)} if by == "sizes" else {})}
    found = onnxruntime.InferenceSession(rewritten).run(None, feeds)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"by": "sizes"}, {"n": 1, "h": 5, "w": 4, "h2": 9, "w2": 8}),  # a skip connection of an odd height
        ({"by": "sizes"}, {"n": 1, "h": 5, "w": 4}),  # of any size
        ({"conv": {"pads": [1, 1, 1, 1], "strides": [2, 2]}}, {}),
        ({"conv": {"pads": [0, 0, 1, 1]}}, {}),
        ({"resize": {**NEAREST, "mode": "linear"}}, {}),
        ({"more_readers": True}, {}),
        ({"kernel": 5}, {}),
        ({"more": [CONSTANT]}, {}),  # whose shape isn't known, nor that of what comes after
    ],
)
def test_others_stay_as_they_are(changes, sizes):
    data = make_model(**changes)
    assert operators(rewrite(data, sizes)) == operators(data)
