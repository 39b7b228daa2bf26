"""ONNX Runtime: its import, its execution providers, those of plugins among them, and the options of sessions."""

import re
import threading
from collections.abc import Collection, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import DeviceError
from sdonnx_runtime.execution import cpu
from sdonnx_runtime.execution.devices.table import DEVICES, Device, DeviceName
from sdonnx_runtime.graphs.initializers import TensorData
from sdonnx_runtime.libraries import required


def load_onnxruntime() -> ModuleType:
    """Import onnxruntime; DeviceError if it is not installed or can't be loaded."""
    with required(_INSTALL, error=DeviceError):
        import onnxruntime  # pyright: ignore[reportMissingTypeStubs]

        if not hasattr(onnxruntime, "InferenceSession"):
            raise ImportError("most of it was removed with another wheel of the same name", name="onnxruntime")
    return onnxruntime


_INSTALL = f"""install it with pip install "sdonnx[cpu]" (or {", ".join(name for name in DEVICES if name != "cpu")})"""


def runtime_version() -> str:
    """ONNX Runtime's version."""
    return str(load_onnxruntime().__version__)


def install_hint(device: str) -> str:
    """The pip command that installs the ONNX Runtime for a device, and the one that removes what is in its way."""
    text = f"""install it with pip install "sdonnx[{device}]\""""
    others = [name for name in _installed_wheels() if name != DEVICES[device].wheel]
    if not others:
        return text
    return f"{text} after pip uninstall -y {' '.join(others)}, which has the same files"


def _installed_wheels() -> list[str]:
    """The distributions of ONNX Runtime that pip has installed: onnxruntime, onnxruntime-gpu, ..."""
    from importlib.metadata import distributions  # with all of email: 2 MB that only a message of an error needs

    names = {str(each.metadata["Name"]).lower().replace("_", "-") for each in distributions()}
    wheels = {"onnxruntime", *(f"onnxruntime-{kind}" for kind in _WHEELS)}
    return sorted(names & wheels)


_WHEELS = ("directml", "gpu", "migraphx", "openvino", "qnn", "rocm", "webgpu", "windowsml")
"""The distributions that are ONNX Runtime with other providers."""


def candidates(
    device: str, target: str = "generic", source: str = "SRC", *, avoided: Collection[str] = ()
) -> list[str]:
    """The devices to try for graphs of a target: ``device`` itself, or for ``auto`` all that can be used here.

    Args:
        device: auto, or the name of a device.
        target: one of TARGETS.
        source: what the package was exported from, for the messages.
        avoided: the devices that ``auto`` leaves out; the plugin of one is not loaded, which takes memory.

    Raises:
        RequestError: there is no such device.
        DeviceError: it does not run such graphs, or can't be used here.
    """
    if device == "auto":
        suited = [name for name, known in DEVICES.items() if target in known.targets and name not in avoided]
        if not suited:
            raise DeviceError(f"no device but {', '.join(avoided)} runs graphs for {target}")
        usable = [name for name in suited if _is_usable(name)]
        if not usable:
            _check_available(suited[0], target, source)
            raise DeviceError(
                f"device '{suited[0]}' finds a software adapter alone, which auto does not take; "
                f"use --device {suited[0]}, or export the package for every device: {_export_command(source)}"
            )
        return usable
    check_target(device, target, source)
    _check_available(DeviceName.parse(device).base, target, source)
    return [device]


def check_target(device: str, target: str, source: str = "SRC") -> None:
    """Check that a device other than ``auto`` runs graphs of a target, whether it can be used here or not.

    Raises RequestError for an unknown device, DeviceError for one that does not.
    """
    if target not in DeviceName.parse(device).device.targets:
        raise DeviceError(
            f"the package is made for {DEVICES[target].title}, and can't run on device '{device}'; "
            f"use --device {target}, or export it for every device: {_export_command(source)}"
        )


def _check_available(base: str, target: str, source: str) -> None:
    """Raise DeviceError if a device can't be used here."""
    device = DEVICES[base]
    otherwise = f"; or export the package for every device: {_export_command(source)}" if target != "generic" else ""
    if not is_installed(device):
        raise DeviceError(
            f"device '{base}' is not available: the installed ONNX Runtime {runtime_version()} has no "
            f"{device.provider}; {install_hint(base)}{otherwise}"
        )
    if not is_built_in(device) and not provider_devices(base):
        raise DeviceError(f"{no_adapter(base)}{otherwise}")


def no_adapter(name: str) -> str:
    """Say that a device finds no adapter, and what helps."""
    device = DeviceName.parse(name).device
    hint = f"; {device.hint}" if device.hint else ""
    return f"device '{name}' finds no adapter: it requires {device.requires}{hint}"


def _export_command(source: str) -> str:
    return f"sdonnx export {source} --target generic"


def _is_usable(base: str) -> bool:
    """Whether ``auto`` may take a device: a plugin's must have its type of hardware, or any but a software adapter."""
    device = DEVICES[base]
    if not is_installed(device) or is_built_in(device):
        return is_installed(device)
    try:
        kinds = {hardware_kind(each) for each in provider_devices(base)}
        return bool(kinds - {"cpu"}) if device.default_kind is None else device.default_kind in kinds
    except DeviceError:
        return False


def is_installed(device: Device) -> bool:
    """Whether a device's provider is here: ONNX Runtime's own, or a plugin."""
    return is_built_in(device) or (device.plugin is not None and find_spec(device.plugin) is not None)


def is_built_in(device: Device) -> bool:
    """Whether the installed ONNX Runtime has a device's provider by itself; newer ones also list those of plugins."""
    return device.plugin not in PLUGINS.modules and device.provider in load_onnxruntime().get_available_providers()


