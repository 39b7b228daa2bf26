"""Write checkpoints with random weights, without torch, for benchmarks and first steps.

python bench/random_checkpoint.py tiny-sd                              # a few MB; generates noise in a second
python bench/random_checkpoint.py sd15 --size sd15                     # 860 M + 123 M + 84 M parameters, 4.3 GB
python bench/random_checkpoint.py sdxl --size sdxl --dtype float16     # 2567 M + 123 M + 695 M + 84 M, 6.9 GB
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from sdonnx_export.models.components import COMPONENTS
from sdonnx_export.operators.layouts import checkpoint_shape
from sdonnx_export.packaging.clip_tokenizer import write_clip_tokenizer

UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
XL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}
XL_UNET = {
    **UNET,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
BIG_TEXT = {
    **TEXT,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {"unet": UNET, "vae": VAE, "text_encoder": TEXT},
    "sdxl": {
        "unet": XL_UNET,
        "vae": {**VAE, "sample_size": 1024, "scaling_factor": 0.13025},
        "text_encoder": TEXT,
        "text_encoder_2": BIG_TEXT,
    },
    "tiny": {
        "unet": {
            **UNET,
            "attention_head_dim": 4,
            "block_out_channels": [32, 64],
            "cross_attention_dim": 64,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "layers_per_block": 1,
            "sample_size": 16,
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        },
        "vae": {**VAE, "block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "sample_size": 128},
        "text_encoder": {
            **TEXT,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 1,
            "num_hidden_layers": 2,
            "projection_dim": 64,
        },
    },
}
_TINY = SIZES["tiny"]
SIZES["tiny-sdxl"] = {
    **_TINY,
    "unet": {
        **_TINY["unet"],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "cross_attention_dim": 128,
        "projection_class_embeddings_input_dim": BIG_TEXT["projection_dim"] + 6 * 8,
        "use_linear_projection": True,
    },
    "text_encoder_2": {**BIG_TEXT, **_TINY["text_encoder"], "architectures": BIG_TEXT["architectures"],
                       "hidden_act": "gelu", "projection_dim": BIG_TEXT["projection_dim"]},
}  # fmt: skip


def weight_shapes(component: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a component's weights in its checkpoint, by name."""
    module, _ = COMPONENTS[component].module(config)
    return {name: checkpoint_shape(parameter) for name, parameter in module.named_parameters()}


def fan_in(name: str, shape: tuple[int, ...]) -> int:
    """Return how many values of a layer's input each of its outputs is a sum of."""
    return shape[-1] if "embedding.weight" in name else int(np.prod(shape[1:]))


def random_weights(rng: np.random.Generator, shapes: dict[str, tuple[int, ...]], dtype: Any) -> dict[str, Any]:
    """Draw weights that keep the scale of activations: variance 1 / fan-in, unit norms."""
    weights = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            data = rng.standard_normal(shape, np.float32) / np.sqrt(fan_in(name, shape))
        else:
            data = np.full(shape, name.endswith("weight"), np.float32)
        weights[name] = data.astype(dtype)
    return weights


def make(directory: Path, size: str = "tiny", dtype: str = "float32", seed: int = 0) -> None:
    """Write a checkpoint in diffusers' layout to ``directory``; files there are overwritten."""
    rng, parts = np.random.default_rng(seed), SIZES[size]
    names = {
        "unet": ("diffusion_pytorch_model.safetensors", ["unet"]),
        "vae": ("diffusion_pytorch_model.safetensors", ["vae_encoder", "vae_decoder"]),
        "text_encoder": ("model.safetensors", ["text_encoder"]),
        "text_encoder_2": ("model.safetensors", ["text_encoder_2"]),
    }
    for part, config in parts.items():
        filename, components = names[part]
        shapes = {name: shape for component in components for name, shape in weight_shapes(component, config).items()}
        folder = directory / part
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        save_file(random_weights(rng, shapes, np.dtype(dtype)), folder / filename, metadata={"format": "pt"})
    (directory / "scheduler").mkdir(exist_ok=True)
    scheduler = json.dumps(SCHEDULER, indent=2)
    (directory / "scheduler" / "scheduler_config.json").write_text(scheduler, encoding="utf-8")
    write_clip_tokenizer(directory / "tokenizer")
    index = MODEL_INDEX
    if "text_encoder_2" in parts:
        write_clip_tokenizer(directory / "tokenizer_2", "!")
        index = {**MODEL_INDEX, **XL_INDEX}
    (directory / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    args = parser.parse_args()
    make(args.directory, args.size, args.dtype)
    print(f"{args.directory}: a {args.size} checkpoint with random weights")


if __name__ == "__main__":
    main()
