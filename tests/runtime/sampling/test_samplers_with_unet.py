"""Samplers equal diffusers' with a small random U-Net as the model: diffusers', and ours that was written from it."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from sdonnx_export.models.components import build
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.sampling.scheduler_config import CLASSES
from support.graphs import part_of, saved
from support.samplers import SD15, SHAPE, WITH_SIGMA_SCHEDULES, distance, ours, predictions, theirs

SETTINGS = [{}, {"timestep_spacing": "trailing"}, {"use_karras_sigmas": True}]


def takes(sampler, setting):
    if "use_karras_sigmas" in setting:
        return sampler in WITH_SIGMA_SCHEDULES
    return not (setting and sampler in ("lcm", "tcd"))


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """The same U-Net twice, each a function of states and timestep: ``torch`` and ``onnx``."""
    module = UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    session = Session(
        saved(build("unet", part_of(module), "fp32"), tmp_path_factory.mktemp("unet")), device="cpu", threads=1
    )
    text = np.random.default_rng(2).standard_normal((SHAPE[0], 7, 8), np.float32)

    def in_torch(x, t):
        with torch.no_grad():
            return module(torch.from_numpy(x), t, torch.from_numpy(text)).sample.numpy()

    def in_onnx(x, t):
        feeds = {"sample": x, "timestep": np.array(t, np.float32), "encoder_hidden_states": text}
        return session.run(feeds)["out_sample"]

    return SimpleNamespace(torch=in_torch, onnx=in_onnx)


@pytest.mark.parametrize("sampler", CLASSES)
def test_sampling_with_our_unet_equals_diffusers_samplers(unet, sampler):
    for setting, steps, prediction_type in product(SETTINGS, (4, 20, 50), predictions(sampler)):
        if takes(sampler, setting):
            config = {**SD15, **setting, "prediction_type": prediction_type}
            wanted = theirs(sampler, config, steps, network=unet.onnx)
            found = distance(ours(sampler, config, steps, network=unet.onnx), wanted)
            assert found < 1e-4, (setting, steps, prediction_type, found)


@pytest.mark.parametrize("sampler", CLASSES)
def test_sampling_with_our_unet_equals_diffusers_with_torch(unet, sampler):
    wanted = theirs(sampler, SD15, 20, network=unet.torch)
    assert distance(ours(sampler, SD15, 20, network=unet.onnx), wanted) < 1e-4


@pytest.mark.parametrize("sampler", CLASSES)
def test_the_unet_counts(unet, sampler):
    """Another timestep, or an input a hundredth larger, ends far outside of the tolerance."""
    wanted = theirs(sampler, SD15, 20, network=unet.onnx)
    for other in (lambda x, t: unet.onnx(x, 999 - t), lambda x, t: unet.onnx(x, t) * np.float32(1.01)):
        assert distance(ours(sampler, SD15, 20, network=other), wanted) > 5e-4
