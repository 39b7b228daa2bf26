"""Write checkpoints with random weights, without torch, for benchmarks and first steps.

python bench/random_checkpoint.py tiny-sd                              # a few MB; generates noise in a second
python bench/random_checkpoint.py sd15 --size sd15                     # 860 M + 123 M + 84 M parameters, 4.3 GB
python bench/random_checkpoint.py sdxl --size sdxl --dtype float16     # 2567 M + 123 M + 695 M + 84 M, 6.9 GB
python bench/random_checkpoint.py turbo --size turbo --dtype float16   # SD-Turbo and TAESD: 866 M + 340 M + 84 M + 2 M
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_sizes import MODEL_INDEX, SCHEDULER, SIZES, TURBO_SCHEDULER, XL_INDEX
from safetensors.numpy import save_file
from sdonnx_export.models.components import COMPONENTS
from sdonnx_export.operators.layouts import checkpoint_shape
from sdonnx_export.packaging.clip_tokenizer import write_clip_tokenizer


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
        "tiny_vae": ("diffusion_pytorch_model.safetensors", ["vae_encoder", "vae_decoder"]),
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
    scheduler = TURBO_SCHEDULER if "tiny_vae" in parts else SCHEDULER
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2), encoding="utf-8")
    write_clip_tokenizer(directory / "tokenizer")
    index = {**MODEL_INDEX, "scheduler": ["diffusers", scheduler["_class_name"]]}
    if "text_encoder_2" in parts:
        write_clip_tokenizer(directory / "tokenizer_2", "!")
        index |= XL_INDEX
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
