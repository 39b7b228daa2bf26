"""Fuse LoRAs into a checkpoint: its weights are read with them merged."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from sdonnx_runtime.adapters.lora import LayerDelta, Lora
from sdonnx_runtime.adapters.merging import LayerDeltas, match_keys
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import ExportError

from sdonnx_export.checkpoint_model import Checkpoint, Part, Weight, checked


def fuse_loras(checkpoint: Checkpoint, loras: Sequence[Lora]) -> Checkpoint:
    """Return a checkpoint whose weights are merged with the LoRAs as each is read.

    Raises:
        RequestError: a file can't be read or is for another model.
    """
    if not loras:
        return checkpoint
    modules = {
        name: [key.removesuffix(".weight") for key, weight in part.weights.items() if len(weight.shape) in (2, 4)]
        for name, part in checkpoint.parts.items()
        if name != "vae"
    }
    deltas = match_keys(checkpoint.source, modules, loras)
    parts = {name: _fuse(part, deltas.get(name, {})) for name, part in checkpoint.parts.items()}
    return replace(checkpoint, parts=parts)


def _fuse(part: Part, deltas: LayerDeltas) -> Part:
    fused = {
        name: _with_deltas(name, part.weights[name], each)
        for name, each in ((f"{module}.weight", each) for module, each in deltas.items())
    }
    return replace(part, weights={**part.weights, **fused})


def _with_deltas(name: str, weight: Weight, deltas: Sequence[tuple[LayerDelta, float]]) -> Weight:
    original = checked(name, weight)

    def read() -> AnyArray:
        data = original.read().astype(np.float32)
        flat: AnyArray = data.reshape(len(data), -1)
        with np.errstate(over="ignore", invalid="ignore"):
            for delta, scale in deltas:
                flat = delta.apply(flat, scale)
        if not np.isfinite(flat).all():
            raise ExportError(f"fusing LoRA into '{name}' overflows; use a smaller scale")
        return flat.reshape(data.shape)

    return replace(weight, dtype="F32", read=read)
