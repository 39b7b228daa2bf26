"""Open a graph on a device."""

import io
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdonnx_runtime.errors import DeviceError, PackageError, SdonnxError
from sdonnx_runtime.execution import ort
from sdonnx_runtime.execution.cpu import usable_cpus
from sdonnx_runtime.execution.devices.adapters import Choice, choose_adapter
from sdonnx_runtime.execution.devices.choosing import choose_devices, note, note_choice
from sdonnx_runtime.execution.devices.compiled_graphs import (
    CompiledFrom,
    Written,
    can_export,
    compiled_graphs,
    export_entries,
)
from sdonnx_runtime.execution.devices.computing import resolve_compute
from sdonnx_runtime.execution.devices.fitting import fit_graph, fit_to_bfloat16
from sdonnx_runtime.execution.devices.kernel_checks import KernelChecks
from sdonnx_runtime.execution.devices.node_assignment import (
    RECORD,
    NodeAssignment,
    check_assignment,
    check_operators,
)
from sdonnx_runtime.execution.devices.openvino import maps_weights, openvino_device, openvino_options
from sdonnx_runtime.execution.devices.table import DEVICES, DeviceName
from sdonnx_runtime.execution.process_memory import can_unmap, keep_unmapping
from sdonnx_runtime.execution.running.shared_weights import DeviceMemory, SharedWeights
from sdonnx_runtime.graphs.bfloat16_weights import open_bfloat16
from sdonnx_runtime.graphs.initializers import TensorData, read_initializers
from sdonnx_runtime.graphs.onnx_proto import single_node_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What is opened, and where."""

    path: Path
    """The ``.onnx`` file."""
    model: bytes | None
    """An encoded graph that replaces the file's."""
    settings: Callable[[], Any]
    """Makes the options of a session."""
    device: str
    """auto, or the name of a device."""
    target: str
    """What the graph is made for: one of TARGETS."""
    memory_limit: int | None
    """Bytes that the device may use, where it has such an option."""
    weights: Mapping[str, TensorData] = field(default_factory=lambda: dict[str, TensorData]())
    """Values that replace initializers, by name; the settings have them too."""
    compute: str = "auto"
    """What the arithmetic is done in: one of COMPUTES."""
    graph_compute: str = "f32"
    """What the graph is written to compute in, as of `resolve_compute`."""
    avoided: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
    """Why ``auto`` leaves out a device, by its name."""
    threads: int | None = None
    """CPU threads of a provider that has threads of its own; None is its choice."""
    cache: bool = True
    """Whether compiled graphs are kept on disk, where the device compiles them for long."""
    shared: SharedWeights | None = None
    """The weights of the sessions of other graphs over the same weights file."""
    folder: Path | None = None
    """That of the weights file of ``model``; None is the ``.onnx`` file's."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An open graph."""

    device: str
    """The name of the device that it is on."""
    compute: str
    """What it computes in: f32, bf16 or f16."""
    session: Any
    """ONNX Runtime's InferenceSession."""
    assignment: NodeAssignment | None
    """Which nodes the device runs; None on the CPU, and where ONNX Runtime doesn't say."""
    keeps_weights: bool = True
    """Whether most of the weights that the device packed are in memory as they were, too."""


def open_session(opening: Opening, sizes: Mapping[str, int] = MappingProxyType({})) -> Opened:
    """Open a graph, with fixed ``sizes`` of free dimensions by their names.

    Raises:
        DeviceError: no device can be used, or the one asked for fails to initialise.
        PackageError: the graph can't be loaded.
    """
    names = choose_devices(
        opening.device,
        opening.target,
        compute=opening.compute,
        graph_compute=opening.graph_compute,
        avoided=opening.avoided,
    )
    for name, following in pairwise(names):
        try:
            return _open_on(opening, DeviceName.parse(name), sizes)
        except DeviceError as error:
            note(f"{error}; trying {following}", logging.WARNING)
    return _open_on(opening, DeviceName.parse(names[-1]), sizes)


def _open_on(opening: Opening, name: DeviceName, sizes: Mapping[str, int]) -> Opened:
    check_operators(name, opening.path, opening.model)
    choice = _choose(name, opening.memory_limit)
    compute = resolve_compute(str(name), opening.compute, opening.graph_compute)
    if name.base == "openvino":
        own_name, built_in = openvino_device(name, choice), choice.ep_device is None
        options = openvino_options(own_name, compute=compute, threads=opening.threads, built_in=built_in)
        choice = replace(choice, options={**choice.options, **options})
    resolved = replace(opening, compute=compute)
    opened = _open_kept(resolved, name, sizes, choice) or _open_graph(resolved, name, sizes, choice)
    if "auto" in (opening.device, opening.compute):
        note_choice(str(name), compute, opening.compute)
    return opened


