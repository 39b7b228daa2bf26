"""A package's components as models: opened when first needed, unloaded when done, stoppable from any thread."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar
from weakref import WeakValueDictionary

from sdonnx_runtime.adapters.merging import LayerDeltas
from sdonnx_runtime.errors import DeviceError, RequestError
from sdonnx_runtime.execution.arena import PROCESS_MEMORY
from sdonnx_runtime.execution.devices.adapters import choose_adapter
from sdonnx_runtime.execution.devices.choosing import avoided_devices, choose_devices
from sdonnx_runtime.execution.devices.computing import check_compute, coarsest, resolve_compute
from sdonnx_runtime.execution.devices.node_assignment import check_operators
from sdonnx_runtime.execution.devices.table import DEVICES, DeviceName, check_name
from sdonnx_runtime.execution.ort import candidates, check_target
from sdonnx_runtime.execution.output_shapes import check_outputs
from sdonnx_runtime.execution.process_memory import MAPPINGS, resident_memory
from sdonnx_runtime.execution.running.device_array import Tensor
from sdonnx_runtime.execution.running.shared_weights import SharedWeights
from sdonnx_runtime.execution.session import Cancelled
from sdonnx_runtime.execution.staged_model import Model
from sdonnx_runtime.execution.strategy import ExecutionPlan, ExecutionStrategy
from sdonnx_runtime.execution.timings import Timings
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.packages.variant import PLAIN, TILED

T = TypeVar("T")

REFINER = "refiner/"
"""The prefix of the names of a refiner's components."""

UPSCALER = "upscaler/"
"""That of an upscaler's."""

CIRCULAR = ("unet", "controlnet", "adapter", "vae_decoder", "vae_encoder")
"""The components that pad circularly where images tile seamlessly; an upscaler gets images that go on around them."""

Observer: TypeAlias = Callable[[str, str, Mapping[str, Tensor], Mapping[str, Tensor], float], None]
"""Receives each run of a component: its name and variant, inputs and outputs, and the seconds that it took."""

OpenModel: TypeAlias = Callable[..., Model]
"""Opens a graph, called as `staged_model.open_model` is, with the keywords ``tile_size``, ``target``,
``graph_compute``, ``avoided``, ``memory_limit`` and ``shared_weights``."""


def check_device(device: str, *packages: Package | None, compute: str = "auto", operators: bool = True) -> None:
    """Check that a device runs the graphs of packages, whether it can be used here or not; reads their ``operators``.

    Raises RequestError for an unknown device or ``compute``; DeviceError for a device that doesn't run them or doesn't
    compute so, or if ``auto`` finds none that runs them.
    """
    check_name(device)
    check_compute(compute)
    for root in (each for each in packages if each is not None):
        for package in (root, *root.component_packages.values()):
            target, source = package.manifest.target, str(package.root)
            try:
                if device != "auto":
                    check_target(device, target, source)
                    if operators:
                        _check_operators(device, package)
                elif target != "generic":
                    candidates(device, target, source)
                if compute != "auto":
                    _check_compute(device, package, compute)
            except DeviceError as error:
                raise DeviceError(f"{package.root}: {error}") from None


def _check_operators(device: str, package: Package) -> None:
    """Check that a device has the operators of a package, before an image is begun."""
    name = DeviceName.parse(device)
    for component in package.manifest.components if name.device.lacks else ():
        if (path := package.graph(component)).is_file():
            check_operators(name, path, None)


def _check_compute(device: str, package: Package, compute: str) -> None:
    """Check that a device computes so, unless that depends on hardware that is not here."""
    for name in package.manifest.components:
        graph_compute = package.compute(name)
        if device == "auto":
            if compute != graph_compute or package.target(name) not in DEVICES["cpu"].targets:
                choose_devices(device, package.target(name), compute=compute, graph_compute=graph_compute)
        elif not DeviceName.parse(device).device.chooses_compute or _is_here(device):
            resolve_compute(device, compute, graph_compute)


def _is_here(device: str) -> bool:
    """Whether a plugin's device has its hardware here."""
    try:
        return choose_adapter(DeviceName.parse(device)).ep_device is not None
    except DeviceError:
        return False


