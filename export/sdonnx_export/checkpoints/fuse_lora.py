"""Adapters that become part of a package for good: a checkpoint whose weights are read with them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from sdonnx_runtime.adapters.lora import LayerDelta, Lora
from sdonnx_runtime.adapters.merging import LayerDeltas, match_keys
from sdonnx_runtime.arrays import AnyArray

from sdonnx_export.checkpoint_model import Checkpoint, Part, Weight


def fuse_loras(checkpoint: Checkpoint, loras: Sequence[Lora]) -> Checkpoint:
    """A checkpoint with adapters merged into its weights, as each is read.

    Raises:
        RequestError: a file can't be read, or is for another model.
    """
    if not loras:
        return checkpoint
    modules = {
        part: [name.removesuffix(".weight") for name, weight in each.weights.items() if len(weight.shape) in (2, 4)]
        for part, each in checkpoint.parts.items()
        if part != "vae"
    }
    changes = match_keys(checkpoint.source, modules, loras)
    parts = {name: _changed(part, changes.get(name, {})) for name, part in checkpoint.parts.items()}
    return replace(checkpoint, parts=parts)


def _changed(part: Part, changes: LayerDeltas) -> Part:
    def changed(weight: Weight, mine: Sequence[tuple[LayerDelta, float]]) -> Weight:
        def read() -> AnyArray:
            data = weight.read().astype(np.float32)
            flat: AnyArray = data.reshape(len(data), -1)
            for change, scale in mine:
                flat = change(flat, scale)
            return flat.reshape(data.shape)

        return replace(weight, dtype="F32", read=read)

    touched = {f"{module}.weight": mine for module, mine in changes.items()}
    weights = {
        name: changed(weight, touched[name]) if name in touched else weight for name, weight in part.weights.items()
    }
    return replace(part, weights=weights)
