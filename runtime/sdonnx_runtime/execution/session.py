"""A thin wrapper over onnxruntime.InferenceSession: devices, running, cancelling, errors with a remedy."""

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import DeviceError, PackageError, SdonnxError
from sdonnx_runtime.execution import ort
from sdonnx_runtime.execution.arena import PROCESS_MEMORY, USE_ENV_ALLOCATORS
from sdonnx_runtime.execution.devices.adapters import choose_adapter
from sdonnx_runtime.execution.devices.choosing import choose_devices
from sdonnx_runtime.execution.devices.computing import resolve_compute
from sdonnx_runtime.execution.devices.opening import Opened, Opening, open_session
from sdonnx_runtime.execution.devices.sized_sessions import KEPT, SizedSessions
from sdonnx_runtime.execution.devices.table import DeviceName
from sdonnx_runtime.execution.ort import first_line, load_onnxruntime
from sdonnx_runtime.execution.running.device_array import DeviceArray, Tensor, all_numpy, as_numpy
from sdonnx_runtime.execution.running.device_binding import DeviceBinding
from sdonnx_runtime.execution.running.shared_weights import SharedWeights
from sdonnx_runtime.execution.running.worker import Worker
from sdonnx_runtime.graphs.initializers import DTYPES, TensorData, embed_values
from sdonnx_runtime.graphs.onnx_proto import ValueInfo, decode_model, package_errors

if TYPE_CHECKING:
    from sdonnx_runtime.execution.devices.node_assignment import NodeAssignment

