"""Weights that sessions on WebGPU share, in software: where they are, and that results are those of unshared ones."""

import numpy as np
import onnx_ir as ir
import pytest
from support import webgpu

GRAPH = """<ir_version: 9, opset_import: ["" : 20]>
g (float[1, 256, 4, 4] x) => (float[1, 128, 4, 4] y) {{
    c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, kernel)
    t = Transpose <perm = [0, 2, 3, 1]> (c)
    m = MatMul (t, linear)
    a = {activation} (m)
    y = Transpose <perm = [0, 3, 1, 2]> (a)
}}"""


@pytest.fixture
def paths(tmp_path):
    """Two graphs over one weights file: a convolution's kernel and a linear layer's weight."""
    random = np.random.default_rng(0)
    shapes = {"kernel": (256, 256, 3, 3), "linear": (256, 128)}
    weights = {name: random.standard_normal(shape, np.float32) / 32 for name, shape in shapes.items()}
    made = []
    for activation in ("Sigmoid", "Tanh"):
        model = ir.from_onnx_text(
            GRAPH.format(activation=activation),
            initializers=[ir.tensor(value, name=name) for name, value in weights.items()],
        )
        ir.save(model, tmp_path / f"{activation}.onnx", external_data="weights")
        made.append(tmp_path / f"{activation}.onnx")
    return made


def test_sessions_share_all_weights_but_kernels(on_webgpu, paths):
    x = np.random.default_rng(1).standard_normal((1, 256, 4, 4), np.float32)
    own, shared, given = on_webgpu(webgpu.run_shared, paths, {"x": x})
    assert [(name, times) for (name, _), times in given.items()] == [("linear", 2)]
    assert not np.array_equal(own[0]["y"], own[1]["y"])
    for each, other in zip(own, shared, strict=True):
        np.testing.assert_array_equal(each["y"], other["y"])
