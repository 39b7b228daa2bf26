"""ONNX Runtime behind one small class: devices and their options, running, cancelling, errors in our words."""

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import DeviceError, PackageError, SdonnxError
from sdonnx_runtime.execution.arena import USE_ENV_ALLOCATORS, share_arena
from sdonnx_runtime.execution.ort import (
    DEVICES,
    candidates,
    first_line,
    install_hint,
    load_onnxruntime,
    provider_options,
    session_options,
)
from sdonnx_runtime.graphs.initializers import TensorData

logger = logging.getLogger(__name__)


class Cancelled(SdonnxError):  # noqa: N818
    """A run was stopped from another thread."""


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output of a graph, as its session describes it."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


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
        weights: Mapping[str, TensorData] = MappingProxyType({}),
        model: bytes | None = None,
        frugal: bool = False,
    ) -> None:
        self.path = path
        self._weights = weights  # ONNX Runtime reads them where they are
        settings = session_options(threads, profile, weights)
        if model is not None:
            settings.add_session_config_entry(_FOLDER, str(path.resolve().parent))
        settings.enable_cpu_mem_arena = not frugal
        settings.add_session_config_entry(USE_ENV_ALLOCATORS, str(int(not frugal and share_arena())))
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
        options = load_onnxruntime().RunOptions()
        leading = {port.name: port.shape[0] for port in self.inputs if port.shape and isinstance(port.shape[0], str)}
        prepared = broadcast_batch({port.name: self._fit(port, feeds) for port in self.inputs}, leading)
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
            reason = first_line(outcome)
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


def broadcast_batch(feeds: Mapping[str, AnyArray], leading: Mapping[str, str]) -> dict[str, AnyArray]:
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
    raise DeviceError(f"this ONNX Runtime offers none of {', '.join(DEVICES)}; {install_hint('cpu')}")


def _open_on(path: Path, model: bytes | None, name: str, settings: Any, memory_limit: int | None) -> Any:
    runtime, device = load_onnxruntime(), DEVICES[name]
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
            raise PackageError(f"{path} can't be loaded: {first_line(error)}; run 'sdonnx export' again") from None
        raise DeviceError(
            f"device '{name}' failed to initialise: {first_line(error)}; check its driver, or use --device cpu"
        ) from None
    if device.provider not in session.get_providers():
        raise DeviceError(
            f"device '{name}' failed to initialise: ONNX Runtime could not start {device.provider}; "
            "check its driver, or use --device cpu"
        )
    return session


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
