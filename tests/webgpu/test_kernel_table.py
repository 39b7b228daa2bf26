"""The table of kernels says of WebGPU what ONNX Runtime does."""

import onnx_ir as ir
import pytest
from sdonnx_export.models.components import build
from support import families, webgpu
from support.graphs import as_part
from support.kernels import WEBGPU, assign

GRAPHS = {
    "unet": families.unet,
    "text_encoder": families.clip,
    "text_encoder_2": lambda: families.open_clip(projected=True, eos_token_id=49407),
}


@pytest.mark.parametrize("target", ["generic", "webgpu"])
@pytest.mark.parametrize("name", GRAPHS)
def test_the_cpu_gets_the_nodes_that_have_no_kernel(name, target, on_webgpu):
    model = build(name, as_part(GRAPHS[name]()), "fp32", target=target)
    predicted = assign(model, WEBGPU)
    assert predicted.missing == []
    found = on_webgpu(webgpu.operators_on_cpu, ir.to_proto(model).SerializeToString())
    assert found == sorted(each.split(" (")[0].split(".")[-1] for each in predicted.on_cpu)
