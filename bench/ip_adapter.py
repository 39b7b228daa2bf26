"""Time of a denoising step with IP-Adapters beside the plain step, with random adapters made for a package.

    python bench/ip_adapter.py                        # pictogram
    python bench/ip_adapter.py sd15-onnx --steps 4    # of `random_checkpoint.py sd15 --size sd15`, exported

A row for no adapter, for a plain one (4 tokens), a Plus (16 tokens) and both. Plain steps and others take turns, so
that a busy machine slows all alike; the median of each counts.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from random_checkpoint import random_weights, weight_shapes
from safetensors.numpy import save_file
from sdonnx_export.export import export
from sdonnx_models import DEFAULT
from sdonnx_runtime.denoising.ip_adapter import CrossAttentions

import sdonnx
from sdonnx.loading import find_model

ENCODER = {
    "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "projection_dim": 64, "image_size": 224, "patch_size": 14,
}  # fmt: skip
"""A small image encoder: it runs once, and its time is not a step's."""


def make_adapter(directory: Path, attentions: CrossAttentions, *, plus: bool) -> Path:
    """Export an IP-Adapter with random weights for a U-Net; returns its package."""
    rng, name = np.random.default_rng(0), "plus" if plus else "plain"
    config: dict[str, Any] = {
        "_class_name": "IPAdapter", "image_state": "state", "image_width": 64, "num_tokens": 16 if plus else 4,
        "cross_attention_dim": attentions.text_width, "layer_widths": attentions.widths,
        "image_projection": "resampler" if plus else "linear", "hidden_size": 128, "intermediate_size": 512,
        "num_hidden_layers": 4, "num_attention_heads": 2,
    }  # fmt: skip
    encoder = directory / "image_encoder"
    encoder.mkdir(exist_ok=True)
    (encoder / "config.json").write_text(json.dumps(ENCODER))
    save_file(random_weights(rng, weight_shapes("image_encoder", ENCODER), np.float32), encoder / "model.safetensors")
    source = directory / f"{name}.safetensors"
    save_file(random_weights(rng, weight_shapes("ip_adapter", config), np.float32), source)
    return export(str(source), directory / name)


def measure(package: Path, rows: dict[str, Sequence[Path]], steps: int, repeats: int) -> dict[str, float]:
    """The median of the seconds of a step for each row's adapters."""
    image, seconds = Image.new("RGB", (224, 224), "teal"), {name: list[float]() for name in rows}
    for _ in range(repeats):
        for name, adapters in rows.items():
            with sdonnx.load(package, ip_adapters=adapters) as pipe:
                prompts = tuple(sdonnx.IPAdapter(image=image) for _ in adapters)
                result = pipe.generate("a cat", num_inference_steps=steps + 1, seed=1, ip_adapters=prompts)
            seconds[name] += result.timings.steps[1:]  # the first one opens the U-Net
    return {name: statistics.median(each) for name, each in seconds.items()}


def main() -> None:
    """Make the adapters, time the steps and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", nargs="?", default=DEFAULT)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    package = find_model(args.package)
    attentions = CrossAttentions.of_unet(json.loads((package / "unet" / "config.json").read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as folder:
        plain, plus = (make_adapter(Path(folder), attentions, plus=plus) for plus in (False, True))
        rows = {"no adapter": [], "plain, 4 tokens": [plain], "Plus, 16 tokens": [plus], "both": [plain, plus]}
        found = measure(package, rows, args.steps, args.repeats)
    print("| | seconds a step | |\n| --- | --- | --- |")
    for name, each in found.items():
        print(f"| {name} | {each:.3g} | {each / found['no adapter']:.2f} |")


if __name__ == "__main__":
    main()
