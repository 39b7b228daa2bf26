"""Adapters and a package's weights: which change which, and what a graph's weights are with them."""

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
"""What is done to a component's modules, each with its scale."""

_WEIGHT = re.compile(r"(?P<module>.+)\.weight(?:_(?P<start>\d+))?(?P<codes>_codes)?$")
"""A module's weight in a graph, or its codes; or one of several pieces."""


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """What is applied to a package."""

    loras: tuple[Lora, ...] = ()
    changes: Mapping[str, LayerDeltas] = field(default_factory=dict[str, LayerDeltas])
    """What that does, by component."""
    embeddings: tuple[Embedding, ...] = ()
    """The words that its text encoders are taught."""


def load_adapters(package: Package, loras: Sequence[Lora], *, lenient: bool = False) -> Adapters:
    """Finds each layer that adapters change.

    Args:
        package: exported by sdonnx, so that its weights have their checkpoint's names.
        loras: applied in this order; of those of scale 0 it is only seen whether they fit.
        lenient: leaves out what is for layers that the package doesn't have.

    Raises:
        RequestError: a file can't be read, or is for another model; without ``lenient`` also for a part of it.
        PackageError: the package is damaged.
    """
    if not loras:
        return Adapters()
    if package.foreign:
        raise RequestError(
            f"{package.root} was exported by another program, which gives up the names of weights that adapters are "
            "for; export its checkpoint with 'sdonnx export'"
        )
    modules = {name: _modules(package.graph(name)) for name in _adapted(package)}
    return Adapters(loras=tuple(loras), changes=match_keys(package.name, modules, loras, lenient=lenient))


def match_keys(
    model: str, modules: Mapping[str, Sequence[str]], loras: Sequence[Lora], *, lenient: bool = False
) -> dict[str, LayerDeltas]:
    """What adapters do to a model of these ``modules`` by component, such as ``mid_block.attentions.0.proj_in``.

    Raises:
        RequestError: as `load_adapters` does.
    """
    names = {component: known_names(each) for component, each in modules.items()}
    found: dict[str, dict[str, list[tuple[LayerDelta, float]]]] = defaultdict(lambda: defaultdict(list))
    for lora in loras:
        file = read_lora(lora.path)
        left = list(file.strange)
        for (component, spelled), change in file.changes.items():
            module = names.get(component, {}).get(spelled)
            if module is None:
                left.extend(change.names.values())
            else:
                found[component][module].append((change, lora.scale))
        total = len(file.strange) + sum(len(change.names) for change in file.changes.values())
        if left and (not lenient or len(left) == total):
            raise RequestError(
                f"{lora.path}: {len(left)} of its {total} tensors have no place in {model} "
                f"({', '.join(left[:3])}{', …' if len(left) > 3 else ''}); take one that was made for this kind of "
                "model, or leave them out with --lora-lenient (lenient=True)"
            )
        if left:
            logger.warning("%s: %d of its %d tensors have no place and are left out", lora.path, len(left), total)
    return {component: _of_some_scale(each) for component, each in found.items()}


def _of_some_scale(modules: LayerDeltas) -> LayerDeltas:
    kept = {name: [(change, scale) for change, scale in each if scale != 0] for name, each in modules.items()}
    return {name: each for name, each in kept.items() if each}


def _adapted(package: Package) -> list[str]:
    """The components that adapters are of."""
    return ["unet", *(encoder.component for encoder in package.manifest.text_encoders)]


def _modules(graph: Path) -> list[str]:
    """The modules that have a weight which adapters can change."""
    found = (module_of(name) for name, each in read_initializers(graph).items() if len(each.shape) in (2, 4))
    return list(dict.fromkeys(module for module in found if module is not None))


def module_of(initializer: str) -> str | None:
    """The module whose weight, or a piece of it, an initializer is."""
    match = _WEIGHT.match(initializer)
    return None if match is None else match["module"]


def merge_lora(graph: Path, changes: LayerDeltas) -> dict[str, TensorData]:
    """A graph's initializers that the changes touch, as they are with them; what is in codes is rounded anew.

    Raises:
        RequestError: a change is of another size than its weight.
        PackageError: the graph is damaged.
    """
    return merge_weights(graph, read_initializers(graph), changes) if changes else {}


