"""A package's components as sessions: opened when first needed, released when done, stoppable from any thread."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.chain import Model
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.merging import Changes
from sdonnx_runtime.package import Package
from sdonnx_runtime.request import Timings
from sdonnx_runtime.session import Cancelled
from sdonnx_runtime.tiles import in_tiles

REFINER = "refiner/"
"""What the names of a refiner's components begin with."""


class Components:
    """The sessions of one pipeline.

    Args:
        package: where the graphs are.
        open_session: opens a graph file, with what adapters do to it.
        keep_loaded: makes `release` do nothing.
        others: where those of components are whose names begin so, up to the slash.
        tile: latent cells of the sides of what the VAE works on at a time; None is all.
    """

    def __init__(
        self,
        package: Package,
        open_session: Callable[[Path, Changes], Model],
        *,
        keep_loaded: bool,
        others: Mapping[str, Package] = MappingProxyType({}),
        tile: int | None = None,
    ) -> None:
        self._busy = threading.Lock()
        self._package, self._others = package, others
        self._open_session, self._keep_loaded = open_session, keep_loaded
        self._sessions: dict[tuple[str, str], Model] = {}
        self._changes: Mapping[str, Changes] = {}
        pixels = package.manifest.latents.downscale
        self.tiles = {} if tile is None else {"vae_decoder": tile, "vae_encoder": tile * pixels}
        """Sides of what components work on at a time, in their own places; of others' not in it, all."""

    def session(self, name: str, variant: str = "plain") -> Model:
        """The session of a component's variant, opened if it is not."""
        key = name, variant
        if key not in self._sessions:
            place, slash, component = name.rpartition("/")
            graph = self._others.get(place + slash, self._package).graph(component, variant)
            self._sessions[key] = self._open_session(graph, self._changes.get(name, {}))
        return self._sessions[key]

    def release(self, name: str) -> None:
        """Unloads a component, unless components are kept."""
        if not self._keep_loaded:
            self._sessions = {key: session for key, session in self._sessions.items() if key[0] != name}

    @contextmanager
    def reserved(self, changes: Mapping[str, Changes] | None = None) -> Generator[None, None, None]:
        """For one generation at a time; at its end components are unloaded, unless they are kept.

        Args:
            changes: what adapters do to the package's components from now on; None is what they did.

        Raises:
            RequestError: another generation is under way.
        """
        if not self._busy.acquire(blocking=False):
            raise RequestError("this pipeline is making another picture; finish or close that stream first")
        try:
            if changes is not None:
                self._adapt(changes)
            yield
        finally:
            for name, _ in list(self._sessions):
                self.release(name)
            self._busy.release()

    def close(self) -> None:
        """Unloads every component."""
        self._sessions.clear()

    def _adapt(self, changes: Mapping[str, Changes]) -> None:
        touched = {name for name in {*changes, *self._changes} if changes.get(name) != self._changes.get(name)}
        self._sessions = {key: session for key, session in self._sessions.items() if key[0] not in touched}
        self._changes = changes


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

        def whole(feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
            if self._cancelled:
                raise Cancelled("the generation was cancelled")
            return session.run(feeds)

        side = self.components.tiles.get(name)
        try:
            return whole(feeds) if side is None else in_tiles(whole, feeds, side)
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
