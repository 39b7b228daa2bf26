"""Adapters merged into graphs for CUDA: kernels (out, kH, kW, in), 1x1 convolutions as matrices, all in float16."""

import copy

import numpy as np
import onnx_ir as ir
import pytest
from sdonnx_export.models.components import build
from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.adapters.merging import match_loras, merge_lora
from support import families
from support import lora as lora_fixture
from support.graphs import as_part, run, saved, unet_feeds, unet_reference
from support.lowering import lowered

import sdonnx

LAYERS = {
    "linear": "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2",
    "1x1": "down_blocks.0.attentions.0.proj_in",
    "3x3": "down_blocks.0.resnets.0.conv1",
    "3x3 of stride 2": "down_blocks.0.downsamplers.0.conv",
}
NORMS = ("down_blocks.0.resnets.0.norm1", "down_blocks.0.attentions.0.transformer_blocks.0.norm1")


@pytest.fixture(scope="module")
def pipe():
    return families.sd1()


@pytest.fixture(scope="module")
def graphs(pipe, tmp_path_factory):
    """The U-Net's graphs for every device and for CUDA, in float16, and for CUDA in float32."""
    part, paths = as_part(pipe.unet), []
    for target, precision in (("generic", "fp16"), ("cuda", "fp16"), ("cuda", "fp32")):
        model = build("unet", part, precision, target=target)
        paths.append(saved(model, tmp_path_factory.mktemp(f"{target}-{precision}")))
    return paths


def find_deltas(pipe, path):
    components = {"unet": pipe.unet.state_dict().keys(), "text_encoder": pipe.text_encoder.state_dict().keys()}
    return match_loras("the model", components, [Lora(path=path, scale=0.7)]).deltas["unet"]


def as_in_checkpoint(data, shape):
    """A merged weight of a graph for CUDA in the checkpoint's layout."""
    if len(shape) == 4:
        return data.T.reshape(shape) if data.ndim == 2 else data.transpose(0, 3, 1, 2)
    return data.T if len(shape) == 2 else data


@pytest.mark.parametrize("kind", [*lora_fixture.MODULES, "norm"])
def test_weights_are_merged_as_into_a_graph_for_every_device(pipe, graphs, kind, tmp_path):
    state = {}
    for seed, name in enumerate(NORMS if kind == "norm" else LAYERS.values()):
        module = lora_fixture.lycoris(copy.deepcopy(pipe.unet.get_submodule(name)), kind, seed)
        named = {f"lora_unet_{name.replace('.', '_')}.{key}": each for key, each in module.state_dict().items()}
        state |= {name: each.detach().clone() for name, each in named.items()}
    deltas = find_deltas(pipe, lora_fixture.save(state, tmp_path / "a.safetensors"))
    generic, cuda = (merge_lora(graph, deltas) for graph in graphs[:2])
    assert generic.keys() == cuda.keys() == deltas.keys()
    shapes = {name: tuple(value.shape) for name, value in pipe.unet.state_dict().items()}
    for name, merged in cuda.items():
        found = as_in_checkpoint(merged.data, shapes[name])
        wanted = generic[name].data
        wanted = wanted.T if wanted.ndim == 2 else wanted
        if wanted.ndim > 1:
            assert found.dtype == wanted.dtype == np.float16
            np.testing.assert_array_equal(found, wanted)
        else:  # of float32, and rounded once more where layers compute in float16
            np.testing.assert_allclose(found.astype(np.float32), wanted, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["locon", "dora of inputs", "norm"])
def test_a_unet_with_an_adapter_is_that_with_lycoris_in_it(pipe, graphs, kind, tmp_path):
    own = copy.deepcopy(pipe)
    file = lora_fixture.save(lora_fixture.lycoris_network(own, kind), tmp_path / "a.safetensors")
    feeds = unet_feeds(own.unet.config)
    wanted = unet_reference(own.unet, feeds)
    components = {"unet": pipe.unet.state_dict().keys()}
    deltas = match_loras("the model", components, [Lora(path=file)]).deltas["unet"]
    model = ir.load(graphs[2])
    (plain,) = run(lowered(model, emulate=False), tmp_path, **feeds).values()
    for name, merged in merge_lora(graphs[2], deltas).items():
        model.graph.initializers[name].const_value = ir.tensor(merged.data, name=name)
    (found,) = run(lowered(model, emulate=False), tmp_path, **feeds).values()
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(plain - wanted).max() > 0.01


def test_a_merged_weight_beyond_float16_is_refused(pipe, graphs, tmp_path):
    state = {name: value * 1e4 for name, value in lora_fixture.kohya(pipe, kernels=True, text=False).items()}
    file = lora_fixture.save(state, tmp_path / "a.safetensors")
    with pytest.raises(sdonnx.RequestError, match=r"overflows; use a smaller scale"):
        merge_lora(graphs[1], find_deltas(pipe, file))