def merge_weights(graph: Path, initializers: Mapping[str, Initializer], changes: LayerDeltas) -> dict[str, TensorData]:
    """Like `merge_lora`, of some of a graph's ``initializers``; those of a layer are all there, or none."""
    pieces: dict[str, list[Initializer]] = defaultdict(list)
    for name, each in initializers.items():
        match = _WEIGHT.match(name)
        if match is not None and match["module"] in changes:
            pieces[match["module"]].append(each)

    found: dict[str, TensorData] = {}
    for module, mine in pieces.items():
        bias = initializers.get(f"{module}.bias")
        mine.sort(key=lambda piece: int(_matched(piece)["start"] or 0))
        layer = _Layer(mine, initializers, None if bias is None else bias.shape[0])
        weight = layer.whole()
        for change, scale in changes[module]:
            weight = change(weight, scale)
        found |= layer.written(weight)
    for name in found:
        if not initializers[name].external:
            raise PackageError(f"{graph} has '{name}' within it, where no adapter can reach it; export it again")
    return found


def _matched(piece: Initializer) -> re.Match[str]:
    match = _WEIGHT.match(piece.name)
    assert match is not None  # noqa: S101 — for the type checker
    return match


class _Layer:
    """The pieces that one layer's weight is stored in: matrices (in, out), kernels (out, in, k, k).

    One that reads two pictures' channels has a piece for each, of fewer inputs; one that gates has two pieces of
    fewer outputs. How many there are the ``outputs`` tell. A wide kernel has pieces of fewer outputs.
    """

    def __init__(self, pieces: Sequence[Initializer], stored: Mapping[str, Initializer], outputs: int | None) -> None:
        self._pieces, self._stored = pieces, stored
        self._by_output = len(pieces) > 1 and (len(pieces[0].shape) == 4 or pieces[0].shape[1] != outputs)

    def whole(self) -> Array:
        """(out, n) in float32."""
        pieces = [self._read(piece) for piece in self._pieces]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=0 if self._by_output else 1)

    def written(self, weight: Array) -> Iterator[tuple[str, TensorData]]:
        """The pieces' initializers of a weight (out, n)."""
        start, axis = 0, 0 if self._by_output else 1
        for piece in self._pieces:
            sides = (piece.shape[1], piece.shape[0]) if len(piece.shape) == 2 else (piece.shape[0], -1)
            stop = start + sides[axis] if len(self._pieces) > 1 else weight.shape[axis]
            part = weight[start:stop] if self._by_output else weight[:, start:stop]
            start = stop
            data = part.T if len(piece.shape) == 2 else part.reshape(piece.shape)
            yield from self._coded(piece, np.ascontiguousarray(data))

    def _read(self, piece: Initializer) -> Array:
        data = piece.read()
        if _matched(piece)["codes"] is None:
            wide = data.astype(np.float32)
        else:
            wide = dequantize(data, self._stored[f"{piece.name}_scale"].read(), self._axis(piece))
        return wide.T if wide.ndim == 2 else wide.reshape(len(wide), -1)

    def _axis(self, piece: Initializer) -> int:
        """Which its scales lie along: in 8 bits outputs, in 4 bits blocks of inputs."""
        outputs = 1 if len(piece.shape) == 2 else 0
        return 1 - outputs if piece.data_type == INT4 else outputs

    def _coded(self, piece: Initializer, data: Array) -> Iterator[tuple[str, TensorData]]:
        if not np.isfinite(data).all():
            raise RequestError(f"with its adapters '{piece.name}' has values that are not finite; give a smaller scale")
        if _matched(piece)["codes"] is None:
            yield piece.name, TensorData.of(data, piece.data_type)
            return
        axis, in_4_bits = self._axis(piece), piece.data_type == INT4
        scales = (block_scales if in_4_bits else channel_scales)(data, axis)
        yield f"{piece.name}_scale", TensorData.of(scales, FLOAT)
        yield (
            piece.name,
            TensorData.of((quantize_int4 if in_4_bits else quantize_int8)(data, scales, axis), piece.data_type),
        )
