"""ONNX Runtime behind one small class: devices and their options, running, cancelling, errors in our words."""

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import DeviceError, PackageError, RequestError, SdonnxError
from sdonnx_runtime.execution import machine
from sdonnx_runtime.graphs.initializers import Elements
from sdonnx_runtime.graphs.onnx_proto import model_of

logger = logging.getLogger(__name__)


class Cancelled(SdonnxError):  # noqa: N818
    """A run was stopped from another thread."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """How one kind of device is driven."""

    provider: str
    """ONNX Runtime's name for it."""
    extra: str
    """What to install for it: ``pip install "sdonnx[extra]"``."""
    options: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
    """Provider options."""
    memory_limit_option: str | None = None
    """The provider option that caps its memory, in bytes."""
    memory_pattern: bool = True
    """Whether buffers are planned from the first run; DirectML can't, and on the CPU it takes more memory and no less
    time."""


DEVICES: dict[str, Device] = {
    "cuda": Device(
        provider="CUDAExecutionProvider",
        extra="cuda",
        # Growing by powers of two would take twice what a small GPU has to give.
        options={"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_use_max_workspace": "0"},
        memory_limit_option="gpu_mem_limit",
    ),
    "directml": Device(provider="DmlExecutionProvider", extra="directml", memory_pattern=False),
    "cpu": Device(provider="CPUExecutionProvider", extra="cpu", memory_pattern=False),
}
"""Best first: the order in which ``auto`` tries them."""


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output of a graph, as its session describes it."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


def provider_options(name: str, memory_limit: int | None = None) -> dict[str, str]:
    """The options that device ``name`` is opened with.

    Args:
        name: a key of DEVICES.
        memory_limit: bytes that the device may use; None is no limit.

    Raises:
        RequestError: the device has no such limit.
    """
    device = DEVICES[name]
    if memory_limit is None:
        return dict(device.options)
    if device.memory_limit_option is None:
        limited = ", ".join(key for key, other in DEVICES.items() if other.memory_limit_option is not None)
        raise RequestError(f"a memory limit can't be set on '{name}'; it works on {limited}")
    return {**device.options, device.memory_limit_option: str(memory_limit)}


def runtime_version() -> str:
    """ONNX Runtime's version."""
    return str(_runtime().__version__)


def candidates(device: str) -> list[str]:
    """The devices to try for ``device``: itself, or for ``auto`` all that this ONNX Runtime was built for.

    Raises:
        RequestError: there is no device of that name.
        DeviceError: this ONNX Runtime was built without it.
    """
    built = set(_runtime().get_available_providers())
    if device == "auto":
        return [name for name, known in DEVICES.items() if known.provider in built]
    if device not in DEVICES:
        raise RequestError(f"there is no device '{device}'; choose auto, {', '.join(DEVICES)}")
    if DEVICES[device].provider not in built:
        raise DeviceError(
            f"device '{device}' is not available: the installed ONNX Runtime {runtime_version()} has no "
            f"{DEVICES[device].provider}; {_install_hint(device)}"
        )
    return [device]


