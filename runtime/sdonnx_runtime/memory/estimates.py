"""Estimate the memory of each stage of a graph: its own, and the values that other stages need meanwhile."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod
from pathlib import Path

from sdonnx_runtime.adapters.merging import parameter_of
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.execution.tiling import spans_with_margins, tile_offsets, tiled_sizes
from sdonnx_runtime.graphs.initializers import INT4
from sdonnx_runtime.graphs.partition import Stage, read_stages
from sdonnx_runtime.graphs.shape_inference import TensorInfo, unsupported_graphs
from sdonnx_runtime.memory import constants
from sdonnx_runtime.memory.footprint import Footprint, footprint
from sdonnx_runtime.memory.openvino import Compilation, compiled_footprint
from sdonnx_runtime.packages.variant import NORM_STATS


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A graph and the shapes of its inputs."""

    path: Path
    inputs: tuple[tuple[str, TensorInfo], ...]
    tile_size: int | None = None
    """The side of its tiles, in pixels of its input; None runs it on the whole image."""
    margin: int | None = None
    """What tiles overlap on each side, where each runs alone through the whole graph; None is a VAE's tiles."""
    multiple: int = 1
    """What the sides of such tiles are multiples of."""
    adapted: frozenset[str] = frozenset()
    """The weights and biases that adapters change."""
    circular: str = ""
    """The axes along which its convolutions pad circularly."""
    compiled: Compilation | None = None
    """How OpenVINO compiles it; None runs it on ONNX Runtime's CPU provider."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StageEstimate:
    """The memory of a stage among the others of its graph."""

    key: tuple[str, int]
    """Its graph's file and its index."""
    footprint: Footprint
    live_bytes: int
    """Bytes of the values that this stage and later ones need while it runs."""
    runs: float
    """How often it runs, for batch entries or tiles of the size that its footprint is of."""
    merged: int
    """Bytes of the weights that adapters change, which are in addition to the session's."""
    copied: int
    """Bytes of another copy of these while it is being opened."""
    merging: int
    """The peak while these are merged, one after another in float32."""

    @property
    def open_bytes(self) -> int:
        """Bytes while it is open."""
        return self.footprint.weights + self.merged

    @property
    def opening_peak_bytes(self) -> int:
        """The peak while it is being opened."""
        return max(self.footprint.opening + self.merged + self.copied, self.merging)


_MERGED_COPIES = 2
"""Of merged weights, where OpenVINO's plugin has its own."""


def estimate_stages(graph: Graph, cut: bool, split_batch: bool = False) -> tuple[StageEstimate, ...]:
    """Estimate all stages of a graph, or without ``cut`` the graph as one; results are cached.

    Raises UnsupportedGraph or PackageError as `planner.make_plan` does.
    """
    try:
        with unsupported_graphs():
            return _cached_estimates(graph, cut, split_batch, graph.path.stat().st_mtime_ns)
    except OSError as error:
        raise PackageError(f"{graph.path} can't be read ({error.strerror}); run 'sdonnx export' again") from None


