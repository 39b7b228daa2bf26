"""Random models for bench/gpu.py: the same weights for sdonnx' graphs and for diffusers, drawn where needed."""

import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import random_checkpoint
from sdonnx_export.checkpoint_model import Part, Weight
from sdonnx_export.models.components import build
from sdonnx_export.operators.precision import Precision
from sdonnx_export.operators.targets import find_operators

_NORMAL = np.random.default_rng(0).standard_normal(1_000_003, np.float32)
"""What all weights repeat; a prime number of values, so that no two rows of a matrix are equal."""


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw a weight by its name, in float16: variance 1 / fan-in; norms are near 1, biases near 0."""
    start = zlib.crc32(name.encode()) % len(_NORMAL)
    if len(shape) > 1:
        center, scale = 0.0, random_checkpoint.fan_in(name, shape) ** -0.5
    else:
        center, scale = float(name.endswith("weight")), 0.1
    values = (center + scale * np.roll(_NORMAL, -start)).astype(np.float16)
    return np.resize(values, shape)


def part_of(component: str, config: Mapping[str, Any]) -> Part:
    """Return a component's config and its weights, each drawn when it is read."""
    shapes = random_checkpoint.weight_shapes(component, dict(config))
    return Part(
        config=config,
        weights={
            name: Weight(shape=shape, dtype="F16", read=partial(draw, name, shape)) for name, shape in shapes.items()
        },
    )


def write_graph(component: str, config: Mapping[str, Any], target: str, precision: Precision, folder: Path) -> Path:
    """Write a component's graph and weights to ``folder`` unless they are there; return the graph's path."""
    path = folder / "model.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        operators = find_operators(target, {precision})
        model = build(component, part_of(component, config), precision, operators, target=target)
        ir.save(model, folder / "part.onnx", external_data="model.onnx_data", size_threshold_bytes=64)
        (folder / "part.onnx").rename(path)
    return path


def load_torch(model: Any, prefix: str = "") -> Any:
    """Give a torch model the weights that `draw` has for its names, with ``prefix`` before them."""
    import torch

    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(torch.from_numpy(draw(prefix + name, tuple(value.shape))))
    return model.eval().requires_grad_(False)