class Session:
    """A loaded graph on a device.

    Args:
        path: the ``.onnx`` file; weights beside it are memory-mapped.
        device: auto, or a key of DEVICES.
        threads: CPU threads; None is one for each physical core.
        memory_limit: bytes the device may use, where it knows such a limit (CUDA).
        profile: where ONNX Runtime's profile goes, a path to which it adds; None is nowhere.
        weights: what is taken in the place of initializers that lie in the weights file, by name.
        model: a graph that is opened in the place of the file's, beside the same weights.
        frugal: lets go of every buffer at once, on the CPU, instead of keeping it in the arena that all sessions there
            share; slower.

    Raises:
        DeviceError: the device is absent or fails to initialise.
        PackageError: the graph can't be loaded.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        memory_limit: int | None = None,
        profile: Path | None = None,
        weights: Mapping[str, Elements] = MappingProxyType({}),
        model: bytes | None = None,
        frugal: bool = False,
    ) -> None:
        self.path = path
        self._weights = weights  # ONNX Runtime reads them where they are
        settings = _settings(threads, profile, weights)
        if model is not None:
            settings.add_session_config_entry(_FOLDER, str(path.resolve().parent))
        settings.enable_cpu_mem_arena = not frugal
        settings.add_session_config_entry(_SHARED_ARENA, str(int(not frugal and share_arena())))
        self.device, self._session = _open(path, model, device, settings, memory_limit)
        self.inputs = _ports(self._session.get_inputs())
        self.outputs = _ports(self._session.get_outputs())
        self._options: Any = None

    def run(self, feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """All outputs by name; inputs are cast to the element types and ranks that the graph wants.

        Of inputs whose leading sizes the graph calls by one name, those of fewer rows are repeated as a whole.

        Ctrl-C stops it inside, between two operators.

        Raises:
            PackageError: the graph wants an input that is not in ``feeds``, or gives values that are not finite.
            DeviceError: the device failed, for example for lack of memory.
            Cancelled: `cancel` was called.
        """
        options = _runtime().RunOptions()
        leading = {port.name: port.shape[0] for port in self.inputs if port.shape and isinstance(port.shape[0], str)}
        prepared = matched({port.name: self._fit(port, feeds) for port in self.inputs}, leading)
        outcome: list[Any] = []
        done = threading.Event()  # not Thread.join: interrupted once, it takes the thread for ended ever after

        def work() -> None:
            try:
                outcome.append(self._session.run(None, prepared, options))
            except Exception as error:
                outcome.append(error)
            finally:
                done.set()

        self._options = options
        worker = threading.Thread(target=work, name=f"sdonnx {self.path.parent.name}", daemon=True)
        worker.start()
        try:
            while not done.wait(timeout=0.2):  # a wait without limit would keep Ctrl-C out on Windows
                pass
        except BaseException:
            options.terminate = True
            while not done.is_set():
                with suppress(KeyboardInterrupt):  # an impatient second one must not leave the thread behind
                    done.wait(timeout=0.2)
            raise
        finally:
            self._options = None
        return self._sorted_out(outcome[0], terminated=bool(options.terminate))

    def finish_profile(self) -> list[dict[str, Any]]:
        """The events of ONNX Runtime's profile, which ends."""
        return json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))

    def cancel(self) -> None:
        """Stops the run that another thread is in; without one, nothing."""
        options = self._options
        if options is not None:
            options.terminate = True

    def _fit(self, port: Port, feeds: Mapping[str, AnyArray]) -> AnyArray:
        if port.name not in feeds:
            raise PackageError(
                f"{self.path} wants an input '{port.name}' that this version can't give; it gives {', '.join(feeds)}"
            )
        given = feeds[port.name].astype(port.dtype, copy=False)
        return given.reshape((1,) * (len(port.shape) - given.ndim) + given.shape)

    def _sorted_out(self, outcome: Any, *, terminated: bool) -> dict[str, AnyArray]:
        if isinstance(outcome, Exception):
            if terminated:
                raise Cancelled("the run was cancelled") from None
            reason = _first_line(outcome)
            remedy = "choose a smaller size or another device" if "alloc" in reason.lower() else "try another device"
            raise DeviceError(f"{self.path} failed on device '{self.device}': {reason}; {remedy}") from None
        results = dict(zip((port.name for port in self.outputs), outcome, strict=True))
        for name, value in results.items():
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise PackageError(
                    f"{self.path} gave values in '{name}' that are not finite; "
                    "the checkpoint is damaged or overflows: export it again, with --precision fp32"
                )
        return results


def matched(feeds: Mapping[str, AnyArray], leading: Mapping[str, str]) -> dict[str, AnyArray]:
    """Inputs of as many rows as the most of those whose ``leading`` sizes have one name, where that is a multiple."""
    rows: dict[str, int] = {}
    known = {name: size for name, size in leading.items() if name in feeds and feeds[name].ndim > 0}
    for name, size in known.items():
        rows[size] = max(rows.get(size, 1), len(feeds[name]))
    found = dict(feeds)
    for name, size in known.items():
        times, rest = divmod(rows[size], len(feeds[name]))
        if times > 1 and rest == 0:
            found[name] = np.concatenate([feeds[name]] * times)
    return found


def _open(path: Path, model: bytes | None, device: str, settings: Any, memory_limit: int | None) -> tuple[str, Any]:
    if not path.is_file():
        raise PackageError(f"{path} is missing; run 'sdonnx export' again")
    names = candidates(device)
    for index, name in enumerate(names):
        try:
            return name, _open_on(path, model, name, settings, memory_limit)
        except DeviceError as error:
            if index == len(names) - 1:
                raise
            logger.warning("%s; trying %s", error, names[index + 1])
    raise DeviceError(f"this ONNX Runtime offers none of {', '.join(DEVICES)}; {_install_hint('cpu')}")


def _settings(threads: int | None, profile: Path | None, weights: Mapping[str, Elements]) -> Any:
    """ONNX Runtime's options for a session."""
    runtime = _runtime()
    settings = runtime.SessionOptions()
    settings.log_severity_level = 4  # what goes wrong comes back as an exception
    settings.intra_op_num_threads = threads if threads is not None else 0
    settings.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float32, as is written
    settings.add_session_config_entry("session.x64quantprecision", str(int(machine.may_overflow())))
    settings.add_session_config_entry("session.use_device_allocator_for_initializers", "1")  # they aren't the arena's
    settings.execution_order = runtime.ExecutionOrder.PRIORITY_BASED  # as written: what is done with is let go of
    if profile is not None:
        settings.enable_profiling, settings.profile_file_prefix = True, str(profile)
    make = runtime.OrtValue.ortvalue_from_numpy_with_onnx_type
    settings.add_external_initializers(list(weights), [make(each.data, each.data_type) for each in weights.values()])
    return settings


