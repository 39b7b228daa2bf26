"""Reading a package back as the checkpoint that it was made of: its graphs hold the weights by the same names."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.packages.manifest import read_json
from sdonnx_runtime.packages.package import Package

from sdonnx_export.checkpoint_model import Checkpoint, Part, Weight
from sdonnx_export.models.components import COMPONENTS
from sdonnx_export.operators.base import TransposedWeight


def open_package(root: Path) -> Checkpoint:
    """The checkpoint in a package of fp32 or fp16.

    Raises:
        ExportError: its weights are stored in fewer bits.
        PackageError: it is damaged, or was not written by `export`.
    """
    package = Package.open(root)
    parts: dict[str, Part] = {}
    for name in package.manifest.components:
        component = COMPONENTS[name]
        graph, precision = package.graph(name), package.manifest.components[name].precision
        if precision not in ("fp32", "fp16"):
            raise ExportError(f"{root} has a {name} of {precision}; give the checkpoint, or a package of fp32 or fp16")
        config = read_json(root / name / "config.json")
        before = parts[component.part].weights if component.part in parts else {}
        weights = {**before, **_weights(graph, name, config)}
        parts[component.part] = Part(config=config, weights=weights)
    manifest, index = (
        package.manifest,
        read_json(root / "model_index.json") if "unet" in package.manifest.components else {},
    )
    return Checkpoint(
        source=package.name,
        revision=manifest.source.revision,
        parts=parts,
        scheduler=manifest.scheduler,
        tokenizers={encoder.tokenizer: root / encoder.tokenizer for encoder in manifest.text_encoders},
        settings={key: value for key, value in index.items() if not isinstance(value, list)},
        defaults=asdict(manifest.defaults),
    )


def _weights(graph: Path, name: str, config: dict[str, Any]) -> dict[str, Weight]:
    module, _ = COMPONENTS[name].module(config)
    turned = {key: isinstance(weight, TransposedWeight) for key, weight in module.named_parameters()}
    stored = ir.load(graph).graph.initializers
    tensors = {key: stored[key].const_value for key in turned if key in stored}
    return {key: _weight(tensor, turned=turned[key]) for key, tensor in tensors.items() if tensor is not None}


def _weight(tensor: ir.TensorProtocol, *, turned: bool) -> Weight:
    shape = tuple(tensor.shape.numpy())
    stored = "F16" if tensor.dtype == ir.DataType.FLOAT16 else "F32"
    return Weight(shape=shape[::-1] if turned else shape, dtype=stored, read=_reader(tensor, turned=turned))


def _reader(tensor: ir.TensorProtocol, *, turned: bool) -> Callable[[], AnyArray]:
    def read() -> AnyArray:
        data = np.array(tensor.numpy())
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()  # a map kept open would keep gigabytes resident
        return data.T if turned else data

    return read
