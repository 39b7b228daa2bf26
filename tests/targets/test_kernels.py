"""Every node of every graph has a kernel where the graph is made to run, by ONNX Runtime's own tables.

Devices that are not here are not run here: see tests/support/kernels.py for what is compared.
"""

from functools import cache, partial

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.torch import save_file
from sdonnx_export.models.components import COMPONENTS, build, components_in, layer_shapes
from sdonnx_export.operators.int8 import Int8Operators
from sdonnx_export.operators.quantized import Range
from support.checkpoints import open_with
from support.families import unet
from support.ip_adapters import image_encoder, ip_adapter, save_ip_adapter
from support.kernels import CONTRIB, CPU, CUDA, DIRECTML, NEWEST, OLDEST, WEBGPU, assign, casts_of_weights
from support.published import SHALLOW, shallow_checkpoint

PROVIDERS = {"generic": (CPU, CUDA, DIRECTML, WEBGPU), "cuda": (CUDA,), "directml": (DIRECTML,), "webgpu": (WEBGPU,)}
OF_IDS_AND_SIZES = {
    CUDA: set(),
    DIRECTML: set(),
    WEBGPU: {"ArgMax", "Cast", "Concat", "Div", "Equal", "Unsqueeze"},
}
"""What the CPU computes for a device: token ids and sizes, of which WebGPU has no 64-bit integers."""
VARIANTS = {
    "unet": [{"token_downsampling": True, "controlled": True}],
    "vae_decoder": [{"tiled": True}],
    "vae_encoder": [{"tiled": True}],
}
LATER = {(CUDA, "1.21.0"): {"AveragePool", "Equal", "Resize"}}
"""What CUDA has had kernels for since 1.25 alone (microsoft/onnxruntime#27415); before, the CPU runs them."""
REWRITTEN = "heads of 512"
"""What of a generic graph is rewritten as it is opened on WebGPU."""


@cache
def part_of(family, name):
    return shallow_checkpoint(family).parts[COMPONENTS[name].part]


def graphs_of(family, precision, target):
    """The graphs of a family's components: plain, and for Stable Diffusion 1 those that have other operators."""
    for name in components_in(shallow_checkpoint(family)):
        make = partial(build, name, part_of(family, name), precision, target=target)
        yield name, make()
        for options in VARIANTS.get(name, ()) if family == "sd1" else ():
            yield f"{name} {options}", make(**options)


@pytest.mark.parametrize("target", PROVIDERS)
@pytest.mark.parametrize("family", SHALLOW)
def test_every_node_has_a_kernel(family, target):
    for name, model in graphs_of(family, precision_of(target), target):
        check(name, model, target)


@pytest.mark.parametrize("target", PROVIDERS)
def test_so_it_has_in_adapters_and_upscalers(target, tmp_path):
    image_encoder().save_pretrained(tmp_path / "image_encoder")
    for plus in (False, True):
        path = save_ip_adapter(ip_adapter(unet(), plus=plus), tmp_path / f"{plus}.safetensors")
        part = open_with(path, image_encoder=str(tmp_path / "image_encoder")).parts["ip_adapter"]
        check(f"ip_adapter {plus}", build("ip_adapter", part, precision_of(target), target=target), target)
    from support.upscalers import random_upscaler  # which skips where there is no spandrel

    for kind in ("ESRGAN", "Real-ESRGAN x2", "Compact"):
        save_file(random_upscaler(kind).state_dict(), tmp_path / f"{kind}.safetensors")
        part = open_with(tmp_path / f"{kind}.safetensors").parts["upscaler"]
        check(kind, build("upscaler", part, precision_of(target), target=target), target)


def test_so_it_has_in_8_bits_on_the_cpu():
    for name in ("unet", "vae_decoder"):
        part = part_of("sd1", name)
        measured = Range(scale=1.0, zero=128)
        ranges = {f"{layer}{end}": measured for layer in layer_shapes(name, part.config) for end in ("", ".output")}
        model = build(name, part, "int8", partial(Int8Operators, ranges=ranges))
        assert assign(model, CPU, OLDEST[CPU]).missing == [], name


X = ("float16", 1, 4, 4, 6)
SEQUENCE = ("float16", 1, 4, 16)
NORM = {"groups": 3, "activation": 1}
REFUSED = {
    "odd groups": (CUDA, "GroupNorm", {**NORM, "groups": 2}, [X, ("float32", 6), ("float32", 6)]),
    "channels first": (CUDA, "GroupNorm", {**NORM, "channels_last": 0}, [X, ("float32", 6), ("float32", 6)]),
    "gamma in float16": (CUDA, "GroupNorm", NORM, [X, ("float16", 6), ("float16", 6)]),
    "another width": (CUDA, "BiasSplitGelu", {}, [("float16", 1, 4, 1280), ("float16", 1280)]),
    "a computed weight": (CUDA, "NhwcConv", {}, [X, X]),
    "a bias for all heads": (
        *(DIRECTML, "MultiHeadAttention", {"num_heads": 2}),
        [SEQUENCE, SEQUENCE, SEQUENCE, None, None, ("float16", 1, 1, 4, 4)],
    ),
    "a causal mask": (DIRECTML, "MultiHeadAttention", {"num_heads": 2, "unidirectional": 1}, [SEQUENCE] * 3),
    "a wide head": (WEBGPU, "MultiHeadAttention", {"num_heads": 1}, [("float32", 1, 4, 512)] * 3),
}
"""Provider, operator, attributes and inputs, of which vectors are constants."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_kernel_refuses_is_found(case):
    provider, op_type, attributes, given = REFUSED[case]
    values = [each and made(index, *each) for index, each in enumerate(given)]
    node = ir.node(op_type, values, attributes, domain=CONTRIB)
    present = [each for each in values if each is not None]
    constants = [each for each in present if each.const_value is not None]
    inputs = [each for each in present if each.const_value is None]
    graph = ir.Graph(inputs, node.outputs, nodes=[node], initializers=constants, opset_imports={"": 20, CONTRIB: 1})
    found = assign(ir.Model(graph, ir_version=9), provider)
    assert found.missing == []
    assert len(found.broken) == 1


def made(index, dtype, *shape):
    """An input or, of one axis, a constant."""
    kind = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
    constant = ir.tensor(np.zeros(shape, dtype), name=f"{index}") if len(shape) == 1 else None
    return ir.Value(name=f"{index}", type=kind, shape=ir.Shape(shape), const_value=constant)


def precision_of(target):
    return "fp32" if target == "generic" else "fp16"


def check(name, model, target):
    """Where the target runs, in the oldest release and the newest, all is computed that is not ids or sizes."""
    if target != "generic":
        assert casts_of_weights(model) == [], name
    for provider in PROVIDERS[target]:
        for release in {OLDEST[provider], NEWEST[provider]}:
            where, found = f"{name} on {provider} {release}", assign(model, provider, release)
            missing, on_cpu = (
                {operator(each) for each in nodes} - LATER.get((provider, release), set())
                for nodes in (found.missing, found.on_cpu)
            )
            broken = [each for each in found.broken if not (target == "generic" and REWRITTEN in each)]
            assert not missing, where
            assert not broken, where
            assert on_cpu <= OF_IDS_AND_SIZES.get(provider, set()), where


def operator(shown):
    return shown.split(" (")[0]