def _open_kept(opening: Opening, name: DeviceName, sizes: Mapping[str, int], choice: Choice) -> Opened | None:
    """Open a graph that was compiled before, from the user's cache; None where it can't be kept there.

    One that is new is compiled and written. Where its weights were mapped, the session that did it serves. Otherwise it
    is closed, and opened from there: the provider maps the file, so that its weights are not in memory but as they were
    packed. Graphs with merged weights are not kept: a LoRA at each of its strengths would be another.
    """
    graphs = compiled_graphs() if opening.cache and not opening.weights and can_export(choice) else None
    if graphs is None:
        return None

    def write(path: Path) -> Written[Any]:
        made = _open_graph(opening, name, sizes, choice, export_entries(path), path.parent.parent)
        assignment = None if made.assignment is None else vars(made.assignment)
        info = {"graph": str(opening.path), "sizes": dict(sizes), "assignment": assignment}
        return Written(info=info, opened=made.session if can_unmap() and not made.keeps_weights else None)

    def start(path: Path) -> Any:
        return _start(str(path), opening.settings(), name, choice)

    source = CompiledFrom.read(opening.path, opening.model, sizes, choice, opening.compute)
    found = graphs.open(source, write, start)
    if found is None:
        return None
    session, info = found
    assignment = NodeAssignment.from_info(info)
    if assignment is not None:
        check_assignment(assignment, name, opening.path)
    return Opened(device=str(name), compute=opening.compute, session=session, assignment=assignment)


def _open_graph(
    opening: Opening, name: DeviceName, sizes: Mapping[str, int], choice: Choice,
    entries: Mapping[str, str] = MappingProxyType({}), folder: Path | None = None,
) -> Opened:  # fmt: skip
    """Open a graph, which its device may compile.

    Args:
        opening: what is opened.
        name: the device.
        sizes: those of free dimensions.
        choice: its adapter.
        entries: further ones of the session's configuration.
        folder: for files that are needed meanwhile; None is a temporary one.
    """
    model = opening.model
    if (name.base, opening.compute) == ("openvino", "bf16") and openvino_device(name, choice) == "CPU":
        model = fit_to_bfloat16(opening.path, opening.model, sizes)
    if model is None or model is opening.model:
        return _start_graph(opening, name, sizes, choice, entries)
    threads = usable_cpus() if opening.threads is None else opening.threads
    with open_bfloat16(
        opening.path.resolve(), model, folder=folder, threads=threads, replaced=opening.weights
    ) as (stored, weights_folder):  # fmt: skip
        opening = replace(opening, model=stored, folder=weights_folder)
        return _start_graph(opening, name, sizes, choice, entries)


def _start_graph(
    opening: Opening, name: DeviceName, sizes: Mapping[str, int], choice: Choice, entries: Mapping[str, str]
) -> Opened:
    """Start a session of a graph as it is, and check what the device runs of it."""
    device, settings = name.device, opening.settings()
    settings.enable_mem_pattern = device.memory_pattern
    if not device.needs_optimizing:
        settings.graph_optimization_level = ort.load_onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
    for dimension, size in sizes.items() if device.fixed_sizes else ():
        settings.add_free_dimension_override_by_name(dimension, size)
    if name.base == "cuda":
        PRELOADED.load()
    for entry, value in {**({RECORD: "1"} if name.base != "cpu" else {}), **entries}.items():
        settings.add_session_config_entry(entry, value)
    try:
        model = fit_graph(opening.path, opening.model, _kernel_checks(name)) if device.checks_kernels else opening.model
        folder = opening.path.resolve().parent if opening.folder is None else opening.folder
        if model is not None:
            settings.add_session_config_entry(ort.WEIGHTS_FOLDER, str(folder))
        _share_weights(settings, replace(opening, model=model), name, choice)
        with keep_unmapping(folder) if name.base == "openvino" else nullcontext():  # it packs what it maps
            session = _start(str(opening.path) if model is None else model, settings, name, choice)
        if device.provider in session.get_providers():
            ADAPTERS.add(name, choice.options)
            assignment = _check(session, replace(opening, model=model), name)
            keeps = name.base != "openvino" or not maps_weights(opening.path, model, opening.compute)
            return Opened(
                device=str(name), compute=opening.compute, session=session, assignment=assignment, keeps_weights=keeps
            )
        reason = f"ONNX Runtime could not start {device.provider}"
    except SdonnxError:
        raise
    except Exception as error:
        reason = ort.first_line(error)
        if name.base == "cpu":
            raise PackageError(f"{opening.path} can't be loaded: {reason}; run 'sdonnx export' again") from None
    raise DeviceError(
        f"device '{name}' failed to initialise: {reason}; check its driver (it requires {device.requires}), "
        "or use --device cpu"
    )


