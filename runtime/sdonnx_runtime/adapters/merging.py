"""Merging of LoRA into a package's weights: matching layers, and the merged initializers."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from sdonnx_runtime.adapters.lora import LayerDelta, Lora, read_lora
from sdonnx_runtime.adapters.lora_keys import known_names
from sdonnx_runtime.adapters.quantization import block_scales, channel_scales, dequantize, quantize_int4, quantize_int8
from sdonnx_runtime.adapters.textual_inversion import Embedding
from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import PackageError, RequestError
from sdonnx_runtime.graphs.initializers import FLOAT, INT4, Initializer, TensorData, read_initializers
from sdonnx_runtime.packages.package import Package

logger = logging.getLogger(__name__)

LayerDeltas: TypeAlias = Mapping[str, Sequence[tuple[LayerDelta, float]]]
"""A component's deltas with their scales, by module."""

_WEIGHT = re.compile(r"(?P<module>.+)\.weight(?:_(?P<start>\d+))?(?P<quantized>_quantized)?$")
"""The initializer of a module's weight, quantized or not, or of one of its pieces."""


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """The LoRA files and textual inversions of a package."""

    loras: tuple[Lora, ...] = ()
    deltas: Mapping[str, LayerDeltas] = field(default_factory=dict[str, LayerDeltas])
    """Those of ``loras`` by component."""
    embeddings: tuple[Embedding, ...] = ()


def load_adapters(package: Package, loras: Sequence[Lora], *, ignore_unmatched: bool = False) -> Adapters:
    """Read LoRA files and match their layers to a package's; those of scale 0 are only checked.

    With ``ignore_unmatched``, tensors of layers that the package doesn't have are ignored.

    Raises:
        RequestError: a file can't be read, or is for another model; without ``ignore_unmatched`` if a part of it is.
        PackageError: the package is damaged.
    """
    if not loras:
        return Adapters()
    if package.is_optimum:
        raise RequestError(
            f"{package.root} was not exported by sdonnx: weight names are missing, LoRA is not supported; "
            "export its checkpoint with 'sdonnx export'"
        )
    components = ("unet", *(encoder.component for encoder in package.manifest.text_encoders))
    modules = {name: _modules(package.graph(name)) for name in components}
    deltas = match_keys(package.name, modules, loras, ignore_unmatched=ignore_unmatched)
    return Adapters(loras=tuple(loras), deltas=deltas)


def match_keys(
    model: str, modules: Mapping[str, Sequence[str]], loras: Sequence[Lora], *, ignore_unmatched: bool = False
) -> dict[str, LayerDeltas]:
    """Match LoRA files to a model's modules, such as ``mid_block.attentions.0.proj_in``; raises as `load_adapters`."""
    names = {component: known_names(each) for component, each in modules.items()}
    deltas: dict[str, dict[str, list[tuple[LayerDelta, float]]]] = defaultdict(lambda: defaultdict(list))
    for lora in loras:
        file = read_lora(lora.path)
        unmatched = list(file.unexpected_keys)
        for (component, spelled), delta in file.deltas.items():
            module = names.get(component, {}).get(spelled)
            if module is None:
                unmatched.extend(delta.names.values())
            elif lora.scale != 0:
                deltas[component][module].append((delta, lora.scale))
        total = len(file.unexpected_keys) + sum(len(delta.names) for delta in file.deltas.values())
        if unmatched and (not ignore_unmatched or len(unmatched) == total):
            raise RequestError(
                f"{lora.path}: {len(unmatched)} of {total} tensors match no layer of {model} "
                f"({', '.join(unmatched[:3])}{', …' if len(unmatched) > 3 else ''}); use one that was trained for this "
                "kind of model, or ignore these tensors with --lora-ignore-unmatched (ignore_unmatched=True)"
            )
        if unmatched:
            logger.warning("%s: %d of %d tensors match no layer and are ignored", lora.path, len(unmatched), total)
    return {component: dict(each) for component, each in deltas.items()}


def _modules(graph: Path) -> list[str]:
    """The modules with a conv or linear weight."""
    found = (module_of(name) for name, each in read_initializers(graph).items() if len(each.shape) in (2, 4))
    return list(dict.fromkeys(module for module in found if module is not None))


def module_of(initializer: str) -> str | None:
    """Get the module of an initializer that is a weight or a piece of one."""
    match = _WEIGHT.match(initializer)
    return None if match is None else match["module"]


