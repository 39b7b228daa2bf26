"""ONNX Runtime's own operators, written out for the CPU, equal torch; float16 is rounded where it was computed."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.kernels import CONTRIB
from support.lowering import lowered
from support.sessions import run_as_written
from torch.nn import functional as F


def model_of(op_type, x, weights, **attributes):
    """A graph of one of ONNX Runtime's operators over float16, between casts of its float32 input and output."""
    made = [ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(x.shape))]
    initializers = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(data.dtype)), const_value=ir.tensor(data))
        for name, data in weights.items()
    ]
    nodes = [ir.node("Cast", made, {"to": ir.DataType.FLOAT16})]
    nodes.append(ir.node(op_type, [nodes[0].outputs[0], *initializers], attributes, domain=CONTRIB))
    nodes.append(ir.node("Cast", nodes[1].outputs, {"to": ir.DataType.FLOAT}))
    y = nodes[-1].outputs[0]
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(made, [y], nodes=nodes, initializers=initializers, opset_imports={"": 20, CONTRIB: 1})
    return ir.Model(graph, ir_version=9)


def half(rng, *shape):
    return rng.standard_normal(shape, np.float32).astype(np.float16)


def to_torch(data):
    return torch.from_numpy(np.asarray(data, np.float32))


def nhwc(y):
    return y.permute(0, 2, 3, 1)


def conv_case(rng):
    x, weight, bias = half(rng, 2, 5, 6, 8), half(rng, 12, 3, 3, 8), half(rng, 12)
    expected = nhwc(F.conv2d(nchw(x), nchw(weight), to_torch(bias), stride=2, padding=1))
    attributes = {"strides": [2, 2], "pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    return "NhwcConv", x, {"weight": weight, "bias": bias}, attributes, expected


def nchw(data):
    return to_torch(data).permute(0, 3, 1, 2)


def norm_case(rng, *, channels_last):
    x = half(rng, 2, 5, 6, 8) if channels_last else half(rng, 2, 8, 5, 6)
    gamma, beta = rng.standard_normal(8, np.float32), rng.standard_normal(8, np.float32)
    whole = nchw(x) if channels_last else to_torch(x)
    expected = F.silu(F.group_norm(whole, 4, to_torch(gamma), to_torch(beta), eps=1e-3))
    attributes = {"groups": 4, "epsilon": 1e-3, "activation": 1, "channels_last": int(channels_last)}
    return "GroupNorm", x, {"g": gamma, "b": beta}, attributes, nhwc(expected) if channels_last else expected


def geglu_case(rng):
    x, bias = half(rng, 2, 7, 24), half(rng, 24)
    hidden, gate = (to_torch(x) + to_torch(bias)).chunk(2, dim=-1)
    return "BiasSplitGelu", x, {"bias": bias}, {}, hidden * F.gelu(gate)


CASES = {
    "NhwcConv": conv_case,
    "GroupNorm NHWC": lambda rng: norm_case(rng, channels_last=True),
    "GroupNorm NCHW": lambda rng: norm_case(rng, channels_last=False),
    "BiasSplitGelu": geglu_case,
}


@pytest.mark.parametrize("case", CASES)
def test_an_operator_of_onnx_runtime_equals_torch(case, rng):
    op_type, x, weights, attributes, expected = CASES[case](rng)
    model = model_of(op_type, x, weights, **attributes)
    feed = x.astype(np.float32)
    exact = run_as_written(lowered(model, emulate=False), {"x": feed})[0]
    np.testing.assert_allclose(exact, expected.numpy(), atol=1e-5, rtol=1e-5)
    rounded = run_as_written(lowered(model, emulate=True), {"x": feed})[0]
    np.testing.assert_array_equal(rounded, exact.astype(np.float16).astype(np.float32))
    assert (rounded != exact).any()


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_what_float16_does_not_hold_becomes_infinite(level):
    x = np.array([[[300.0, 255.0, 1.0, 1.0]]], np.float32)
    weights = {"bias": np.array([0, 0, 255, 255], np.float16)}
    model = model_of("BiasSplitGelu", x, weights)  # 300 * 256 and 255 * 256
    assert run_as_written(lowered(model, emulate=False), {"x": x}, level)[0].tolist() == [[[76800.0, 65280.0]]]
    assert run_as_written(lowered(model, emulate=True), {"x": x}, level)[0].tolist() == [[[np.inf, 65280.0]]]
