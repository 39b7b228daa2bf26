"""Merging of LoRA into a package's weights: matching files, and the merged initializers."""

import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import numpy as np

from sdonnx_runtime.adapters.lora import Lora, ParameterDelta
from sdonnx_runtime.adapters.lora_matching import claimed_family, match_file
from sdonnx_runtime.adapters.quantization import block_scales, channel_scales, dequantize, quantize_int4, quantize_int8
from sdonnx_runtime.adapters.textual_inversion import Embedding, read_bundled
from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.files.tensor_file import TensorFile
from sdonnx_runtime.files.tensors import open_tensors
from sdonnx_runtime.graphs.initializers import FLOAT, INT4, Initializer, TensorData, read_initializers
from sdonnx_runtime.packages.families import FAMILIES
from sdonnx_runtime.packages.package import Package

logger = logging.getLogger(__name__)

LayerDeltas: TypeAlias = Mapping[str, Sequence[tuple[ParameterDelta, float]]]
"""A component's deltas with their scales, by parameter, such as ``mid_block.attentions.0.proj_in.weight``."""

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
    parameters = {name: _parameters(package.graph(name)) for name in components}
    return match_loras(
        package.name, parameters, loras, family=package.manifest.family, ignore_unmatched=ignore_unmatched
    )


def match_loras(
    model: str, parameters: Mapping[str, Collection[str]], loras: Sequence[Lora], *, family: str | None = None,
    ignore_unmatched: bool = False,
) -> Adapters:  # fmt: skip
    """Match LoRA files to a model's parameters, such as ``mid_block.attentions.0.proj_in.weight``, by component.

    ``family`` is the model's, if it is known. It raises as `load_adapters` does.
    """
    deltas: dict[str, dict[str, list[tuple[ParameterDelta, float]]]] = defaultdict(lambda: defaultdict(list))
    embeddings: dict[Path, list[Embedding]] = {}  # of a file that is given twice, once
    for lora in loras:
        file = open_tensors(lora.path)
        bundled, keys = read_bundled(file)
        embeddings[lora.path] = bundled
        match = match_file(file, model, parameters, keys)
        problems = _describe_left_over(file, match.left_over) + _describe_foreign(file, model, family)
        is_left = len(match.left_over) == len(file.shapes)
        if is_left or (problems and not ignore_unmatched):
            raise RequestError(_refuse(file, problems, is_left=is_left))
        if problems:
            logger.warning("%s: %s; this is ignored", file.path, "; ".join(problems))
        for (component, parameter), delta in match.deltas.items():
            if lora.scale_of(component) != 0:
                deltas[component][parameter].append((delta, lora.scale_of(component)))
    merged = {component: dict(each) for component, each in deltas.items()}
    return Adapters(loras=tuple(loras), deltas=merged, embeddings=tuple(chain(*embeddings.values())))


def _describe_left_over(file: TensorFile, left_over: Mapping[str, str]) -> list[str]:
    """Describe the tensors that can't be applied, by reason."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for key, reason in left_over.items():
        reasons[reason].append("".join(each if each.isprintable() else "?" for each in key[:150]))
    return [
        f"{len(keys)} of {len(file.shapes)} tensors {reason} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        for reason, keys in reasons.items()
    ]


def _describe_foreign(file: TensorFile, model: str, family: str | None) -> list[str]:
    """Say that a file is for another family, if its metadata says so."""
    claimed = claimed_family(file.metadata)
    if claimed is None or family is None or claimed == family:
        return []
    return [f"its metadata says that it is for {FAMILIES[claimed].title}, {model} is {FAMILIES[family].title}"]


def _refuse(file: TensorFile, problems: Sequence[str], *, is_left: bool) -> str:
    remedy = "use a LoRA or LyCORIS file that was trained for this kind of model"
    if not is_left:
        remedy += ", or ignore this with --lora-ignore-unmatched (ignore_unmatched=True)"
    return f"{file.path}: {'; '.join(problems) or 'it has no tensors'}; {remedy}"


def _parameters(graph: Path) -> set[str]:
    """The names of a graph's weights and biases, as checkpoints have them."""
    return {parameter for name in read_initializers(graph) if (parameter := parameter_of(name)) is not None}


