"""Single files of the published models' sizes give the published configs; they are shapes without weights."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from sdonnx_export.checkpoint_model import Weight
from sdonnx_export.checkpoints.ldm.checkpoint import split_checkpoint
from sdonnx_export.checkpoints.ldm.file_settings import SingleFile
from support import families
from support.ldm import ldm_state
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

CROSS_DOWN, DOWN, CROSS_UP, UP = families.CROSS_DOWN, families.DOWN, families.CROSS_UP, families.UP

SD1 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP, CROSS_UP),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
}
SD2 = {
    **SD1,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "sample_size": 96,
}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "sample_size": 128,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER = {
    **SDXL,
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP, UP),
    "transformer_layers_per_block": 4,
    "cross_attention_dim": 1280,
    "attention_head_dim": (6, 12, 24, 24),
    "projection_class_embeddings_input_dim": 2560,
}
SSD_1B = {
    **SDXL,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": (1, 2, 4),
    "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
}
BK_SDM_SMALL = {**SD1, "layers_per_block": 1, "mid_block_type": None}

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "hidden_act": "gelu",
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}

PUBLISHED = {
    "v1-5-pruned-emaonly": (SD1, {"text_encoder": CLIP_L}, 0.18215),
    "v2-1_768-ema-pruned": (SD2, {"text_encoder": CLIP_H}, 0.18215),
    "v2-1_512-ema-pruned": ({**SD2, "sample_size": 64}, {"text_encoder": CLIP_H}, 0.18215),
    "512-inpainting-ema": ({**SD2, "in_channels": 9, "sample_size": 64}, {"text_encoder": CLIP_H}, 0.18215),
    "512-depth-ema": ({**SD2, "in_channels": 5, "sample_size": 64}, {"text_encoder": CLIP_H}, 0.18215),
    "sd_xl_base_1.0": (SDXL, {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G}, 0.13025),
    "sd_xl_turbo_1.0_fp16": ({**SDXL, "sample_size": 64}, {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G}, 0.13025),
    "sd_xl_refiner_1.0": (REFINER, {"text_encoder_2": CLIP_G}, 0.13025),
    "SSD-1B": (SSD_1B, {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G}, 0.13025),
    "bk-sdm-small": (BK_SDM_SMALL, {"text_encoder": CLIP_L}, 0.18215),
}


def shapes_of(unet, texts):
    """A checkpoint's names and shapes, made by diffusers and transformers where no tensor has storage."""
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
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
