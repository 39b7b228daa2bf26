"""Fuse LoRAs into a checkpoint: its weights are read with them merged."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from sdonnx_runtime.adapters.lora import Lora, ParameterDelta
from sdonnx_runtime.adapters.merging import LayerDeltas, match_loras
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
    parameters = {name: part.weights.keys() for name, part in checkpoint.parts.items() if name != "vae"}
    adapters = match_loras(checkpoint.source, parameters, loras)
    if adapters.embeddings:
        raise ExportError(
            f"a LoRA has the embedding '{adapters.embeddings[0].word}', which a package can't have; give the file to "
            "'sdonnx run' with --lora"
        )
    parts = {name: _fuse(part, adapters.deltas.get(name, {})) for name, part in checkpoint.parts.items()}
    return replace(checkpoint, parts=parts)


def _fuse(part: Part, deltas: LayerDeltas) -> Part:
    fused = {name: _with_deltas(name, part.weights[name], each) for name, each in deltas.items()}
    return replace(part, weights={**part.weights, **fused})


def _with_deltas(name: str, weight: Weight, deltas: Sequence[tuple[ParameterDelta, float]]) -> Weight:
    original = checked(name, weight)

    def read() -> AnyArray:
        data = original.read().astype(np.float32)
        flat: AnyArray = data if name.endswith(".bias") else data.reshape(len(data), -1)
        with np.errstate(over="ignore", invalid="ignore"):
            for delta, scale in deltas:
                flat = delta.apply(flat, scale)
        if not np.isfinite(flat).all():
            raise ExportError(f"fusing LoRA into '{name}' overflows; use a smaller scale")
        return flat.reshape(data.shape)

    return replace(weight, dtype="F32", read=read)
