"""A package's components as sessions: opened when first needed, released when done, stoppable from any thread."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from sdonnx_runtime.adapters.merging import LayerDeltas
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.execution.arena import empty_arena
from sdonnx_runtime.execution.process_memory import set_malloc_thresholds
from sdonnx_runtime.execution.session import Cancelled
from sdonnx_runtime.execution.staged_model import Model
from sdonnx_runtime.execution.strategy import ExecutionStrategy
from sdonnx_runtime.execution.timings import Timings
from sdonnx_runtime.packages.manifest import TILED
from sdonnx_runtime.packages.package import Package

REFINER = "refiner/"
"""What the names of a refiner's components begin with."""


class Components:
    """The sessions of one pipeline.

    Args:
        package: where the graphs are.
        open_session: opens a graph file, with what adapters do to it, to be run in a way.
        keep_loaded: makes `release` do nothing.
        others: where those of components are whose names begin so, up to the slash.
        ways: how components are run; those not in it, whole.
    """

    def __init__(
        self,
        package: Package,
        open_session: Callable[[Path, LayerDeltas, ExecutionStrategy], Model],
        *,
        keep_loaded: bool,
        others: Mapping[str, Package] = MappingProxyType({}),
        ways: Mapping[str, ExecutionStrategy] = MappingProxyType({}),
    ) -> None:
        self._busy = threading.Lock()
        self._package, self._others = package, others
        self._open_session, self._keep_loaded = open_session, keep_loaded
        self._sessions: dict[tuple[str, str], Model] = {}
        self._changes: Mapping[str, LayerDeltas] = {}
        self._ways = ways

    def session(self, name: str, variant: str = "plain") -> Model:
        """The session of a component's variant, opened if it is not."""
        key = name, variant
        if key not in self._sessions:
            place, slash, component = name.rpartition("/")
            package, way = self._others.get(place + slash, self._package), self._way(name)
            if way.tile is not None and TILED in package.manifest.components[component].graphs:
                variant = TILED
            graph = package.graph(component, variant)
            self._sessions[key] = self._open_session(graph, self._changes.get(name, {}), way)
        return self._sessions[key]

    def _way(self, name: str) -> ExecutionStrategy:
        """How a component is run, with a tile's side in places of what it is given."""
        way, pixels = self._ways.get(name, ExecutionStrategy()), self._package.manifest.latents.downscale
        sides = {} if way.tile is None else {"vae_decoder": way.tile, "vae_encoder": way.tile * pixels}
        return replace(way, tile=sides.get(name))

    def release(self, name: str) -> None:
        """Unloads a component, unless components are kept."""
        if not self._keep_loaded:
            self._close({name})

    @contextmanager
    def reserved(
        self, changes: Mapping[str, LayerDeltas] | None = None, ways: Mapping[str, ExecutionStrategy] | None = None
    ) -> Generator[None, None, None]:
        """For one generation at a time; at its end components are unloaded, unless they are kept.

        Args:
            changes: what adapters do to the package's components from now on; None is what they did.
            ways: how components are run from now on; None is as they were.

        Raises:
            RequestError: another generation is under way.
        """
        if not self._busy.acquire(blocking=False):
            raise RequestError("this pipeline is making another picture; finish or close that stream first")
        try:
            if changes is not None:
                self._close(_differing(changes, self._changes))
                self._changes = changes
            if ways is not None:
                self._close(_differing(ways, self._ways))
                self._ways = ways
            if not self._keep_loaded:  # before any has put its own about
                set_malloc_thresholds(one_heap=any(way.frugal for way in self._ways.values()))
            yield
        finally:
            for name, _ in list(self._sessions):
                self.release(name)
            self._busy.release()

    def close(self) -> None:
        """Unloads every component."""
        self._close({name for name, _ in self._sessions})

    def _close(self, names: Collection[str]) -> None:
        left = {key: session for key, session in self._sessions.items() if key[0] not in names}
        if len(left) < len(self._sessions):
            self._sessions = left
            empty_arena()


def _differing(new: Mapping[str, object], old: Mapping[str, object]) -> set[str]:
    """The names that stand for something else in one than in the other, or are in one alone."""
    return {name for name in {*new, *old} if new.get(name) != old.get(name)}


class Runner:
    """Runs components for one generation: takes the time of each, and can be cancelled."""

    def __init__(self, components: Components) -> None:
        self.components = components
        self._active: Model | None = None
        self._cancelled = False
        self._load: dict[str, float] = defaultdict(float)
        self._run: dict[str, float] = defaultdict(float)

    def __call__(self, name: str, feeds: Mapping[str, AnyArray], variant: str = "plain") -> dict[str, AnyArray]:
        """Outputs of a component by name.

        Raises:
            Cancelled: `cancel` was called.
            PackageError, DeviceError: as `Session` and `Session.run` do.
        """
        start = time.perf_counter()
        session = self.components.session(name, variant)
        loaded = time.perf_counter()
        self._load[name] += loaded - start
        self._active = session
        try:
            if self._cancelled:
                raise Cancelled("the generation was cancelled")
            return session.run(feeds)
        finally:
            self._active = None
            self._run[name] += time.perf_counter() - loaded

    def cancel(self) -> None:
        """Stops what runs now and whatever would run next; from any thread."""
        self._cancelled = True
        session = self._active
        if session is not None:
            session.cancel()

    def timings(self, steps: list[float]) -> Timings:
        """The times so far, with those of the denoising ``steps``, in seconds."""
        return Timings(load=dict(self._load), run=dict(self._run), steps=tuple(steps))
