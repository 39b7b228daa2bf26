"""Graphs for CUDA against diffusers and transformers, by lowering; their layouts, fused operators and fallbacks."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from safetensors.numpy import load_file
from sdonnx_export.checkpoints.from_package import open_package
from sdonnx_export.export import export
from sdonnx_export.models.components import build
from support.graphs import UNET, UNET_VARIATIONS, VAE, part_of, run, unet_feeds, unet_reference
from support.kernels import CUDA, assign, casts_of_weights
from support.lowering import lowered
from support.reference import relative_error
from transformers import CLIPTextConfig, CLIPTextModel

UNETS = {
    "three levels": {**UNET, **UNET_VARIATIONS["three levels, attention at the lowest, deeper transformers"]},
    "groups of 1 and 3 channels": {**UNET, "norm_num_groups": 32},
    "a width that BiasSplitGelu has": {
        **UNET,
        "block_out_channels": (320,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 32,
    },
}
MOST = {"fp32": 1e-5, "fp16": 1e-2}
"""Relative errors: of float32, and of rounding every value to float16."""


@pytest.fixture(scope="module")
def unet():
    """A U-Net by its name above, its part of a checkpoint, inputs and what diffusers makes of them; made once."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            module = UNet2DConditionModel(**UNETS[name])
            part, feeds = part_of(module), unet_feeds(module.config)
            made[name] = module, part, feeds, unet_reference(module, feeds)
        return made[name]

    return get


def check_kernels(model):
    """All nodes have kernels, which take them; weights are stored as they are used."""
    assigned = assign(model, CUDA)
    assert assigned.missing == assigned.broken == casts_of_weights(model) == []


@pytest.mark.parametrize("precision", MOST)
@pytest.mark.parametrize("name", UNETS)
def test_a_unet_is_that_of_diffusers(unet, name, precision, tmp_path):
    module, part, feeds, wanted = unet(name)
    model = build("unet", part, precision, target="cuda")
    check_kernels(model)
    (found,) = run(lowered(model, emulate=precision == "fp16"), tmp_path, **feeds).values()
    assert relative_error(found, wanted) < MOST[precision]
    sizes = [each.num_channels // each.num_groups for each in module.modules() if isinstance(each, torch.nn.GroupNorm)]
    widths = [each.proj.out_features for each in module.modules() if isinstance(each, GEGLU)]
    ops = Counter(node.op_type for node in model.graph)
    assert ops["GroupNorm"] == sum(size % 2 == 0 for size in sizes) > 0
    assert ops["BiasSplitGelu"] == widths.count(2560) == ops["MultiHeadAttention"] // 2 - ops["Split"]
    assert "Conv" not in ops
    assert ops["NhwcConv"] == sum(
        isinstance(each, torch.nn.Conv2d) and each.kernel_size == (3, 3) for each in module.modules()
    )


@pytest.mark.parametrize("precision", MOST)
@pytest.mark.parametrize("half", ["vae_decoder", "vae_encoder"])
def test_a_vae_is_that_of_diffusers(half, precision, tmp_path, rng):
    vae = AutoencoderKL(**VAE)
    model = build(half, part := part_of(vae), precision, target="cuda")
    check_kernels(model)
    if half == "vae_decoder":
        feeds = {"latent_sample": rng.standard_normal((1, 4, 6, 8), np.float32)}
        wanted = vae.decode(torch.from_numpy(feeds["latent_sample"])).sample
    else:
        feeds = {"sample": rng.standard_normal((1, 3, 12, 16), np.float32)}
        wanted = vae.encode(torch.from_numpy(feeds["sample"])).latent_dist.parameters
    found = next(iter(run(lowered(model, emulate=precision == "fp16"), tmp_path, **feeds).values()))
    assert relative_error(found, wanted.detach().numpy()) < MOST[precision]
    check_kernels(tiled := build(half, part, precision, target="cuda", tiled=True))
    ops = Counter(node.op_type for node in tiled.graph)
    assert ops["GroupNorm"] > 0  # of the mid block, which has the whole image
    assert ops["ReduceSumSquare"] > 0


@pytest.mark.parametrize("precision", MOST)
def test_a_text_encoder_is_that_of_transformers(precision, tmp_path, rng):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=500, eos_token_id=499, bos_token_id=498, **sizes))
    model = build("text_encoder", part_of(encoder), precision, target="cuda")
    check_kernels(model)
    assert "causal_bias" not in model.graph.initializers
    ids = rng.integers(0, 498, (2, 77))
    ids[:, 40:] = 499
    found = run(lowered(model, emulate=precision == "fp16"), tmp_path, input_ids=ids)
    wanted = encoder(torch.from_numpy(ids))
    for name in ("last_hidden_state", "pooler_output"):
        assert relative_error(found[name], wanted[name].detach().numpy()) < MOST[precision]


def test_weights_in_their_layouts(unet):
    """Linear weights transposed, kernels (out, kH, kW, in), those of 1x1 as linear ones, all but norms in float16."""
    module, part, _, _ = unet("three levels")
    stored = build("unet", part, "fp16", target="cuda").graph.initializers
    state = module.state_dict()
    assert state.keys() <= stored.keys()
    for name, weight in state.items():
        data = stored[name].const_value.numpy()
        wanted = weight.numpy().transpose({4: (0, 2, 3, 1), 2: (1, 0), 1: (0,)}[weight.ndim])
        wanted = wanted[:, 0, 0].T if wanted.shape[1:3] == (1, 1) else wanted
        np.testing.assert_array_equal(data, wanted.astype(data.dtype))
    kinds = {name: stored[name].const_value.dtype for name in state}
    norms = {name for name, each in module.named_modules() if isinstance(each, torch.nn.GroupNorm)}
    assert {name for name, kind in kinds.items() if kind == ir.DataType.FLOAT} == {
        f"{norm}.{part}" for norm in norms for part in ("weight", "bias")
    }


def test_a_package_is_read_back_as_the_checkpoint(checkpoint, tmp_path):
    """In the checkpoint's layouts, rounded to float16 but for group norms' weights."""
    package = export(None, tmp_path / "vae-cuda", vae=str(checkpoint / "vae"), target="cuda")
    ((part, read),) = open_package(package).parts.items()
    (file,) = (checkpoint / part).glob("*.safetensors")
    stored = load_file(file)
    assert {data.shape[2:] for data in stored.values()} == {(), (1, 1), (3, 3)}
    assert read.weights.keys() == stored.keys()
    for name, data in stored.items():
        found = read.weights[name].read()
        assert read.weights[name].shape == found.shape
        np.testing.assert_array_equal(found, data.astype(found.dtype))
        assert (found.dtype == np.float16) or (found.ndim == 1 and "norm" in name)