def _share_weights(settings: Any, opening: Opening, name: DeviceName, choice: Choice) -> None:
    """Add the weights that a session has together with others to its settings."""
    memory = ort.device_memory(str(name))
    can_share = name.device.shares_memory and (name.device.plugin is None or choice.ep_device is not None)
    if opening.shared is not None and memory is not None and can_share:
        start = partial(_start, settings=ort.quiet_options(), name=name, choice=choice)
        initializers = read_initializers(opening.path, opening.model)
        shared = DeviceMemory(
            name=memory, start=start, ep_device=choice.ep_device, packs_kernels=name.device.packs_kernels
        )
        opening.shared.add_to(settings, shared, initializers, opening.weights)


def _choose(name: DeviceName, memory_limit: int | None = None) -> Choice:
    choice = choose_adapter(name)
    options = {**provider_options(name.base, memory_limit), **choice.options}
    if name.device.one_adapter:
        ADAPTERS.check(name, options)
    return replace(choice, options=options)


def _start(graph: str | bytes, settings: Any, name: DeviceName, choice: Choice) -> Any:
    """Start a session on an adapter; the CPU runs the few operators that it leaves out."""
    open_graph = ort.load_onnxruntime().InferenceSession
    if choice.ep_device is not None:
        settings.add_provider_for_devices([choice.ep_device], choice.options)
        return open_graph(graph, settings, enable_fallback=0)
    providers = [(name.device.provider, choice.options)]
    providers += [(DEVICES["cpu"].provider, {})] if name.base != "cpu" else []
    return open_graph(graph, settings, providers=providers, enable_fallback=0)


@cache
def _kernel_checks(name: DeviceName) -> KernelChecks:
    """What the kernels of an adapter can do; raises what ONNX Runtime does if no session starts on it."""

    def start(model: bytes) -> Any:
        return _start(model, ort.quiet_options(), name, _choose(name))

    start(single_node_model("Identity", 1))
    return KernelChecks(lambda model, x: start(model).run(None, {"x": x})[0])


def _check(session: Any, opening: Opening, name: DeviceName) -> NodeAssignment | None:
    """Check how much of a graph its device runs; raises as `check_assignment` does."""
    if name.base == "cpu":
        return None
    assignment = NodeAssignment.read(session, name, opening.path, opening.model)
    if assignment is not None:
        check_assignment(assignment, name, opening.path)
    return assignment


def provider_options(base: str, memory_limit: int | None = None) -> dict[str, str]:
    """The provider options for a device, with a memory limit in bytes where it supports one."""
    device = DEVICES[base]
    limit = {} if device.memory_limit_option is None else {device.memory_limit_option: str(memory_limit)}
    return {**device.options, **(limit if memory_limit is not None else {})}


class OpenedAdapters:
    """The adapters that this process has opened; ADAPTERS is the one."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[DeviceName, dict[str, str]]] = {}

    def add(self, name: DeviceName, options: dict[str, str]) -> None:
        """Remember the first adapter of a device, with the provider options that chose it."""
        self._first.setdefault(name.base, (name, options))

    def check(self, name: DeviceName, options: dict[str, str]) -> None:
        """Raise DeviceError if the process has opened another adapter of a device than these options choose."""
        used, others = self._first.get(name.base, (name, options))
        if others != options:
            raise DeviceError(
                f"device '{name}' can't be used in a process that has used '{used}': {name.device.title} has one "
                "adapter in a process; start another program for it"
            )


ADAPTERS = OpenedAdapters()


class CudaLibraries:
    """CUDA's and cuDNN's libraries from pip's packages, which this process loads before its first session on CUDA."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded = False

    def load(self) -> None:
        """Load them, once: ONNX Runtime finds no libraries in pip's packages by itself."""
        with self._lock:
            preload = getattr(ort.load_onnxruntime(), "preload_dlls", None)
            if self._loaded or preload is None:
                return
            with redirect_stdout(io.StringIO()) as said:  # it prints what is missing
                preload()
            self._loaded = True
        for line in said.getvalue().splitlines():
            logger.info("%s", line)


PRELOADED = CudaLibraries()