@lru_cache(maxsize=64)
def _cached_estimates(graph: Graph, cut: bool, split_batch: bool, _modified: int) -> tuple[StageEstimate, ...]:
    whole, estimates = read_stages(graph.path, cut=cut, circular=graph.circular), list[StageEstimate]()
    measure = footprint if graph.compiled is None else partial(compiled_footprint, how=graph.compiled)
    values, tiles = one_tile(graph)
    splits = split_batch and whole.batch_independent
    count = max((values[name].shape[0] for name in whole.batch_axes), default=1) if splits else 1
    if count > 1:
        values |= {name: replace(values[name], shape=(1, *values[name].shape[1:])) for name in whole.batch_axes}
    last_use = {name: index for index, stage in enumerate(whole.stages) for name in stage.inputs}
    last_use |= dict.fromkeys(whole.outputs, len(whole.stages))
    alive = set(values)
    for index, stage in enumerate(whole.stages):
        live = count * sum(values[name].nbytes for name in alive)
        inputs, runs = {name: values[name] for name in stage.inputs}, float(count * tiles)
        if graph.tile_size is not None and graph.margin is None and (NORM_STATS in inputs or len(whole.stages) == 1):
            taken, runs = _tiled_footprint(measure, stage, inputs, graph.tile_size, graph.circular)
        else:
            taken = measure(stage, inputs)
        live += (count - 1) * sum(value.nbytes for value in taken.outputs.values())  # of earlier batch entries
        merged, merging = merging_bytes(stage, graph.adapted)
        key, kept = (graph.path.name, index), merged * (1 if graph.compiled is None else _MERGED_COPIES)
        sizes = {"merged": kept, "copied": merged, "merging": merging}
        estimates.append(StageEstimate(key=key, footprint=taken, live_bytes=live, runs=runs, **sizes))
        values |= taken.outputs
        alive = {name for name in {*alive, *stage.outputs} if last_use.get(name, -1) > index}
    return tuple(estimates)


def one_tile(graph: Graph) -> tuple[dict[str, TensorInfo], int]:
    """The inputs of a graph, for one tile where it has a margin; and how many of these there are."""
    values, side, margin = dict(graph.inputs), graph.tile_size, graph.margin
    if side is None or margin is None:
        return values, 1
    ((name, image),) = values.items()
    spans = [spans_with_margins(size, side, margin, graph.multiple) for size in image.shape[2:]]
    sides = (each[0].stop - each[0].start for each in spans)
    return {name: replace(image, shape=(*image.shape[:2], *sides))}, prod(len(each) for each in spans)


def merging_bytes(stage: Stage, parameters: frozenset[str]) -> tuple[int, int]:
    """Bytes of a stage's weights that adapters change, and the peak while they are merged."""
    stored, widest = Counter[str](), Counter[str]()
    for name, weight in stage.weights.items():
        parameter = parameter_of(name)
        if parameter is not None and parameter in parameters:
            copies = constants.MERGE_CONV if len(weight.shape) == 4 else constants.MERGE_LINEAR
            copies += constants.MERGE_INT4 * (weight.data_type == INT4)
            stored[parameter] += weight.length
            widest[parameter] += int(4 * prod(weight.shape) * copies)
    merged = peak = 0
    for parameter, size in widest.items():
        peak = max(peak, merged + size)
        merged += stored[parameter]
    return merged, peak


def _tiled_footprint(
    measure: Callable[[Stage, Mapping[str, TensorInfo]], Footprint], stage: Stage, inputs: Mapping[str, TensorInfo],
    tile_size: int, circular: str,
) -> tuple[Footprint, float]:  # fmt: skip
    """The footprint of a stage for a tile, with the outputs of all tiles, and how often it runs."""
    ((name, image),) = [(name, value) for name, value in inputs.items() if len(value.shape) == 4]
    whole, normed = image.shape[2:], NORM_STATS in inputs
    tile = tuple(min(size, tile_size) for size in whole)
    taken = measure(stage, {**inputs, name: replace(image, shape=(*image.shape[:2], *tile))})
    outputs = {
        name: replace(
            value, shape=(*value.shape[:2], *(size * whole[i] // tile[i] for i, size in enumerate(value.shape[2:])))
        )
        for name, value in taken.outputs.items()
        if len(value.shape) == 4
    }
    pixels = prod(
        sum(min(tile_size, size - offset) for offset in tile_offsets(size, tile_size, normed=normed))
        for size in tiled_sizes(whole, tile_size, circular)
    )
    pixels += 2 * prod(whole) if normed and tile != whole else 0  # to measure norm statistics
    return replace(taken, outputs={**taken.outputs, **outputs}), pixels / prod(tile)


def graph_outputs(graph: Graph) -> Mapping[str, TensorInfo]:
    """Infer the shapes of a graph's outputs; raises what `estimate_stages` does."""
    return estimate_stages(graph, cut=False)[-1].footprint.outputs
