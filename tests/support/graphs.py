"""Torch modules as checkpoints' parts, and written graphs that are saved and run."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from sdonnx_export.checkpoint_model import Part, Weight
from sdonnx_runtime.execution.session import Session

UNET = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 48,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
    "sample_size": 8,
}

UNET_VARIATIONS = {
    "plain": {},
    "linear projection, layers and heads per level": {
        "use_linear_projection": True,
        "attention_head_dim": [2, 8],
        "layers_per_block": [1, 2],
        "upcast_attention": True,
    },
    "no mid block, sines first, padding below": {
        "mid_block_type": None,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "downsample_padding": 0,
    },
    "attention in the mid block and on the way up alone": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
    },
    "three levels, attention at the lowest, deeper transformers": {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 1],
        "in_channels": 9,
        "norm_eps": 1e-3,
    },
}

VAE = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 16,
}

VAE_VARIATIONS = {
    "plain": {},
    "16 latent channels, no quantization convolutions": {
        "latent_channels": 16,
        "layers_per_block": 2,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "no attention, downscale 8": {
        "mid_block_add_attention": False,
        "block_out_channels": (16, 16, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
}


def part_of(module):
    """A checkpoint's part from a torch module whose every weight matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if name.endswith("weight") else 0.0))
    return as_part(module)


def as_part(module):
    """A checkpoint's part from a torch module."""
    module.eval()
    config = json.loads(json.dumps({"_class_name": type(module).__name__, **module_config(module)}))
    weights = {
        name: Weight(shape=tuple(tensor.shape), dtype="F32", read=tensor.numpy)
        for name, tensor in module.state_dict().items()
        if not name.endswith("position_ids")
    }
    return Part(config=config, weights=weights)


def module_config(module):
    return module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)


def saved(model, directory: Path) -> Path:
    path = directory / "model.onnx"
    ir.save(model, path, external_data="model.onnx_data")
    return path


def run(model, directory, **feeds):
    return Session(saved(model, directory), device="cpu").run(feeds)


def unet_feeds(config, height=8, width=12, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((2, config["in_channels"], height, width), np.float32),
        "timestep": np.array(417, np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 77, config["cross_attention_dim"]), np.float32),
    }


def unet_reference(unet, feeds):
    with torch.no_grad():
        return unet(**{name: torch.from_numpy(value) for name, value in feeds.items()}).sample.numpy()
