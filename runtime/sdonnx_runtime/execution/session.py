"""A thin wrapper over onnxruntime.InferenceSession: devices, running, cancelling, errors with a remedy."""

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
from sdonnx_runtime.execution import ort
from sdonnx_runtime.execution.arena import PROCESS_MEMORY, USE_ENV_ALLOCATORS
from sdonnx_runtime.execution.ort import DEVICES, first_line, load_onnxruntime
from sdonnx_runtime.graphs.initializers import TensorData, embed_values

logger = logging.getLogger(__name__)


class Cancelled(SdonnxError):  # noqa: N818
    """A run was stopped from another thread."""


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output of a session."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


class Session:
    """A loaded graph on a device.

    Args:
        path: the ``.onnx`` file; its weights file is memory-mapped.
        device: auto, or a key of DEVICES.
        threads: CPU threads; None is the number of physical cores.
        memory_limit: bytes that the device may use, where it has such an option (CUDA).
        profile: the beginning of the path of ONNX Runtime's profile; None writes none.
        weights: values that replace initializers, by name.
        model: an encoded graph that replaces the file's, with the same weights file.
        no_arena: on the CPU, return each buffer to the system at once instead of to the shared arena; slower.

    Raises:
        DeviceError: the device is absent or fails to initialise.
        PackageError: the graph can't be loaded.
    """

    def __init__(
        self, path: Path, *, device: str = "auto", threads: int | None = None, memory_limit: int | None = None,
        profile: Path | None = None, weights: Mapping[str, TensorData] = MappingProxyType({}),
        model: bytes | None = None, no_arena: bool = False,
    ) -> None:  # fmt: skip
        self.path = path
        inline = {name: each for name, each in weights.items() if each.is_inline}
        if inline:
            model = embed_values(path.read_bytes() if model is None else model, inline)
        self._weights = {name: each for name, each in weights.items() if name not in inline}
        settings = ort.session_options(threads, profile, self._weights)  # reads the weights where they are
        if model is not None:
            settings.add_session_config_entry(_WEIGHTS_FOLDER, str(path.resolve().parent))
        settings.enable_cpu_mem_arena = not no_arena
        settings.add_session_config_entry(USE_ENV_ALLOCATORS, str(int(not no_arena and PROCESS_MEMORY.share_arena())))
        self.device, self._session = _open(path, model, device, settings, memory_limit)
        self.inputs = _ports(self._session.get_inputs())
        self.outputs = _ports(self._session.get_outputs())
        self._options: Any = None

    def run(self, feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """Run the graph; returns all outputs by name.

        Inputs are cast to the graph's element types and ranks, and batches repeated as `broadcast_batch` does. Ctrl-C
        stops the run between two operators.

        Raises:
            PackageError: an input of the graph is not in ``feeds``, or an output is not finite.
            DeviceError: the device failed, for example for lack of memory.
            Cancelled: `cancel` was called.
        """
        options = load_onnxruntime().RunOptions()
        batch_axes = {port.name: port.shape[0] for port in self.inputs if port.shape and isinstance(port.shape[0], str)}
        prepared = broadcast_batch({port.name: self._cast_input(port, feeds) for port in self.inputs}, batch_axes)
        outcome: list[Any] = []
        done = threading.Event()  # not Thread.join: an interrupted join marks the thread as finished

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
        return self._collect_outputs(outcome[0], prepared, terminated=bool(options.terminate))

    def finish_profile(self) -> list[dict[str, Any]]:
        """End ONNX Runtime's profile; returns its events."""
        return json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))

    def cancel(self) -> None:
        """Stop the run that another thread is in, if there is one."""
        if (options := self._options) is not None:
            options.terminate = True

    def _cast_input(self, port: Port, feeds: Mapping[str, AnyArray]) -> AnyArray:
        if port.name not in feeds:
            raise missing_input(self.path, port.name, feeds)
        value = feeds[port.name].astype(port.dtype, copy=False)
        return value.reshape((1,) * (len(port.shape) - value.ndim) + value.shape)

    def _collect_outputs(self, outcome: Any, feeds: Mapping[str, AnyArray], *, terminated: bool) -> dict[str, AnyArray]:
        if isinstance(outcome, Exception):
            if terminated:
                raise Cancelled("the run was cancelled") from None
            reason = first_line(outcome)
            remedy = "choose a smaller size or another device" if "alloc" in reason.lower() else "try another device"
            raise DeviceError(f"{self.path} failed on device '{self.device}': {reason}; {remedy}") from None
        results = dict(zip((port.name for port in self.outputs), outcome, strict=True))
        for name in _non_finite(results):
            for given in _non_finite(feeds):
                raise PackageError(
                    f"{self.path}: output '{name}' is not finite, because its input '{given}' is not; "
                    "use a lower guidance scale, other images or embeddings, or export with --precision fp32"
                )
            raise PackageError(
                f"{self.path}: output '{name}' is not finite; "
                "the checkpoint is damaged or overflows: export it again, with --precision fp32"
            )
        return results


