"""A graph that runs a stage at a time: what `Session` does, with the weights of one stage in memory."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from sdonnx_runtime.adapters.merging import LayerDeltas, merge_lora, merge_weights
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.execution.process_memory import trim_heap
from sdonnx_runtime.execution.session import Cancelled, Session, broadcast_batch
from sdonnx_runtime.execution.strategy import ExecutionStrategy
from sdonnx_runtime.execution.tiling import run_tiled, run_tiled_with_global_norms
from sdonnx_runtime.graphs.partition import PartitionedGraph, Stage, read_stages
from sdonnx_runtime.packages.manifest import MEASURED_STATS, NORM_STATS, USE_NORM_STATS


class StagedModel:
    """Opens, runs and closes the stages of a graph one after another; but for tiles, bit by bit what the whole gives.

    Args:
        path: the ``.onnx`` file.
        graph: what it is cut into.
        changes: what adapters do to it. They are merged whenever a stage is opened, which takes its time.
        kept: the places of stages that stay open once they are.
        rows: runs each stage for one row after another, where each comes out as it would alone.
        tile: the side of what is worked on at a time by stages that do so, in places of what they are given.
        **how: as `Session` is opened.
    """

    def __init__(
        self,
        path: Path,
        graph: PartitionedGraph,
        changes: LayerDeltas,
        *,
        kept: Collection[int] = (),
        rows: bool = False,
        tile: int | None = None,
        **how: Any,
    ) -> None:
        self.path, self._tile = path, tile
        self._rows = rows and graph.rows_are_apart
        self._kept, self._open = kept, dict[int, Session]()
        self._graph, self._changes, self._how = graph, changes, how
        self._last = {name: index for index, stage in enumerate(self._graph.stages) for name in stage.inputs}
        self._last |= dict.fromkeys(self._graph.outputs, len(self._graph.stages))
        self._active: Session | None = None
        self._cancelled = False

    def run(self, feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """As `Session.run`."""
        stages = self._graph.stages
        missing = next((name for name in self._inputs() if name not in feeds), None)
        if missing is not None:
            raise PackageError(
                f"{self.path} wants an input '{missing}' that this version can't give; it gives {', '.join(feeds)}"
            )
        rows = self._apart(broadcast_batch(feeds, self._graph.leading))
        try:
            for index in range(len(stages)):
                if index + 1 < len(stages) and index + 1 not in self._open:
                    _read_ahead(stages[index + 1])
                self._run(index, rows)
                for row in rows:
                    for name in [name for name in row if self._last.get(name, -1) <= index]:
                        del row[name]
        finally:
            self._cancelled = False
        outputs = [name for name in self._graph.outputs if name != MEASURED_STATS]
        if len(rows) == 1:
            return {name: rows[0][name] for name in outputs}
        return {name: np.concatenate([row[name] for row in rows]) for name in outputs}

    def cancel(self) -> None:
        """As `Session.cancel`."""
        self._cancelled = True
        session = self._active
        if session is not None:
            session.cancel()

    def _inputs(self) -> set[str]:
        """Of the whole."""
        read = {name for stage in self._graph.stages for name in stage.inputs}
        return read - {NORM_STATS, USE_NORM_STATS} - {name for stage in self._graph.stages for name in stage.outputs}

    def _apart(self, values: Mapping[str, AnyArray]) -> list[dict[str, AnyArray]]:
        """What each row is given, or all together."""
        counts = {name: len(values[name]) for name in self._graph.leading if name in values}
        count = max(counts.values(), default=1)
        if not self._rows or {*counts.values()} - {1, count}:
            return [dict(values)]
        split = {name for name, found in counts.items() if found > 1}
        return [
            {name: value[row : row + 1] if name in split else value for name, value in values.items()}
            for row in range(count)
        ]

    def _run(self, index: int, rows: list[dict[str, AnyArray]]) -> None:
        """Adds what a stage gives to each row's values."""
        session = self._active = self._open.get(index) or self._opened(self._graph.stages[index])
        if index in self._kept and index not in self._open:
            self._open[index] = session
            trim_heap()  # what opening it took besides
        try:
            for row in rows:
                row |= self._made(session, index, row)
        finally:
            self._active = None
            del session
            if index not in self._open:
                trim_heap()

    def _made(self, session: Session, index: int, values: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """What a stage gives, in tiles if it works on those."""

        def run(feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
            if self._cancelled:
                raise Cancelled("the run was cancelled")
            return session.run(feeds)

        inputs = self._graph.stages[index].inputs
        if self._tile is None or NORM_STATS not in inputs:
            return run(values)
        (picture,) = {*inputs} - {NORM_STATS, USE_NORM_STATS}
        norms = tuple(int(size) for size in self._graph.inputs[NORM_STATS].sizes[1:])
        return run_tiled_with_global_norms(run, {picture: values[picture]}, self._tile, norms)

    def _opened(self, stage: Stage) -> Session:
        weights = merge_weights(self.path, stage.weights, self._changes)
        session = Session(self.path, model=stage.model, weights=weights, **self._how)
        self._how["device"] = session.device  # what auto came to, once for all
        return session


class TiledModel:
    """Runs a session tile by tile; its norms see a tile."""

    def __init__(self, session: Session, side: int) -> None:
        self.path, self._session, self._side = session.path, session, side
        self._cancelled = False

    def run(self, feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """As `Session.run`."""

        def run(feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
            if self._cancelled:
                raise Cancelled("the run was cancelled")
            return self._session.run(feeds)

        try:
            return run_tiled(run, feeds, self._side)
        finally:
            self._cancelled = False

    def cancel(self) -> None:
        """As `Session.cancel`."""
        self._cancelled = True
        self._session.cancel()


Model: TypeAlias = Session | StagedModel | TiledModel


def open_model(path: Path, changes: LayerDeltas, way: ExecutionStrategy, **how: Any) -> Model:
    """A graph as adapters change it, to be run in a way; one without stages is whole.

    A tile's side is in places of what the graph is given.

    Raises:
        RequestError: a change is of another size than its weight.
        PackageError, DeviceError: as `Session` does; of a graph in stages only when it runs.
    """
    graph = read_stages(path, cut=way.staged) if way.staged or way.rows else None
    if graph is not None and (len(graph.stages) > 1 or not way.staged):
        kept = {place for name, place in way.kept if name == path.name} if way.staged else {0}
        return StagedModel(path, graph, changes, kept=kept, rows=way.rows, tile=way.tile, frugal=way.frugal, **how)
    session = Session(path, weights=merge_lora(path, changes), frugal=way.frugal, **how)
    if changes:
        trim_heap()
    return session if way.tile is None else TiledModel(session, way.tile)


def _read_ahead(stage: Stage) -> None:
    """Tells the system that a stage's weights will be wanted soon."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in {weight.file for weight in stage.weights.values() if weight.external}:
        mine = [weight for weight in stage.weights.values() if weight.file == file]
        with file.open("rb") as stream:
            for weight in mine:
                os.posix_fadvise(stream.fileno(), weight.offset, weight.length, os.POSIX_FADV_WILLNEED)