def parameter_of(initializer: str) -> str | None:
    """Get the parameter of an initializer that is a bias, a weight or a piece of one."""
    match = _WEIGHT.match(initializer)
    if match is not None:
        return f"{match['module']}.weight"
    return initializer if initializer.endswith(".bias") else None


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
        parameter = parameter_of(name)
        if parameter is not None and parameter in deltas:
            pieces[parameter].append(each)
    merged: dict[str, TensorData] = {}
    for parameter, parts in pieces.items():
        if parameter.endswith(".bias"):
            merged |= _merge_bias(parts[0], deltas[parameter])
        else:
            bias = initializers.get(f"{parameter.removesuffix('.weight')}.bias")
            merged |= _merge_pieces(parts, initializers, None if bias is None else bias.shape[0], deltas[parameter])
    return merged


def _merge_bias(bias: Initializer, deltas: Sequence[tuple[ParameterDelta, float]]) -> dict[str, TensorData]:
    values = bias.read().astype(np.float32)
    for delta, scale in deltas:
        values = delta.apply(values, scale)
    return {bias.name: _store(bias, values)}


def _merge_pieces(
    parts: list[Initializer], stored: Mapping[str, Initializer], outputs: int | None,
    deltas: Sequence[tuple[ParameterDelta, float]],
) -> dict[str, TensorData]:  # fmt: skip
    parts.sort(key=lambda piece: int(_parse_name(piece)["start"] or 0))
    layer = _Layer(parts, stored, outputs)
    weight = layer.dequantize()
    for delta, scale in deltas:
        weight = delta.apply(weight, scale)
    return dict(layer.requantize(weight))


def _store(initializer: Initializer, values: Array) -> TensorData:
    """Convert merged values that aren't quantized to an initializer's type."""
    if not max(values.max(), -values.min()) <= np.finfo(initializer.dtype).max:  # without a copy; false of NaN
        raise RequestError(f"merging LoRA into '{initializer.name}' overflows; use a smaller scale")
    return TensorData.of(values, initializer.data_type, is_inline=not initializer.external)


def _parse_name(piece: Initializer) -> re.Match[str]:
    match = _WEIGHT.match(piece.name)
    assert match is not None  # noqa: S101 — for the type checker
    return match


def _from_stored(piece: Initializer, weight: Array) -> Array:
    """A weight in the checkpoint's layout, (out, n), from its initializer's."""
    if weight.ndim == 2:
        return weight.T
    weight = weight.transpose(0, 3, 1, 2) if piece.is_channels_last else weight
    return weight.reshape(len(weight), -1)


def _to_stored(piece: Initializer, weight: Array) -> Array:
    """The inverse of `_from_stored`."""
    if len(piece.shape) == 2:
        return weight.T
    if not piece.is_channels_last:
        return weight.reshape(piece.shape)
    outputs, height, width, inputs = piece.shape
    return weight.reshape(outputs, inputs, height, width).transpose(0, 2, 3, 1)


class _Layer:
    """The pieces of one layer's weight: linear weights (in, out), as 1x1 convolutions may be too, or conv weights.

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
            yield from self._quantize(piece, np.ascontiguousarray(_to_stored(piece, part)))

    def _read(self, piece: Initializer) -> Array:
        data = piece.read()
        if _parse_name(piece)["quantized"] is None:
            weight = data.astype(np.float32)
        else:
            weight = dequantize(data, self._stored[f"{piece.name}_scale"].read(), self._axis(piece))
        return _from_stored(piece, weight)

    def _axis(self, piece: Initializer) -> int:
        """The axis of the scales: in int8 that of outputs, in int4 that of blocks of inputs."""
        outputs = 1 if len(piece.shape) == 2 else 0
        return 1 - outputs if piece.data_type == INT4 else outputs

    def _quantize(self, piece: Initializer, data: Array) -> Iterator[tuple[str, TensorData]]:
        if _parse_name(piece)["quantized"] is None:
            yield piece.name, _store(piece, data)
            return
        if not np.isfinite(data).all():
            raise RequestError(f"merging LoRA into '{piece.name}' overflows; use a smaller scale")
        axis, is_int4 = self._axis(piece), piece.data_type == INT4
        scales = (block_scales if is_int4 else channel_scales)(data, axis)
        stored = self._stored[f"{piece.name}_scale"]
        yield stored.name, TensorData.of(scales, FLOAT, is_inline=not stored.external)
        quantized = (quantize_int4 if is_int4 else quantize_int8)(data, scales, axis)
        yield piece.name, TensorData.of(quantized, piece.data_type, is_inline=not piece.external)