def _non_finite(arrays: Mapping[str, AnyArray]) -> list[str]:
    """Names of arrays with an infinity or a NaN."""
    return [name for name, value in arrays.items() if value.dtype.kind == "f" and not np.isfinite(value).all()]


def missing_input(path: Path, name: str, feeds: Mapping[str, AnyArray]) -> PackageError:
    """The error for an input of a graph that ``feeds`` doesn't have."""
    provided = ", ".join(feeds)
    return PackageError(f"{path} requires input '{name}', which this version does not provide (provided: {provided})")


def broadcast_batch(feeds: Mapping[str, AnyArray], batch_axes: Mapping[str, str]) -> dict[str, AnyArray]:
    """Repeat smaller batches to the size of the largest one of the same batch axis, where that is a multiple.

    ``batch_axes`` has the symbolic names of the inputs' first axes.
    """
    axes = {name: axis for name, axis in batch_axes.items() if name in feeds and feeds[name].ndim > 0}
    sizes: dict[str, int] = {}
    for name, axis in axes.items():
        sizes[axis] = max(sizes.get(axis, 1), len(feeds[name]))
    broadcast = dict(feeds)
    for name, axis in axes.items():
        times, rest = divmod(sizes[axis], len(feeds[name]))
        if times > 1 and rest == 0:
            broadcast[name] = np.concatenate([feeds[name]] * times)
    return broadcast


def _open(path: Path, model: bytes | None, device: str, settings: Any, memory_limit: int | None) -> tuple[str, Any]:
    if not path.is_file():
        raise PackageError(f"{path} is missing; run 'sdonnx export' again")
    names = ort.candidates(device)
    for index, name in enumerate(names):
        try:
            return name, _open_on(path, model, name, settings, memory_limit)
        except DeviceError as error:
            if index == len(names) - 1:
                raise
            logger.warning("%s; trying %s", error, names[index + 1])
    raise DeviceError(f"this ONNX Runtime offers none of {', '.join(DEVICES)}; {ort.install_hint('cpu')}")


def _open_on(path: Path, model: bytes | None, name: str, settings: Any, memory_limit: int | None) -> Any:
    runtime, device = load_onnxruntime(), DEVICES[name]
    settings.enable_mem_pattern = device.memory_pattern
    providers = [(device.provider, ort.provider_options(name, memory_limit))]
    if name != "cpu":
        providers.append((DEVICES["cpu"].provider, {}))  # for the few operators that a device leaves out
    try:
        graph = str(path) if model is None else model
        session = runtime.InferenceSession(graph, settings, providers=providers, enable_fallback=0)
        if device.provider in session.get_providers():
            return session
        reason = f"ONNX Runtime could not start {device.provider}"
    except Exception as error:
        reason = first_line(error)
        if name == "cpu":
            raise PackageError(f"{path} can't be loaded: {reason}; run 'sdonnx export' again") from None
    raise DeviceError(f"device '{name}' failed to initialise: {reason}; check its driver, or use --device cpu")


def _ports(described: Sequence[Any]) -> tuple[Port, ...]:
    dtypes = {each.name: np.dtype(_DTYPES.get(each.type, np.float32)) for each in described}
    return tuple(Port(name=each.name, dtype=dtypes[each.name], shape=tuple(each.shape)) for each in described)


_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""ONNX Runtime's option for the folder of the weights file of a graph that isn't opened from a file."""

_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(int64)": np.int64, "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}  # fmt: skip
"""numpy's types by ONNX Runtime's names; others are float32."""
