"""A graph that runs a stage at a time: what `Session` does, with the weights of one stage in memory."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.machine import give_back, give_back_at_once
from sdonnx_runtime.merging import Changes, changed, merged
from sdonnx_runtime.session import Cancelled, Session, matched
from sdonnx_runtime.stages import Stage, Staged, read_stages


class Chain:
    """Opens, runs and closes the stages of a graph one after another; bit by bit what the whole gives.

    Args:
        path: the ``.onnx`` file.
        graph: what it is cut into.
        changes: what adapters do to it. They are merged whenever a stage is opened, which takes its time.
        **how: as `Session` is opened.
    """

    def __init__(self, path: Path, graph: Staged, changes: Changes, **how: Any) -> None:
        self.path = path
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
        for index, stage in enumerate(stages):
            if index + 1 < len(stages):
                _read_ahead(stages[index + 1])
            values |= self._run(stage, values)
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

    def _run(self, stage: Stage, values: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        weights = changed(self.path, stage.weights, self._changes)
        session = self._active = Session(self.path, model=stage.model, weights=weights, frugal=True, **self._how)
        self._how["device"] = session.device  # what auto came to, once for all
        try:
            if self._cancelled:
                raise Cancelled("the run was cancelled")
            return session.run(values)
        finally:
            self._active = None
            del session, weights
            give_back()


Model: TypeAlias = Session | Chain


def open_model(path: Path, changes: Changes, *, low_memory: bool = False, **how: Any) -> Model:
    """A graph as adapters change it: whole, or with ``low_memory`` a stage at a time, where it has several.

    Raises:
        RequestError: a change is of another size than its weight.
        PackageError, DeviceError: as `Session` does; of a graph in stages only when it runs.
    """
    if low_memory:
        give_back_at_once()
        graph = read_stages(path)
        if len(graph.stages) > 1:
            return Chain(path, graph, changes, **how)
    session = Session(path, weights=merged(path, changes), frugal=low_memory, **how)
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
