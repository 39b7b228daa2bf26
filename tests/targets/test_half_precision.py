"""Graphs made for a GPU compute what the generic ones do; in float16, what rounding leaves of it.

ONNX Runtime's type and shape inference accepts them as they are; the CPU runs them as `support.lowering` writes them.
"""

import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel
from sdonnx_export.models.components import build
from support import families
from support.controls import adapter, controlnet
from support.graphs import as_part
from support.lowering import lowered
from support.reference import relative_error
from support.sessions import open_as_written, run_as_written

TINY = {
    "unet": families.unet,
    "unet of sdxl": lambda: families.xl_unet(transformer_layers_per_block=(1, 1, 2)),
    "text_encoder": families.clip,
    "text_encoder_2": lambda: families.open_clip(projected=True, eos_token_id=49407),
    "vae_decoder": families.vae,
    "vae_encoder": families.vae,
    "vae_decoder of taesd": families.tiny_vae,
    "controlnet": lambda: controlnet(families.unet()),
    "adapter": adapter,
}
"""A component, by its name and what it is of."""
SIZES = {"tokens": 77, "pooled": 64, "ids": 6, "height": 16, "width": 24, "image_height": 128, "image_width": 192}
MOST = {"fp32": 1e-5, "fp16": 1e-2}
"""Relative errors."""
CASES = [
    *(("cuda", key, "fp16") for key in ("unet of sdxl", "vae_decoder of taesd", "controlnet", "adapter")),
    *(("directml", key, "fp16") for key in TINY),
    *(("webgpu", key, "fp16") for key in ("unet", "text_encoder")),
    *(("directml", key, "fp32") for key in ("unet", "text_encoder", "vae_decoder")),
    ("webgpu", "text_encoder", "fp32"),
]
"""Target, component and precision; `test_cuda_graphs` and `test_half_precision_graphs` have more of CUDA and WebGPU."""


@pytest.fixture(scope="module")
def tiny():
    """A component's name, part, inputs and what the generic graph makes of them, by its key in TINY; made once."""
    made = {}

    def get(key):
        if key not in made:
            name, part = key.split()[0], as_part(TINY[key]())
            model = build(name, part, "fp32")
            feeds = feeds_of(model)
            made[key] = name, part, feeds, run_as_written(model, feeds)
        return made[key]

    return get


def feeds_of(model):
    """Random inputs; tokens are a start, words and an end."""
    rng = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.inputs:
        shape = [axis if isinstance(axis, int) else SIZES.get(str(axis), 2) for axis in value.shape]
        if value.dtype == ir.DataType.INT64:
            feeds[value.name] = np.full(shape, 49407)
            feeds[value.name][:, 0], feeds[value.name][:, 1:9] = 49406, rng.integers(320, 40000, (shape[0], 8))
        else:
            feeds[value.name] = np.float32(417) if value.name == "timestep" else rng.standard_normal(shape, np.float32)
    return feeds


@pytest.mark.parametrize(("target", "key", "precision"), CASES)
def test_a_graph_of_a_target_computes_what_the_generic_one_does(target, key, precision, tiny):
    name, part, feeds, expected = tiny(key)
    model = build(name, part, precision, target=target)
    assert find_error(model) in (None, NoKernel)
    found = run_as_written(lowered(model, emulate=True), feeds)
    error = max(relative_error(*pair) for pair in zip(found, expected, strict=True))
    assert error < MOST[precision]
    if precision == "fp16" and name != "adapter":
        assert error > 1e-4


def find_error(model):
    """The kind of error that ONNX Runtime's CPU provider opens a model with; None if it does open it."""
    try:
        open_as_written(model)
    except Exception as error:
        return type(error)
    return None
