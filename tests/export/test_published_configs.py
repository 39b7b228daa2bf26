"""Single files of the published models' sizes give the published configs; they are shapes without weights."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from sdonnx_export.checkpoint_model import Weight
from sdonnx_export.checkpoints.ldm.checkpoint import split_checkpoint
from sdonnx_export.checkpoints.ldm.file_settings import SingleFile
from support.ldm import ldm_state
from support.published import PUBLISHED, VAE
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


def shapes_of(unet, texts):
    """A checkpoint's names and shapes, made by diffusers and transformers where no tensor has storage."""
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE)
        made = {name: kinds[name](CLIPTextConfig(vocab_size=49408, **config)) for name, config in texts.items()}
        pipe = {"text_encoder": None, **made, "unet": UNet2DConditionModel(**unet), "vae": vae}
        return {name: tuple(tensor.shape) for name, tensor in ldm_state(SimpleNamespace(**pipe)).items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_are_the_published_ones(name, tmp_path):
    unet, texts, scaling_factor = PUBLISHED[name]
    shapes = shapes_of(unet, texts)
    weights = {key: Weight(shape=shape, dtype="F16", read=unreadable) for key, shape in shapes.items()}
    file = SingleFile(path=Path(tmp_path / f"{name}.safetensors"), weights=weights)
    parts = split_checkpoint(file).parts
    levels = len(unet["block_out_channels"])
    found = dict(parts["unet"].config)
    expected = {"layers_per_block": 2, "transformer_layers_per_block": 1, **unet}
    for key in ("layers_per_block", "transformer_layers_per_block"):
        expected[key] = [expected[key]] * levels if isinstance(expected[key], int) else expected[key]
    if name == "sd_xl_refiner_1.0":  # its uppermost level has no attention, so that its number says nothing
        expected["transformer_layers_per_block"] = [1, 4, 4, 4]
    assert {key: found[key] for key in expected} == {key: lists(value) for key, value in expected.items()}
    assert parts["vae"].config["scaling_factor"] == scaling_factor
    for part, config in texts.items():
        assert config.items() <= parts[part].config.items()


def unreadable():
    pytest.fail("it takes no weight to tell what it is")


def lists(value):
    return [lists(item) for item in value] if isinstance(value, tuple) else value