class Components:
    """The open models of one pipeline, and the tokenizers of its text encoders.

    Args:
        package: where the graphs are.
        open_model: opens a graph file.
        keep_loaded: keeps whatever was opened; a plan with ``keep_loaded`` keeps what a generation like it opens.
        extra_packages: further packages, by the prefix of their components' names, up to the slash.
        unplanned: how components run where a generation has no plan.
    """

    def __init__(
        self, package: Package, open_model: OpenModel, *, keep_loaded: bool,
        extra_packages: Mapping[str, Package] = MappingProxyType({}),
        unplanned: ExecutionPlan = ExecutionPlan(),  # noqa: B008 — frozen
    ) -> None:  # fmt: skip
        self._busy = threading.Lock()
        self._package, self._extra_packages = package, extra_packages
        self._avoided = avoided_devices(package, *extra_packages.values())
        self._open_model, self._keep_loaded = open_model, keep_loaded
        self._models: dict[tuple[str, str], Model] = {}
        self._tokenizers: dict[str, Any] = {}
        self._weights = WeakValueDictionary[str, SharedWeights]()
        self._used = set[tuple[str, str]]()
        self._bytes_without_models = 0
        self._deltas: Mapping[str, LayerDeltas] = {}
        self._unplanned = self._plan = unplanned
        self._use_arena, self._circular = True, ""

    def model(self, name: str, variant: str = PLAIN) -> Model:
        """A component's variant, opened if it is not."""
        key = name, variant
        self._used.add(key)
        if key not in self._models:
            self._close_unused_variants(name)
            (package, component), strategy = self.find(name), self.strategy(name)
            if strategy.tile is not None and TILED in package.manifest.components[component].graphs:
                variant = TILED
            self._models[key] = self._open_model(
                package.graph(component, variant),
                self._deltas.get(name, {}),
                strategy,
                tile_size=self._tile_size(component, strategy),
                target=package.target(component),
                graph_compute=package.compute(component),
                avoided={**self._avoided, **self._plan.avoided},
                memory_limit=self._plan.device_limit,
                shared_weights=self._weights.setdefault(name, SharedWeights()),
            )
        return self._models[key]

    def is_open(self, name: str, variant: str = PLAIN) -> bool:
        """Whether a component's variant is open."""
        return (name, variant) in self._models

    def tokenizer(self, name: str, open_tokenizer: Callable[[], T]) -> T:
        """A text encoder's tokenizer, of its files as they were when it was opened; unloaded with the text encoder."""
        if name not in self._tokenizers:
            self._tokenizers[name] = open_tokenizer()
        return self._tokenizers[name]

    def find(self, name: str) -> tuple[Package, str]:
        """The package of a component, and its name in there."""
        prefix, slash, component = name.rpartition("/")
        return self._extra_packages.get(prefix + slash, self._package), component

    def strategy(self, name: str) -> ExecutionStrategy:
        """How a component is run."""
        strategy, (_, component) = self._plan.strategies.get(name, self._plan.default), self.find(name)
        if self._circular and component in CIRCULAR:
            strategy = replace(strategy, circular=self._circular)
        return strategy if self._use_arena else replace(strategy, no_arena=True)

    def _tile_size(self, component: str, strategy: ExecutionStrategy) -> int | None:
        """The side of a tile in pixels of the component's input; None if it runs on the whole image."""
        pixels = {"vae_decoder": 1, "vae_encoder": self._package.manifest.latents.downscale}.get(component)
        return None if strategy.tile is None or pixels is None else strategy.tile * pixels

    def unload(self, name: str) -> None:
        """Unload a component, unless components are kept loaded."""
        if not self._keep_loaded and not self._plan.keep_loaded:
            self._close({name})

    @property
    def held_bytes(self) -> int:
        """The memory of the process that the open models have, in bytes; between generations."""
        return max(0, resident_memory() - self._bytes_without_models) if self._models else 0

    @contextmanager
    def exclusive(
        self, deltas: Mapping[str, LayerDeltas] | None = None, plan: ExecutionPlan | None = None, circular: str = ""
    ) -> Generator[None, None, None]:
        """Reserve the components for one generation, after which they are unloaded, unless they are kept loaded.

        ``deltas`` are the changes by adapters from now on, by component; None leaves them as they are. ``plan`` is how
        components run; None is the ``unplanned`` one. ``circular`` are the axes along which images tile, x, y or xy.
        Raises RequestError if another generation is under way.
        """
        if not self._busy.acquire(blocking=False):
            raise RequestError("this pipeline is generating another image; finish or close that stream first")
        try:
            if deltas is not None:
                changed = _changed_keys(deltas, self._deltas)
                self._close(changed)
                for name in changed:  # whose weights a session may still hold, in the traceback of an error
                    self._weights.pop(name, None)
                self._deltas = deltas
            with self._close_changed():
                self._plan, self._circular = self._unplanned if plan is None else plan, circular
                self._use_arena = PROCESS_MEMORY.configure(self._plan)
            if not self._keep_loaded:
                self._close(self._uncounted())
            if not self._models:
                self._bytes_without_models = resident_memory()
            self._used.clear()
            yield
        finally:
            for name in self._loaded:
                self.unload(name)
            self._busy.release()

    def pad_circularly(self, axes: str) -> None:
        """Have images tile along x, y or xy from now on, or along no axis; of components that no generation runs."""
        with self._close_changed():
            self._circular = axes

    @contextmanager
    def _close_changed(self) -> Generator[None, None, None]:
        """Unload the components whose strategies change meanwhile."""
        before = {name: self._manner(name) for name, _ in self._models}
        yield
        self._close(_changed_keys({name: self._manner(name) for name in before}, before))

    def _manner(self, name: str) -> tuple[ExecutionStrategy, frozenset[str]]:
        """How a component is run, and on which devices it is not."""
        return self.strategy(name), frozenset(self._plan.avoided)

    def _uncounted(self) -> set[str]:
        """The components that an earlier generation left, and whose memory the plan did not count."""
        names, plan = self._loaded, self._plan
        if not plan.keep_loaded:
            return names
        return names - plan.strategies.keys() if plan.strategies else set()

    def _close_unused_variants(self, name: str) -> None:
        """Unload the variants of a component that an earlier generation left: each has the weights once more."""
        if not self._keep_loaded:
            self._close_keys({key for key in self._models if key[0] == name} - self._used)

    def close(self) -> None:
        """Unload every component."""
        self._close(self._loaded)

    @property
    def _loaded(self) -> set[str]:
        """The components of which something is loaded."""
        return {name for name, _ in self._models} | self._tokenizers.keys()

    def _close(self, names: Collection[str]) -> None:
        self._tokenizers = {name: each for name, each in self._tokenizers.items() if name not in names}
        self._close_keys({key for key in self._models if key[0] in names})

    def _close_keys(self, keys: Collection[tuple[str, str]]) -> None:
        if keys:
            with MAPPINGS:
                self._models = {key: model for key, model in self._models.items() if key not in keys}
            PROCESS_MEMORY.shrink_arena()


