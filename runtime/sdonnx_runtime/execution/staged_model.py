"""Open a graph for an execution strategy: as one session, as stages run one after another, or in tiles."""

import os
from collections.abc import Collection, Container, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sdonnx_runtime.adapters.merging import LayerDeltas, merge_lora, merge_weights
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.execution.devices.choosing import avoid_unstaged, has_wrap
from sdonnx_runtime.execution.process_memory import trim_heap, unmap_code
from sdonnx_runtime.execution.running.device_array import Tensor, all_numpy
from sdonnx_runtime.execution.running.shared_weights import SharedWeights
from sdonnx_runtime.execution.session import Cancelled, Session, broadcast_batch, missing_input
from sdonnx_runtime.execution.strategy import ExecutionStrategy
from sdonnx_runtime.execution.tiling import run_tiled, run_tiled_with_global_norms
from sdonnx_runtime.graphs.partition import PartitionedGraph, Stage, read_stages
from sdonnx_runtime.packages.variant import MEASURED_STATS, NORM_STATS, USE_NORM_STATS


class Model(Protocol):
    """An open graph."""

    @property
    def device(self) -> str:
        """The name of the device that it runs on."""
        ...

    @property
    def compute(self) -> str:
        """What it computes in: f32, bf16 or f16."""
        ...

    def run(self, feeds: Mapping[str, Tensor], keep: Container[str] = ()) -> dict[str, Any]:
        """Run it; returns all outputs by name, of which those in ``keep`` may be in a device's memory."""
        ...

    def is_open_for(self, feeds: Mapping[str, Tensor]) -> bool:
        """Whether a run on these inputs begins at once; False where something is opened first, which takes time."""
        ...

    def open_for(self, feeds: Mapping[str, Tensor]) -> None:
        """Open what a run on these inputs begins with."""
        ...

    def cancel(self) -> None:
        """Stop the run that another thread is in, if there is one."""
        ...


