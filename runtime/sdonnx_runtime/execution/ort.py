"""ONNX Runtime: its import, its execution providers and their options."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from sdonnx_runtime.errors import DeviceError, RequestError
from sdonnx_runtime.execution import cpu
from sdonnx_runtime.graphs.initializers import TensorData
from sdonnx_runtime.libraries import required


@dataclass(frozen=True, kw_only=True)
class Device:
    """An ONNX Runtime execution provider and its options."""

    provider: str
    """ONNX Runtime's name of it."""
    options: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
    """Provider options."""
    memory_limit_option: str | None = None
    """The provider option that caps its memory, in bytes."""
    has_wrap: bool = False
    """Whether it is known to have the mode wrap of Pad."""
    memory_pattern: bool = True
    """Whether buffers are planned from the first run. DirectML can't; on the CPU it needs more memory, no less time."""


DEVICES: dict[str, Device] = {
    "cuda": Device(
        provider="CUDAExecutionProvider",
        # Growing by powers of two could take twice the memory of a small GPU.
        options={"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_use_max_workspace": "0"},
        memory_limit_option="gpu_mem_limit",
    ),
    "directml": Device(provider="DmlExecutionProvider", memory_pattern=False),
    "cpu": Device(provider="CPUExecutionProvider", has_wrap=True, memory_pattern=False),
}
"""In the order in which ``auto`` tries them; the extra of sdonnx that installs a device has its name."""


def provider_options(name: str, memory_limit: int | None = None) -> dict[str, str]:
    """The provider options for a device, with a memory limit in bytes where it supports one."""
    device = DEVICES[name]
    if memory_limit is None or device.memory_limit_option is None:
        return dict(device.options)
    return {**device.options, device.memory_limit_option: str(memory_limit)}


def runtime_version() -> str:
    """ONNX Runtime's version."""
    return str(load_onnxruntime().__version__)


def candidates(device: str) -> list[str]:
    """The devices to try: ``device`` itself, or for ``auto`` all that this ONNX Runtime was built with.

    Raises RequestError for an unknown device, DeviceError if this ONNX Runtime was built without it.
    """
    built = set(load_onnxruntime().get_available_providers())
    if device == "auto":
        return [name for name, known in DEVICES.items() if known.provider in built]
    if device not in DEVICES:
        raise RequestError(f"there is no device '{device}'; choose auto, {', '.join(DEVICES)}")
    if DEVICES[device].provider not in built:
        raise DeviceError(
            f"device '{device}' is not available: the installed ONNX Runtime {runtime_version()} has no "
            f"{DEVICES[device].provider}; {install_hint(device)}"
        )
    return [device]


def has_wrap(device: str) -> bool:
    """Whether each device that may be opened for ``device`` has Pad's mode wrap; raises as `candidates` does."""
    return all(DEVICES[name].has_wrap for name in candidates(device))


def load_onnxruntime() -> ModuleType:
    """Import onnxruntime; DeviceError if it is not installed or can't be loaded."""
    with required(f"{install_hint('cpu')} (or cuda, or directml)", error=DeviceError):
        import onnxruntime  # pyright: ignore[reportMissingTypeStubs]

        if not hasattr(onnxruntime, "InferenceSession"):
            raise ImportError("most of it was removed with another wheel of the same name", name="onnxruntime")
    return onnxruntime


def install_hint(device: str) -> str:
    """The pip command that installs the ONNX Runtime for a device."""
    return f"""install it with pip install "sdonnx[{device}]\""""


def first_line(error: Exception) -> str:
    """The first line of an error message, at most 300 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")[:300]


def session_options(threads: int | None, profile: Path | None, weights: Mapping[str, TensorData]) -> Any:
    """ONNX Runtime's options for a session."""
    runtime = load_onnxruntime()
    settings = runtime.SessionOptions()
    settings.log_severity_level = 4  # failures come back as exceptions
    settings.intra_op_num_threads = threads if threads is not None else 0
    settings.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # compute int4 MatMul in float32
    settings.add_session_config_entry("session.x64quantprecision", str(int(cpu.int8_saturates())))
    settings.add_session_config_entry("session.use_device_allocator_for_initializers", "1")  # not in the arena
    settings.execution_order = runtime.ExecutionOrder.PRIORITY_BASED  # as in the file: buffers are freed early
    if profile is not None:
        settings.enable_profiling, settings.profile_file_prefix = True, str(profile)
    make = runtime.OrtValue.ortvalue_from_numpy_with_onnx_type
    settings.add_external_initializers(list(weights), [make(each.data, each.data_type) for each in weights.values()])
    return settings
