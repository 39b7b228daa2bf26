"""A graph that runs a stage at a time: what `Session` does, with the weights of one stage in memory."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.machine import give_back
from sdonnx_runtime.merging import Changes, changed, merged
from sdonnx_runtime.planning import Way
from sdonnx_runtime.session import Cancelled, Session, matched
from sdonnx_runtime.stages import Stage, Staged, read_stages


class Chain:
    """Opens, runs and closes the stages of a graph one after another; bit by bit what the whole gives.

    Args:
        path: the ``.onnx`` file.
        graph: what it is cut into.
        changes: what adapters do to it. They are merged whenever a stage is opened, which takes its time.
        kept: the places of stages that stay open once they are.
        **how: as `Session` is opened.
    """

    def __init__(self, path: Path, graph: Staged, changes: Changes, *, kept: Collection[int] = (), **how: Any) -> None:
        self.path = path
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
        values = matched(feeds, self._graph.leading)
        self._cancelled = False
        for index in range(len(stages)):
            if index + 1 < len(stages) and index + 1 not in self._open:
                _read_ahead(stages[index + 1])
            values |= self._run(index, values)
            values = {name: value for name, value in values.items() if self._last.get(name, -1) > index}
        return {name: values[name] for name in self._graph.outputs}

    def cancel(self) -> None:
        """As `Session.cancel`."""
        self._cancelled = True
        session = self._active
        if session is not None:
            session.cancel()

    def _inputs(self) -> set[str]:
        """Of the whole."""
        read = {name for stage in self._graph.stages for name in stage.inputs}
        return read - {name for stage in self._graph.stages for name in stage.outputs}

    def _run(self, index: int, values: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        session = self._active = self._open.get(index) or self._opened(self._graph.stages[index])
        if index in self._kept and index not in self._open:
            self._open[index] = session
            give_back()  # what opening it took besides
        try:
            if self._cancelled:
                raise Cancelled("the run was cancelled")
            return session.run(values)
        finally:
            self._active = None
            del session
            if index not in self._open:
                give_back()

    def _opened(self, stage: Stage) -> Session:
        weights = changed(self.path, stage.weights, self._changes)
        session = Session(self.path, model=stage.model, weights=weights, **self._how)
        self._how["device"] = session.device  # what auto came to, once for all
        return session


Model: TypeAlias = Session | Chain


def open_model(path: Path, changes: Changes, way: Way, **how: Any) -> Model:
    """A graph as adapters change it, to be run in a way; one without stages is whole.

    Raises:
        RequestError: a change is of another size than its weight.
        PackageError, DeviceError: as `Session` does; of a graph in stages only when it runs.
    """
    graph = read_stages(path) if way.staged else None
    if graph is not None and len(graph.stages) > 1:
        kept = {place for name, place in way.kept if name == path.name}
        return Chain(path, graph, changes, kept=kept, frugal=way.frugal, **how)
    session = Session(path, weights=merged(path, changes), frugal=way.frugal, **how)
    if changes:
        give_back()
    return session


def _read_ahead(stage: Stage) -> None:
    """Tells the system that a stage's weights will be wanted soon."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in {weight.file for weight in stage.weights.values() if weight.external}:
        mine = [weight for weight in stage.weights.values() if weight.file == file]
        with file.open("rb") as stream:
            for weight in mine:
                os.posix_fadvise(stream.fileno(), weight.offset, weight.length, os.POSIX_FADV_WILLNEED)
