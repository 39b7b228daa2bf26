"""Convolutions that pad circularly: against torch, and against ONNX Runtime on images that are padded before."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from sdonnx_runtime.graphs.partition import read_stages
from support.lowering import lowered
from support.tiling import pad_along

IMAGE = np.random.default_rng(5).standard_normal((2, 3, 6, 8)).astype(np.float32)
PADS = {"around": ([1, 1, 1, 1], 1), "wide": ([2, 2, 2, 2], 1), "below and right": ([0, 0, 1, 1], 2)}
"""Top, left, bottom, right; stride."""


def save(path, nodes, weights, x, *, opset):
    """A graph of ``nodes``, from x to y, in a file."""
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    ports = [helper.make_tensor_value_info(name, kind, [None] * 4) for name in "xy"]
    tensors = [numpy_helper.from_array(each, name) for name, each in weights.items()]
    graph = helper.make_graph(nodes, "graph", ports[:1], ports[1:], tensors)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)


def run(model, x):
    session = onnxruntime.InferenceSession(model)
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("axes", ["x", "y", "xy"])
@pytest.mark.parametrize("pads", PADS)
@pytest.mark.parametrize(("opset", "has_wrap"), [(20, True), (20, False), (14, True)])
def test_a_convolution_is_torchs(opset, has_wrap, pads, axes, tmp_path):
    """By a Pad where there is its mode wrap, elsewhere by slices."""
    (top, left, bottom, right), stride = PADS[pads]
    weight = np.random.default_rng(6).standard_normal((4, 3, 3, 3)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=PADS[pads][0], strides=[stride, stride])
    save(tmp_path / "model.onnx", [node], {"w": weight}, IMAGE, opset=opset)
    (stage,) = read_stages(tmp_path / "model.onnx", cut=False, circular=axes, has_wrap=has_wrap).stages
    assert ("Pad" in {each.op for each in stage.nodes}) == (opset > 18 and has_wrap)
    padded = pad_along(axes, torch.from_numpy(IMAGE), left, right, top, bottom)
    wanted = torch.nn.functional.conv2d(padded, torch.from_numpy(weight), stride=stride).numpy()
    found = run(stage.model, IMAGE)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(found - run(tmp_path / "model.onnx", IMAGE)).max() > 0.1


@pytest.mark.parametrize("has_wrap", [True, False])
def test_an_int8_convolution_of_channels_last(has_wrap, tmp_path):
    """Bit by bit that of an image that is padded before."""
    rng = np.random.default_rng(7)
    x = rng.integers(0, 256, (1, 5, 7, 8)).astype(np.uint8)
    scale, zero = np.float32(0.1), np.uint8(100)
    weights = {"s": scale, "z": zero, "w": rng.integers(-99, 99, (4, 8, 3, 3)).astype(np.int8), "wz": np.int8(0)}
    inputs = ["x", "s", "z", "w", "s", "wz", "s", "z"]
    for name, pads in (("before", [0] * 4), ("model", [1] * 4)):
        attributes = {"pads": pads, "channels_last": 1, "domain": "com.microsoft"}
        node = helper.make_node("QLinearConv", inputs, ["y"], **attributes)
        save(tmp_path / f"{name}.onnx", [node], {key: np.asarray(each) for key, each in weights.items()}, x, opset=20)
    wanted = run(tmp_path / "before.onnx", np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap"))
    (stage,) = read_stages(tmp_path / "model.onnx", cut=False, circular="xy", has_wrap=has_wrap).stages
    np.testing.assert_array_equal(run(stage.model, x), wanted)
    assert not np.array_equal(run(tmp_path / "model.onnx", x), wanted)


@pytest.mark.parametrize("pads", PADS)
def test_a_convolution_of_channels_last_that_only_cuda_has(pads, tmp_path):
    (top, left, bottom, right), stride = PADS[pads]
    x, weight = IMAGE.transpose(0, 2, 3, 1), np.random.default_rng(6).standard_normal((4, 3, 3, 3)).astype(np.float32)
    attributes = {"pads": PADS[pads][0], "strides": [stride, stride], "domain": "com.microsoft"}
    node = helper.make_node("NhwcConv", ["x", "w"], ["y"], **attributes)
    save(tmp_path / "model.onnx", [node], {"w": weight.transpose(0, 2, 3, 1)}, x, opset=20)
    (stage,) = read_stages(tmp_path / "model.onnx", cut=False, circular="xy", has_wrap=False).stages
    model = lowered(ir.from_proto(onnx.load_from_string(stage.model)), emulate=False)
    padded = pad_along("xy", torch.from_numpy(IMAGE), left, right, top, bottom)
    wanted = torch.nn.functional.conv2d(padded, torch.from_numpy(weight), stride=stride).numpy()
    found = run(ir.to_proto(model).SerializeToString(), x)
    np.testing.assert_allclose(found, wanted.transpose(0, 2, 3, 1), atol=1e-4)