def is_loaded(device: Device) -> bool:
    """Whether a device's provider is in this process: ONNX Runtime's own, or a plugin that was loaded."""
    return device.plugin in PLUGINS.modules or is_built_in(device)


class Plugins:
    """The libraries of execution providers that this process has registered with ONNX Runtime; PLUGINS is the one."""

    def __init__(self) -> None:
        self.modules = set[str]()
        """The modules whose libraries are registered."""
        self._lock = threading.Lock()

    def register(self, module: str, extra: str) -> None:
        """Register a plugin's library, once; DeviceError if it can't be loaded, which names sdonnx' ``extra``.

        A library is registered for the whole process under a name that is its own; a name ending in ``.virtual`` would
        also offer devices that compile and can't run.
        """
        runtime = load_onnxruntime()
        with self._lock:
            if module in self.modules:
                return
            try:
                library = str(import_module(module).get_library_path())
                runtime.register_execution_provider_library(module, library)
            except Exception as error:
                if "already registered" not in str(error):  # by another library of this process
                    raise DeviceError(
                        f'{module} can\'t be loaded: {first_line(error)}; update both: pip install -U "sdonnx[{extra}]"'
                    ) from None
            self.modules.add(module)


PLUGINS = Plugins()


def provider_devices(base: str) -> list[Any]:
    """ONNX Runtime's OrtEpDevices of a device's provider, which may be a plugin's; empty where it lists none.

    Raises DeviceError if the plugin can't be loaded.
    """
    runtime, device = load_onnxruntime(), DEVICES[base]
    if device.plugin is not None and not is_built_in(device):
        PLUGINS.register(device.plugin, base)
    if not hasattr(runtime, "get_ep_devices"):
        return []
    found = [each for each in runtime.get_ep_devices() if each.ep_name == device.provider]
    return [each for each in found if each.device.metadata.get("is_virtual") != "1"]


def hardware_kind(ep_device: Any) -> str:
    """The type of hardware of an OrtEpDevice: cpu, gpu or npu."""
    return str(ep_device.device.type.name).lower()


def device_memory(device: str) -> tuple[str, int] | None:
    """ONNX Runtime's name and index of the memory of a device such as cuda or cuda:1; None if it is the CPU's."""
    name = DeviceName.parse(device)
    number = name.adapter if isinstance(name.adapter, int) and name.device.adapter_option is not None else 0
    return None if name.device.memory is None else (name.device.memory, number)


def bound_outputs(binding: Any) -> list[Any]:
    """The OrtValues of the last run with an IO binding, in the order in which the outputs were bound.

    They outlive the binding of other outputs; those of its ``get_outputs`` do not, in 1.27 and before.
    """
    outputs = binding.get_outputs_as_ortvaluevector()
    return [load_onnxruntime().OrtValue(outputs[index]) for index in range(len(outputs))]


def borrowed(value: Any, dtype: np.dtype[Any], memory: tuple[str, int], session: Any) -> Any:
    """An OrtValue on the memory of another, which must outlive it: sessions take no initializer that owns its memory.

    The binding of any ``session`` on the device with an output ``y`` makes it; nothing runs.
    """
    binding = session.io_binding()
    binding.bind_output("y", *memory, dtype, value.shape(), value.data_ptr())
    made = bound_outputs(binding)[0]
    if made.device_name() != memory[0]:  # sessions would take it, and fail when they run
        raise ValueError(f"ONNX Runtime {runtime_version()} says that it is memory of {made.device_name()}")
    return made


def upload(values: AnyArray, ep_device: Any) -> Any:
    """Copy an array to the memory of a plugin's OrtEpDevice; an OrtValue.

    A session must have been opened there before: the first use of a device chooses its adapter.
    """
    runtime = load_onnxruntime()
    memory = ep_device.memory_info(runtime.OrtDeviceMemoryType.DEFAULT)
    uploaded = runtime.OrtValue.ortvalue_from_shape_and_type(values.shape, values.dtype, memory_info=memory)
    runtime.copy_tensors([runtime.OrtValue.ortvalue_from_numpy(values)], [uploaded])
    return uploaded


def read_value(value: Any) -> AnyArray:
    """Copy an OrtValue from a device's memory."""
    try:
        return value.numpy()
    except Exception:  # newer releases say that a WebGPU buffer is to be copied explicitly
        runtime = load_onnxruntime()
        host = runtime.OrtValue.ortvalue_from_shape_and_type(value.shape(), value.element_type())
        runtime.copy_tensors([value], [host])
        return host.numpy()


def first_line(error: Exception) -> str:
    """The first line of an error message, at most 300 characters; of a check of ONNX Runtime's, what it says.

    OpenVINO's messages begin with the places in its source that an exception passed.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = next((line for line in lines if _PLACE.search(line) is None), lines[0])
    return said.rpartition(" was false. ")[2].rstrip(".")[:300]


_PLACE = re.compile(r"Exception from \S+:\d+:$|^Check '.*' failed at \S+:\d+:$")


def quiet_options() -> Any:
    """ONNX Runtime's options for a session, by default: failures come back as exceptions alone."""
    settings = load_onnxruntime().SessionOptions()
    settings.log_severity_level = 4
    return settings


def session_options(threads: int | None, profile: Path | None, weights: Mapping[str, TensorData]) -> Any:
    """ONNX Runtime's options for a session."""
    runtime, settings = load_onnxruntime(), quiet_options()
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


WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""ONNX Runtime's option for the folder of the weights file of a graph that isn't opened from a file."""
