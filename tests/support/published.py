"""The published models' configs, and parts of checkpoints of any size that take no memory: their weights are zeros."""

import json
from functools import partial

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, T2IAdapter, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from sdonnx_export.checkpoint_model import Checkpoint, Part, Weight
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from support.families import CROSS_DOWN, CROSS_UP, DOWN, UP
from support.graphs import module_config

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

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
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

SHALLOW = {
    "sd1": {"unet": SD1, "text_encoder": {**CLIP_L, "eos_token_id": 2}, "vae": VAE},
    "sd2": {"unet": SD2, "text_encoder": CLIP_H},
    "sdxl": {
        "unet": {**SDXL, "transformer_layers_per_block": (1, 1, 2)},
        "text_encoder_2": CLIP_G,
        "vae": {**VAE, "scaling_factor": 0.13025, "force_upcast": True},
    },
    "refiner": {"unet": {**REFINER, "transformer_layers_per_block": 1}},
    "lcm": {"unet": {**SD1, "time_cond_proj_dim": 256}},
    "bk-sdm": {"unet": BK_SDM_SMALL},
    "narrow": {
        "unet": {**SD1, "block_out_channels": (160, 288), "down_block_types": (CROSS_DOWN, DOWN)}
        | {"up_block_types": (UP, CROSS_UP), "cross_attention_dim": 64},
        "vae": {**VAE, "block_out_channels": (32, 64, 96, 96), "norm_num_groups": 8, "force_upcast": False},
    },
    "taesd": {"vae_tiny": {}},
    "controlnet": {
        "controlnet": {key: value for key, value in SD1.items() if key not in ("up_block_types", "sample_size")}
    },
    "t2i adapter": {"adapter": {"adapter_type": "full_adapter"}},
    "image encoder": {"image_encoder": {"projection_dim": 768, "num_hidden_layers": 2}},
    "safety checker": {"safety_checker": {"num_hidden_layers": 2}},
}
"""Configs by family and part: the published widths, of which kernels depend, in few layers; and narrow ones."""

_MODULES = {
    "unet": lambda config: UNet2DConditionModel(**{**config, "layers_per_block": 1}),
    "vae": lambda config: AutoencoderKL(**{**config, "layers_per_block": 1}),
    "vae_tiny": lambda config: AutoencoderTiny(**config),
    "text_encoder": lambda config: CLIPTextModel(_text(config)),
    "text_encoder_2": lambda config: CLIPTextModelWithProjection(_text(config)),
    "controlnet": lambda config: ControlNetModel(**{**config, "layers_per_block": 1}),
    "adapter": lambda config: T2IAdapter(**config),
    "image_encoder": lambda config: CLIPVisionModelWithProjection(CLIPVisionConfig(**config)),
    "safety_checker": lambda config: StableDiffusionSafetyChecker(CLIPConfig(vision_config=config)),
}


def _text(config):
    return CLIPTextConfig(**{"vocab_size": 49408, "bos_token_id": 0, **config, "num_hidden_layers": 2})


def shallow_checkpoint(family):
    """A checkpoint of zeros of a family of SHALLOW."""
    parts = {
        name.removesuffix("_tiny"): zeros(partial(_MODULES[name], config)) for name, config in SHALLOW[family].items()
    }
    return Checkpoint(source=family, revision=None, parts=parts, scheduler={}, tokenizers={}, settings={})


def zeros(make):
    """The part of the module that ``make`` returns; nothing of it has storage."""
    with torch.device("meta"):
        module = make()
    config = json.loads(json.dumps({"_class_name": type(module).__name__, **module_config(module)}))
    weights = {
        name: Weight(shape=tuple(tensor.shape), dtype="F32", read=partial(np.zeros, tuple(tensor.shape), np.float32))
        for name, tensor in module.state_dict().items()
        if not name.endswith("position_ids")
    }
    return Part(config=config, weights=weights)
