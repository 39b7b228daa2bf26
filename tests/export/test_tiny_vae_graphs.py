"""Graphs of tiny autoencoders (TAESD) against diffusers."""

from functools import partial

import numpy as np
import pytest
import torch
from sdonnx_export.checkpoint_model import Part
from sdonnx_export.models.components import build
from sdonnx_export.operators.base import Operators
from sdonnx_export.operators.int8 import Int8Operators
from sdonnx_export.operators.precision import PRECISIONS
from sdonnx_export.operators.quantized import Range
from sdonnx_export.quantization.calibration import TappedOperators
from sdonnx_runtime.errors import ExportError
from support.families import tiny_vae
from support.graphs import part_of, run

CHANNELS_LAST = partial(lambda graph, weights, _precisions: Int8Operators(graph, weights, lambda _name: "fp32"))


TINY_VARIATIONS = {
    "plain": {},
    "16 latent channels, three levels": {
        "latent_channels": 16,
        "encoder_block_out_channels": (16,) * 3,
        "decoder_block_out_channels": (24,) * 3,
        "num_encoder_blocks": (1, 1, 2),
        "num_decoder_blocks": (2, 1, 1),
    },
}


def given_and_wanted(vae, seed=0):
    """For decoder and encoder: what it is given, and what diffusers gives for it."""
    rng = np.random.default_rng(seed)
    latents = 2 * rng.standard_normal((2, vae.config.latent_channels, 6, 4), np.float32)
    image = rng.uniform(-1, 1, (2, 3, 32, 48)).astype(np.float32)
    with torch.no_grad():
        decoded = vae.decode(torch.from_numpy(latents)).sample.numpy()
        encoded = vae.encode(torch.from_numpy(image)).latents.numpy()
    return {"vae_decoder": ({"latent_sample": latents}, decoded), "vae_encoder": ({"sample": image}, encoded)}


@pytest.mark.core
@pytest.mark.parametrize("variation", TINY_VARIATIONS)
@pytest.mark.parametrize("operators", [Operators, CHANNELS_LAST], ids=["plain", "channels last"])
def test_tiny_vae_equals_diffusers(variation, operators, tmp_path):
    vae = tiny_vae(**TINY_VARIATIONS[variation])
    part = part_of(vae)  # which changes it
    for name, (feeds, wanted) in given_and_wanted(vae).items():
        assert np.abs(wanted).max() > 0.5
        (found,) = run(build(name, part, "fp32", operators), tmp_path, **feeds).values()
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("precision", [each for each in PRECISIONS if each != "fp32"])
def test_a_quantized_tiny_vae_is_near(precision, tmp_path):
    vae = tiny_vae()
    part, operators = part_of(vae), Operators  # which changes it
    for name, (feeds, wanted) in given_and_wanted(vae).items():
        if precision == "int8":
            taps = run(build(name, part, precision, TappedOperators), tmp_path, **feeds)
            ends = {key.removeprefix("range:"): value for key, value in taps.items() if key.startswith("range:")}
            assert ends
            ranges = {key: Range.from_min_max(*map(float, value)) for key, value in ends.items()}
            operators = partial(Int8Operators, ranges=ranges)
        model = build(name, part, precision, operators)
        if precision == "int8":
            assert sum(node.op_type == "QLinearConv" for node in model.graph) == 3 * 7
        (found,) = run(model, tmp_path, **feeds).values()
        error = np.abs(found - wanted).max()
        assert 0 < error < 0.2 * np.ptp(wanted)


@pytest.mark.parametrize(
    ("key", "value", "works"),
    [
        ("act_fn", "silu", "relu"),
        ("upsample_fn", "bilinear", "nearest"),
        ("upsampling_scaling_factor", 4, "2"),
        ("encoder_block_out_channels", [16, 16, 16, 32], "the same number"),
        ("encoder_block_out_channels", [16, 16], "a list of 4"),
        ("num_decoder_blocks", [2, 2], "a list of 4"),
        ("scaling_factor", "1", "a number"),
    ],
)
def test_a_config_value_without_a_graph_is_named(key, value, works):
    whole = part_of(tiny_vae())
    with pytest.raises(ExportError, match=f"'{key}'.*{works}"):
        build("vae_decoder", Part(config={**whole.config, key: value}, weights=whole.weights), "fp32")