class _CancellableModel:
    """Runs the active session until it is cancelled."""

    def __init__(self) -> None:
        self._active: Session | None = None
        self._cancelled = False
        self.device, self.compute = "cpu", "f32"
        """What the last run was computed on and in."""

    def is_open_for(self, feeds: Mapping[str, Tensor]) -> bool:
        """True: stages and tiles are opened in a run."""
        return True

    def open_for(self, feeds: Mapping[str, Tensor]) -> None:
        """Open nothing."""

    def cancel(self) -> None:
        """As `Session.cancel`."""
        self._cancelled = True
        if (session := self._active) is not None:
            session.cancel()

    def _run_active(self, feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        if self._cancelled or self._active is None:
            raise Cancelled("the run was cancelled")
        outputs = self._active.run(feeds)
        self.device, self.compute = self._active.device, self._active.compute
        return outputs


class StagedModel(_CancellableModel):
    """Opens, runs and closes the stages of a graph one after another; without tiles, the outputs have the same bits.

    Args:
        path, graph: the ``.onnx`` file and its stages.
        deltas: the changes by adapters; they are merged each time a stage is opened.
        resident_stages: the indices of stages that stay open once they are.
        split_batch: runs each stage for one batch entry after another, where the graph is `batch_independent`.
        tile_size: the side of a tile, for stages that have norm statistics as inputs, in pixels of their input.
        circular: the axes along which tiles go on at the image's opposite border.
        **options: of `Session`.
    """

    def __init__(
        self, path: Path, graph: PartitionedGraph, deltas: LayerDeltas, *, resident_stages: Collection[int] = (),
        split_batch: bool = False, tile_size: int | None = None, circular: str = "", **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.path, self._tile_size, self._circular = path, tile_size, circular
        self._split_batch = split_batch and graph.batch_independent
        self._resident, self._open = resident_stages, dict[int, Session]()
        self._graph, self._deltas, self._options = graph, deltas, options
        self._last_use = {name: index for index, stage in enumerate(graph.stages) for name in stage.inputs}
        self._last_use |= dict.fromkeys(graph.outputs, len(graph.stages))

    def run(self, feeds: Mapping[str, Tensor], keep: Container[str] = ()) -> dict[str, AnyArray]:
        """As `Session.run`; all outputs are numpy arrays."""
        feeds = all_numpy(feeds)
        stages = self._graph.stages
        missing = next((name for name in self._inputs() if name not in feeds), None)
        if missing is not None:
            raise missing_input(self.path, missing, feeds)
        entries = self._batch_entries(broadcast_batch(feeds, self._graph.batch_axes))
        try:
            for index in range(len(stages)):
                if index + 1 < len(stages) and index + 1 not in self._open:
                    _prefetch(stages[index + 1])
                self._run_stage(index, entries)
                for values in entries:
                    for name in [name for name in values if self._last_use.get(name, -1) <= index]:
                        del values[name]
        finally:
            self._cancelled = False
        outputs = [name for name in self._graph.outputs if name != MEASURED_STATS]
        if len(entries) == 1:
            return {name: entries[0][name] for name in outputs}
        return {name: np.concatenate([values[name] for values in entries]) for name in outputs}

    def _inputs(self) -> set[str]:
        """The names of the whole graph's inputs."""
        read = {name for stage in self._graph.stages for name in stage.inputs}
        return read - {NORM_STATS, USE_NORM_STATS} - {name for stage in self._graph.stages for name in stage.outputs}

    def _batch_entries(self, values: Mapping[str, AnyArray]) -> list[dict[str, AnyArray]]:
        """The inputs of each batch entry, or of all together where they aren't split."""
        sizes = {name: len(values[name]) for name in self._graph.batch_axes if name in values}
        count = max(sizes.values(), default=1)
        if not self._split_batch or {*sizes.values()} - {1, count}:
            return [dict(values)]
        split = {name for name, size in sizes.items() if size > 1}
        return [
            {name: value[entry : entry + 1] if name in split else value for name, value in values.items()}
            for entry in range(count)
        ]

    def _run_stage(self, index: int, entries: list[dict[str, AnyArray]]) -> None:
        """Add a stage's outputs to each batch entry's values."""
        self._active = self._open.get(index) or self._open_stage(self._graph.stages[index])
        if index in self._resident and index not in self._open:
            self._open[index] = self._active
            trim_heap()  # the copies of weights that opening it made
        try:
            for values in entries:
                values |= self._run_tiles(index, values)
            self._options["device"] = self._active.device  # what auto came to, once for all stages
        finally:
            self._active = None
            if index not in self._open:
                trim_heap()

    def _run_tiles(self, index: int, values: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """Run a stage, in tiles where it has norm statistics as inputs."""
        inputs = self._graph.stages[index].inputs
        if self._tile_size is None or NORM_STATS not in inputs:
            return self._run_active(values)
        (image,) = {*inputs} - {NORM_STATS, USE_NORM_STATS}
        stats_shape = tuple(int(size) for size in self._graph.inputs[NORM_STATS].shape[1:])
        return run_tiled_with_global_norms(
            self._run_active, {image: values[image]}, self._tile_size, stats_shape, circular=self._circular
        )

    def _open_stage(self, stage: Stage) -> Session:
        weights = merge_weights(self.path, stage.weights, self._deltas)
        session = Session(self.path, model=stage.model, weights=weights, **self._options)
        unmap_code()  # of ONNX Runtime's graph optimizers, mainly
        return session


class TiledModel(_CancellableModel):
    """Runs a session of one input and one output in tiles of a side in pixels of its input; group norms see a tile."""

    def __init__(self, session: Session, tile_size: int, circular: str = "") -> None:
        super().__init__()
        self._active, self._tile_size, self._circular = session, tile_size, circular
        self.is_open_for, self.open_for = session.is_open_for, session.open_for  # for tiles of any size

    def run(self, feeds: Mapping[str, Tensor], keep: Container[str] = ()) -> dict[str, AnyArray]:
        """As `Session.run`; all outputs are numpy arrays."""
        try:
            return run_tiled(self._run_active, all_numpy(feeds), self._tile_size, circular=self._circular)
        finally:
            self._cancelled = False


def open_model(
    path: Path, deltas: LayerDeltas, strategy: ExecutionStrategy, /, *, tile_size: int | None = None,
    shared_weights: SharedWeights | None = None, **options: Any,
) -> Model:  # fmt: skip
    """Open a graph with merged adapters; without stages it runs as one session.

    ``tile_size``, in pixels of the graph's input, replaces the strategy's ``tile``; ``options`` are of `Session`.
    Stages don't use ``shared_weights``, because their own are to be freed with them.
    Raises RequestError if a delta is of another size than its weight, and what `Session` does; in stages, when it runs.
    """
    cut, no_arena, circular = strategy.staged, strategy.no_arena, strategy.circular
    how: dict[str, Any] = {"device": "auto", "target": "generic"}
    how |= {
        name: options[name] for name in ("device", "target", "compute", "graph_compute", "avoided") if name in options
    }
    if cut and tile_size is None:
        options["avoided"] = how["avoided"] = avoid_unstaged(**how)
    options["any_size"] = tile_size is not None
    read = partial(read_stages, path)
    if circular:
        read = partial(read, circular=circular, has_wrap=has_wrap(**how))
    options |= {"kept_sizes": 1} if strategy.one_size else {}
    graph = read(cut=cut) if cut or strategy.split_batch else None
    if graph is not None and (len(graph.stages) > 1 or not cut):
        resident = {index for name, index in strategy.resident_stages if name == path.name} if cut else {0}
        options |= {"split_batch": strategy.split_batch, "tile_size": tile_size, "no_arena": no_arena}
        return StagedModel(path, graph, deltas, resident_stages=resident, circular=circular, **options)
    model = read(cut=False).stages[0].model if circular else None
    session = Session(
        path, model=model, weights=merge_lora(path, deltas), no_arena=no_arena, shared_weights=shared_weights, **options
    )
    if deltas:
        trim_heap()
    unmap_code()
    return session if tile_size is None else TiledModel(session, tile_size, circular)


def _prefetch(stage: Stage) -> None:
    """Have the system read a stage's weights into its cache, in the background."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in {weight.file for weight in stage.weights.values() if weight.external}:
        with file.open("rb") as stream:
            for weight in stage.weights.values():
                if weight.file == file:
                    os.posix_fadvise(stream.fileno(), weight.offset, weight.length, os.POSIX_FADV_WILLNEED)
