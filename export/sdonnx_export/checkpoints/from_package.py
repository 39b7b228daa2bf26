"""Read a package back as a checkpoint: its graphs store the weights under the checkpoint's keys."""

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
from sdonnx_export.operators.layouts import checkpoint_shape, find_layout, to_checkpoint_layout


def open_package(root: Path) -> Checkpoint:
    """Open the checkpoint in a package of fp32 or fp16.

    Raises:
        ExportError: its weights are quantized.
        PackageError: it is damaged, or was not written by `export`.
    """
    package = Package.open(root)
    manifest = package.manifest
    parts: dict[str, Part] = {}
    for name, component in manifest.components.items():
        if component.precision not in ("fp32", "fp16"):
            raise ExportError(
                f"{root}: the {name} is {component.precision}; give the checkpoint, or a package of fp32 or fp16"
            )
        config, part = read_json(root / name / "config.json"), COMPONENTS[name].part
        others = parts[part].weights if part in parts else {}
        parts[part] = Part(config=config, weights={**others, **_weights(package.graph(name), name, config)})
    index = read_json(root / "model_index.json") if "unet" in manifest.components else {}
    return Checkpoint(
        source=package.name,
        revision=manifest.source.revision,
        parts=parts,
        scheduler=manifest.scheduler,
        tokenizers={encoder.tokenizer: root / encoder.tokenizer for encoder in manifest.text_encoders},
        settings={key: value for key, value in index.items() if not isinstance(value, list)},
        defaults=asdict(manifest.defaults),
        stated=manifest.source.stated,
    )


def _weights(graph: Path, name: str, config: dict[str, Any]) -> dict[str, Weight]:
    module, _ = COMPONENTS[name].module(config)
    stored = ir.load(graph).graph.initializers
    parameters = {key: find_layout(each, stored[key]) for key, each in module.named_parameters() if key in stored}
    tensors = {key: stored[key].const_value for key in parameters}
    return {key: _weight(parameters[key], tensor) for key, tensor in tensors.items() if tensor is not None}


def _weight(parameter: ir.Value, tensor: ir.TensorProtocol) -> Weight:
    dtype = "F16" if tensor.dtype == ir.DataType.FLOAT16 else "F32"
    return Weight(shape=checkpoint_shape(parameter), dtype=dtype, read=_reader(parameter, tensor))


def _reader(parameter: ir.Value, tensor: ir.TensorProtocol) -> Callable[[], AnyArray]:
    def read() -> AnyArray:
        data = np.array(tensor.numpy())
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()  # a memory map that stays open keeps gigabytes resident
        return to_checkpoint_layout(parameter, data)

    return read