_T = TypeVar("_T", bound=Tensor)


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
        device: auto, or the name of a device, see `DeviceName`.
        target: what the graph is made for: one of TARGETS.
        threads: CPU threads; None is the number of physical cores.
        compute: what the arithmetic is done in: one of COMPUTES.
        graph_compute: what the graph is written to compute in, as of `resolve_compute`.
        avoided: why ``auto`` leaves out a device, by its name.
        memory_limit: bytes that the device may use, where it has such an option (CUDA).
        profile: the beginning of the path of ONNX Runtime's profile; None writes none.
        weights: values that replace initializers, by name.
        model: an encoded graph that replaces the file's, with the same weights file.
        no_arena: on the CPU, return each buffer to the system at once instead of to the shared arena; slower.
        any_size: on a device that has a session for each size, run tiles of all sizes with one.
        cache: keep compiled graphs on disk, where the device compiles them for long.
        shared_weights: those of other graphs over the same weights file with the same ``weights``.
        kept_sizes: sizes of inputs for which a session stays open, on a device that opens one for each.

    Raises:
        DeviceError: the device is absent, fails to initialise, or does not run graphs of the target.
        PackageError: the graph can't be loaded.
    """

    def __init__(
        self, path: Path, *, device: str = "auto", target: str = "generic", threads: int | None = None,
        memory_limit: int | None = None, profile: Path | None = None,
        weights: Mapping[str, TensorData] = MappingProxyType({}), model: bytes | None = None, no_arena: bool = False,
        shared_weights: SharedWeights | None = None, compute: str = "auto", graph_compute: str = "f32",
        avoided: Mapping[str, str] = MappingProxyType({}), any_size: bool = False, kept_sizes: int = KEPT,
        cache: bool = True,
    ) -> None:  # fmt: skip
        self.path = path
        if not path.is_file():
            raise PackageError(f"{path} is missing; run 'sdonnx export' again")
        inline = {name: each for name, each in weights.items() if each.is_inline}
        if inline:
            model = embed_values(path.read_bytes() if model is None else model, inline)
        replaced = {name: each for name, each in weights.items() if name not in inline}
        self._weights, self._shared_weights = replaced, shared_weights  # for as long as the session

        def make_settings() -> Any:
            settings = ort.session_options(threads, profile, replaced)  # reads the weights where they are
            settings.enable_cpu_mem_arena = not no_arena
            shared = not no_arena and PROCESS_MEMORY.share_arena()
            settings.add_session_config_entry(USE_ENV_ALLOCATORS, str(int(shared)))
            return settings

        opening = Opening(
            path=path, model=model, settings=make_settings, device=device, target=target, memory_limit=memory_limit,
            weights=replaced, compute=compute, graph_compute=graph_compute, avoided=avoided, threads=threads,
            cache=cache, shared=shared_weights,
        )  # fmt: skip
        names = choose_devices(device, target, compute=compute, graph_compute=graph_compute, avoided=avoided)
        self.device, self.compute = names[0], resolve_compute(names[0], compute, graph_compute)
        """What it computes in: f32, bf16 or f16; as the device, the first choice of ``auto`` until a first run."""
        self.assignment: NodeAssignment | None = None
        """Which nodes the device runs; None on the CPU, before a first run, and where ONNX Runtime doesn't say."""
        self._sized: SizedSessions | None = None
        self._binding: DeviceBinding | None = None
        self._session: Any = None
        fixed_sizes = [DeviceName.parse(each).device.fixed_sizes for each in names]
        if any(fixed_sizes):  # the device that auto comes to, where the first one fails, may be one of these
            if fixed_sizes[0]:
                choose_adapter(DeviceName.parse(self.device))  # says at once if there is none
            self.inputs, self.outputs = _read_ports(path, model)
            shapes = {port.name: port.shape for port in self.inputs}
            self._sized = SizedSessions(opening, shapes, kept_sizes, any_size=any_size)
        else:
            self._use(open_session(opening))
            self.inputs, self.outputs = _ports(self._session.get_inputs()), _ports(self._session.get_outputs())
        self._worker = Worker(self, f"sdonnx {path.parent.name}")
        self._options: Any = None

    def run(self, feeds: Mapping[str, Tensor], keep: Container[str] = ()) -> dict[str, Any]:
        """Run the graph; returns all outputs by name: numpy arrays, or `DeviceArray` for the outputs in ``keep``.

        Inputs are cast to the graph's element types and ranks, and batches repeated as `broadcast_batch` does. Ctrl-C
        stops the run between two operators. On a device with memory of its own, outputs in ``keep`` stay there, and
        read-only inputs that are the same arrays as in the last run are not uploaded again; on the CPU, ``keep`` makes
        no difference. Outputs that are kept are not checked for finite values: what is computed from them is.

        Raises:
            PackageError: an input of the graph is not in ``feeds``, or an output is not finite.
            DeviceError: the device failed, for example for lack of memory.
            Cancelled: `cancel` was called.
        """
        options, prepared = load_onnxruntime().RunOptions(), self._prepare_inputs(feeds)
        self._open_sizes(prepared)

        def run() -> list[Any]:
            if self._binding is None:
                names = [port.name for port in self.outputs]  # a rewritten graph may have them in another order
                return self._session.run(names, prepared, options)
            outputs = {port.name: port.dtype for port in self.outputs}
            return self._binding.run(feeds, prepared, outputs, keep, options)

        self._options = options
        try:
            outcome = self._worker.call(run, lambda: setattr(options, "terminate", True))
        finally:
            self._options = None
        return self._collect_outputs(outcome, prepared, terminated=bool(options.terminate))

    def is_open_for(self, feeds: Mapping[str, Tensor]) -> bool:
        """Whether a run on these inputs opens nothing: false on a device with a session for each size of them."""
        return self._sized is None or self._sized.is_open(self._prepare_inputs(feeds))

    def open_for(self, feeds: Mapping[str, Tensor]) -> None:
        """Open what a run on these inputs needs; raises as `run` does."""
        if self._sized is not None:
            self._open_sizes(self._prepare_inputs(feeds))

    def open_for_any_size(self) -> None:
        """Open the graph before its first run, where sizes aren't known, to find `assignment`.

        Raises as the constructor does.
        """
        if self._sized is not None:
            self._use(self._sized.open_for_any_size())

    def finish_profile(self) -> list[dict[str, Any]]:
        """End ONNX Runtime's profile; returns its events."""
        return json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))

    def cancel(self) -> None:
        """Stop the run that another thread is in, if there is one."""
        if (options := self._options) is not None:
            options.terminate = True

    def _prepare_inputs(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of the graph in its types and ranks, and with batches of one size."""
        batch_axes = {port.name: port.shape[0] for port in self.inputs if port.shape and isinstance(port.shape[0], str)}
        return broadcast_batch({port.name: self._cast_input(port, feeds) for port in self.inputs}, batch_axes)

    def _open_sizes(self, prepared: Mapping[str, Tensor]) -> None:
        """Open the session for the sizes of inputs, on a device that has one for each."""
        if self._sized is not None:
            if not self._sized.is_open(prepared):
                self._session = self._binding = None  # which may be closed for it
            self._use(self._sized.find(prepared))

    def _use(self, opened: Opened) -> None:
        """Let an open graph run from now on."""
        if opened.session is not self._session:
            self.device, self.compute, self._session = opened.device, opened.compute, opened.session
            self.assignment = opened.assignment
            memory = ort.device_memory(self.device)
            self._binding = None if memory is None else DeviceBinding(self._session, self.device, memory)

    def _cast_input(self, port: Port, feeds: Mapping[str, Tensor]) -> Tensor:
        if port.name not in feeds:
            raise missing_input(self.path, port.name, feeds)
        given = feeds[port.name]
        if isinstance(given, DeviceArray) and (given.device, given.dtype) == (self.device, port.dtype):
            return given
        value = as_numpy(given).astype(port.dtype, copy=False)
        return value.reshape((1,) * (len(port.shape) - value.ndim) + value.shape)

    def _collect_outputs(self, outcome: Any, feeds: Mapping[str, Tensor], *, terminated: bool) -> dict[str, Any]:
        if terminated:  # also where the device ends a run first
            raise Cancelled("the run was cancelled") from None
        if isinstance(outcome, Exception):
            reason = first_line(outcome)
            remedy = "choose a smaller size or another device" if "alloc" in reason.lower() else "try another device"
            raise DeviceError(f"{self.path} failed on device '{self.device}': {reason}; {remedy}") from None
        results = dict(zip((port.name for port in self.outputs), outcome, strict=True))
        for name in _non_finite(results):
            for given in _non_finite(all_numpy(feeds)):
                raise PackageError(
                    f"{self.path}: output '{name}' is not finite, because its input '{given}' is not; "
                    "use a lower guidance scale, other images or embeddings, or export with --precision fp32"
                )
            raise PackageError(
                f"{self.path}: output '{name}' is not finite; "
                "the checkpoint is damaged or overflows: export it again, with --precision fp32"
            )
        return results


def _non_finite(values: Mapping[str, Tensor]) -> list[str]:
    """Names of numpy arrays with an infinity or a NaN."""
    arrays = {name: value for name, value in values.items() if not isinstance(value, DeviceArray)}
    return [name for name, value in arrays.items() if value.dtype.kind == "f" and not np.isfinite(value).all()]


def missing_input(path: Path, name: str, feeds: Mapping[str, Tensor]) -> PackageError:
    """The error for an input of a graph that ``feeds`` doesn't have."""
    provided = ", ".join(feeds)
    return PackageError(f"{path} requires input '{name}', which this version does not provide (provided: {provided})")


def broadcast_batch(feeds: Mapping[str, _T], batch_axes: Mapping[str, str]) -> dict[str, _T | AnyArray]:
    """Repeat smaller batches to the size of the largest one of the same batch axis, where that is a multiple.

    ``batch_axes`` has the symbolic names of the inputs' first axes.
    """
    axes = {name: axis for name, axis in batch_axes.items() if name in feeds and feeds[name].ndim > 0}
    sizes: dict[str, int] = {}
    for name, axis in axes.items():
        sizes[axis] = max(sizes.get(axis, 1), len(feeds[name]))
    broadcast = dict[str, _T | AnyArray](feeds)
    for name, axis in axes.items():
        times, rest = divmod(sizes[axis], len(feeds[name]))
        if times > 1 and rest == 0:
            broadcast[name] = np.concatenate([as_numpy(feeds[name])] * times)
    return broadcast


def _ports(described: Sequence[Any]) -> tuple[Port, ...]:
    dtypes = {each.name: np.dtype(_DTYPES.get(each.type, np.float32)) for each in described}
    return tuple(Port(name=each.name, dtype=dtypes[each.name], shape=tuple(each.shape)) for each in described)


def _read_ports(path: Path, model: bytes | None) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """The inputs and outputs of a graph, without opening a session."""
    with package_errors(path):
        graph = decode_model(memoryview(path.read_bytes() if model is None else model), nodes=False)
        return _decode_ports(graph.inputs), _decode_ports(graph.outputs)


def _decode_ports(described: Mapping[str, memoryview]) -> tuple[Port, ...]:
    values = {name: ValueInfo.decode(each) for name, each in described.items()}
    return tuple(
        Port(
            name=name,
            dtype=np.dtype(DTYPES[each.data_type]),
            shape=tuple(None if axis == "" else axis for axis in each.shape),
        )
        for name, each in values.items()
    )


_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(int64)": np.int64, "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}  # fmt: skip
"""numpy's types by ONNX Runtime's names; others are float32."""