def merge_lora(graph: Path, deltas: LayerDeltas) -> dict[str, TensorData]:
    """Merge deltas into a graph's weights: the changed initializers, quantized again where they were quantized.

    Raises:
        RequestError, PackageError: a delta has another size than its weight; the graph is damaged.
    """
    return merge_weights(graph, read_initializers(graph), deltas) if deltas else {}


def merge_weights(graph: Path, initializers: Mapping[str, Initializer], deltas: LayerDeltas) -> dict[str, TensorData]:
    """Like `merge_lora`, for some of a graph's ``initializers``: all or none of each layer's."""
    pieces: dict[str, list[Initializer]] = defaultdict(list)
    for name, each in initializers.items():
        module = module_of(name)
        if module is not None and module in deltas:
            pieces[module].append(each)
    merged: dict[str, TensorData] = {}
    for module, parts in pieces.items():
        bias = initializers.get(f"{module}.bias")
        parts.sort(key=lambda piece: int(_parse_name(piece)["start"] or 0))
        layer = _Layer(parts, initializers, None if bias is None else bias.shape[0])
        weight = layer.dequantize()
        for delta, scale in deltas[module]:
            weight = delta.apply(weight, scale)
        merged |= layer.requantize(weight)
    for name in merged:
        if not initializers[name].external:
            raise PackageError(f"{graph} has '{name}' inside of it, where LoRA can't be merged; export it again")
    return merged


def _parse_name(piece: Initializer) -> re.Match[str]:
    match = _WEIGHT.match(piece.name)
    assert match is not None  # noqa: S101 — for the type checker
    return match


class _Layer:
    """The pieces of one layer's weight: linear weights (in, out) or conv weights (out, in, k, k).

    A layer over concatenated inputs has a piece for each input; a gated linear layer (GEGLU) has two pieces of fewer
    outputs, and so has a wide conv. ``outputs`` is the layer's number of outputs, which tells them apart.
    """

    def __init__(self, pieces: Sequence[Initializer], stored: Mapping[str, Initializer], outputs: int | None) -> None:
        self._pieces, self._stored = pieces, stored
        self._by_output = len(pieces) > 1 and (len(pieces[0].shape) == 4 or pieces[0].shape[1] != outputs)

    def dequantize(self) -> Array:
        """Read the whole weight, (out, n), as float32."""
        pieces = [self._read(piece) for piece in self._pieces]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=0 if self._by_output else 1)

    def requantize(self, weight: Array) -> Iterator[tuple[str, TensorData]]:
        """Yield the pieces' initializers for a weight (out, n)."""
        start, axis = 0, 0 if self._by_output else 1
        for piece in self._pieces:
            sides = (piece.shape[1], piece.shape[0]) if len(piece.shape) == 2 else (piece.shape[0], -1)
            stop = start + sides[axis] if len(self._pieces) > 1 else weight.shape[axis]
            part = weight[start:stop] if self._by_output else weight[:, start:stop]
            start = stop
            data = part.T if len(piece.shape) == 2 else part.reshape(piece.shape)
            yield from self._quantize(piece, np.ascontiguousarray(data))

    def _read(self, piece: Initializer) -> Array:
        data = piece.read()
        if _parse_name(piece)["quantized"] is None:
            weight = data.astype(np.float32)
        else:
            weight = dequantize(data, self._stored[f"{piece.name}_scale"].read(), self._axis(piece))
        return weight.T if weight.ndim == 2 else weight.reshape(len(weight), -1)

    def _axis(self, piece: Initializer) -> int:
        """The axis of the scales: in int8 that of outputs, in int4 that of blocks of inputs."""
        outputs = 1 if len(piece.shape) == 2 else 0
        return 1 - outputs if piece.data_type == INT4 else outputs

    def _quantize(self, piece: Initializer, data: Array) -> Iterator[tuple[str, TensorData]]:
        if not np.isfinite(data).all():
            raise RequestError(f"merging LoRA into '{piece.name}' overflows; use a smaller scale")
        if _parse_name(piece)["quantized"] is None:
            yield piece.name, TensorData.of(data, piece.data_type)
            return
        axis, is_int4 = self._axis(piece), piece.data_type == INT4
        scales = (block_scales if is_int4 else channel_scales)(data, axis)
        yield f"{piece.name}_scale", TensorData.of(scales, FLOAT)
        quantized = (quantize_int4 if is_int4 else quantize_int8)(data, scales, axis)
        yield piece.name, TensorData.of(quantized, piece.data_type)