def _changed_keys(new: Mapping[str, object], old: Mapping[str, object]) -> set[str]:
    """The keys that are in one alone, or have different values."""
    return {name for name in {*new, *old} if new.get(name) != old.get(name)}


class Runner:
    """Runs components for one generation: times each, calls the ``observer`` after each run, can be cancelled."""

    def __init__(self, components: Components, observer: Observer | None = None) -> None:
        self.components = components
        self._observer = observer
        self.on_opening: Callable[[str | None], None] | None = None
        """Is called with the name of a component before it is opened, and with None after that."""
        self.on_upscaling: Callable[[int, int], None] | None = None
        """Is called between the passes of hires fix with the upscaler's tiles that are done, and all of them."""
        self._active: Model | None = None
        self._cancelled = False
        self._load: dict[str, float] = defaultdict(float)
        self._run: dict[str, float] = defaultdict(float)
        self._computed = set[str]()
        self.devices = dict[str, str]()
        """The names of the devices that the components have run on, by component."""

    def __call__(
        self, name: str, feeds: Mapping[str, Tensor], variant: str = PLAIN, keep: Container[str] = ()
    ) -> dict[str, Any]:
        """Run a component; returns its outputs by name, those in ``keep`` as `Session.run` does.

        Raises as `Session`, `Session.run` and `check_outputs` do.
        """
        start = time.perf_counter()
        model = self._open(name, variant, feeds)
        loaded = time.perf_counter()
        self._load[name] += loaded - start
        self._active = model
        try:
            if self._cancelled:
                raise Cancelled("the generation was cancelled")
            outputs = model.run(feeds, keep)
        finally:
            self._active = None
            seconds = time.perf_counter() - loaded
            self._run[name] += seconds
        self._computed.add(model.compute)
        self.devices[name] = model.device
        check_outputs(*self.components.find(name), feeds, outputs)
        if self._observer is not None:
            self._observer(name, variant, feeds, outputs, seconds)
        return outputs

    def _open(self, name: str, variant: str, feeds: Mapping[str, Tensor]) -> Model:
        """A component's variant, opened for inputs of these sizes."""
        if self.components.is_open(name, variant) and self.components.model(name, variant).is_open_for(feeds):
            return self.components.model(name, variant)
        if self.on_opening is not None:
            self.on_opening(name)
        try:
            model = self.components.model(name, variant)
            model.open_for(feeds)
            return model
        finally:
            if self.on_opening is not None:
                self.on_opening(None)

    def cancel(self) -> None:
        """Stop the component that runs now, and all later runs; from any thread."""
        self._cancelled = True
        if (model := self._active) is not None:
            model.cancel()

    @property
    def compute(self) -> str:
        """The coarsest arithmetic of the components that have run: f32, f16 or bf16."""
        return coarsest(self._computed)

    def timings(self, steps: list[float]) -> Timings:
        """The times so far, with those of the denoising ``steps``, in seconds."""
        return Timings(load=dict(self._load), run=dict(self._run), steps=tuple(steps))