def _open_on(path: Path, model: bytes | None, name: str, settings: Any, memory_limit: int | None) -> Any:
    runtime, device = _runtime(), DEVICES[name]
    settings.enable_mem_pattern = device.memory_pattern
    limit = memory_limit if device.memory_limit_option is not None else None
    providers = [(device.provider, provider_options(name, limit))]
    if name != "cpu":
        providers.append((DEVICES["cpu"].provider, {}))  # for the few operators that a device leaves out
    try:
        graph = str(path) if model is None else model
        session = runtime.InferenceSession(graph, settings, providers=providers, enable_fallback=0)
    except Exception as error:
        if name == "cpu":
            raise PackageError(f"{path} can't be loaded: {_first_line(error)}; run 'sdonnx export' again") from None
        raise DeviceError(
            f"device '{name}' failed to initialise: {_first_line(error)}; check its driver, or use --device cpu"
        ) from None
    if device.provider not in session.get_providers():
        raise DeviceError(
            f"device '{name}' failed to initialise: ONNX Runtime could not start {device.provider}; "
            "check its driver, or use --device cpu"
        )
    return session


def share_arena(region: float = 1 << 28) -> bool:
    """Makes the arena that the sessions on the CPU share, once in a process; later calls change nothing.

    Args:
        region: bytes that it first asks the system for; the next region is twice as large. What is put into one and
            done with is one piece again. Of each 32 bytes one is taken for its book, at once.

    Returns whether there is one.
    """
    with _sharing:
        _shared.extend([] if _shared else [_registered(min(max(int(region), _SMALLEST), _LARGEST) & -_SMALLEST)])
    return _shared[0]


_sharing, _shared = threading.Lock(), list[bool]()
_SHARED_ARENA = "session.use_env_allocators"
_ZERO = np.zeros((), np.float32)
_SMALLEST, _LARGEST = 1 << 24, 127 << 24  # which is the most that ONNX Runtime's setting holds


def _registered(region: int) -> bool:
    runtime = _runtime()
    where = runtime.OrtMemoryInfo("Cpu", runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, runtime.OrtMemType.DEFAULT)
    growth = dict.fromkeys(("initial_chunk_size_bytes", "max_dead_bytes_per_chunk"), 1 << 16)
    growth |= {"initial_growth_chunk_size_bytes": region, "arena_extend_strategy": 0}
    try:
        runtime.create_and_register_allocator(where, runtime.OrtArenaCfg(growth))
    except Exception as error:
        return "already" in str(error)  # by who else uses ONNX Runtime in this process
    _nothing(True).run(None, {"x": _ZERO})  # its first region, which is never handed back
    return True


def empty_arena() -> None:
    """Hands what no session uses of the shared arena back to the system."""
    if any(_shared):
        options = _runtime().RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        binding, place = _nothing(True).io_binding(), _runtime().OrtValue.ortvalue_from_numpy(_ZERO)
        binding.bind_ortvalue_input("x", place)
        binding.bind_ortvalue_output("y", place)  # or what it gives would be in the arena
        _nothing(True).run_with_iobinding(binding, options)
        machine.give_back()


def warm_up() -> None:
    """Has in memory what all sessions of this process share, but for the arena."""
    _nothing(False)


@cache
def _nothing(sharing: bool) -> Any:
    """A session that gives what it is given."""
    settings = _settings(1, None, {})
    settings.enable_cpu_mem_arena = sharing
    settings.add_session_config_entry(_SHARED_ARENA, str(int(sharing)))
    return _runtime().InferenceSession(model_of("Identity", 1), settings, providers=[DEVICES["cpu"].provider])


def _runtime() -> ModuleType:
    try:
        import onnxruntime  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise DeviceError(f"ONNX Runtime is not installed; {_install_hint('cpu')} (or cuda, or directml)") from None
    return onnxruntime


def _install_hint(device: str) -> str:
    return f"""install it with pip install "sdonnx[{DEVICES[device].extra}]\""""


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")[:300]


def _ports(described: Sequence[Any]) -> tuple[Port, ...]:
    return tuple(
        Port(name=item.name, dtype=_DTYPES.get(item.type, np.dtype(np.float32)), shape=tuple(item.shape))
        for item in described
    )


_FOLDER = "session.model_external_initializers_file_folder_path"
"""What ONNX Runtime calls the place of the weights of a graph that comes from no file."""

_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(bool)": np.dtype(np.bool_),
}
