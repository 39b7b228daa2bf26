"""The adapters of devices, GPUs mostly: their names, and the options that choose one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from subprocess import SubprocessError
from typing import Any

from sdonnx_runtime.errors import DeviceError
from sdonnx_runtime.execution import ort
from sdonnx_runtime.execution.cpu import run_command
from sdonnx_runtime.execution.devices.table import DEVICES, DeviceName


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What opens a session on the adapter of a device."""

    options: dict[str, str]
    """Provider options."""
    ep_device: Any = None
    """The OrtEpDevice of a plugin; None for a provider that ONNX Runtime was built with."""


def choose_adapter(name: DeviceName) -> Choice:
    """Find the adapter that a device's name asks for.

    Raises DeviceError if there is none, or its plugin can't be loaded.
    """
    device, number = name.device, name.adapter if isinstance(name.adapter, int) else None
    kind = device.default_kind if name.adapter is None else name.adapter
    options = dict(device.kinds.get(kind, {})) if isinstance(kind, str) else {}
    if number is not None and device.adapter_option is not None:
        _check_number(name.base, number)
        return Choice(options={device.adapter_option: str(number)})
    if device.plugin is None:
        return Choice(options={})
    listed = ort.provider_devices(name.base)
    found = [each for each in listed if options or not isinstance(kind, str) or ort.hardware_kind(each) == kind]
    if number is not None:
        _check_number(name.base, number)
        options = _power_preference(found, number) if any(device.kinds.values()) else {}
    if ort.is_built_in(device):
        return Choice(options=options)
    if not found:
        raise DeviceError(ort.no_adapter(str(name)) if not listed else _list_others(name, listed))
    return Choice(options=options, ep_device=found[number or 0])


def _list_others(name: DeviceName, listed: Sequence[Any]) -> str:
    """Say that a device's type of hardware is not here, and which are."""
    present = dict[str, str]()
    for each in listed:
        present.setdefault(ort.hardware_kind(each), _describe(each))
    others = ", ".join(f"{name.base}:{kind} ({said})" for kind, said in present.items())
    hint = f"; {name.device.hint}" if name.adapter in (None, name.device.default_kind) and name.device.hint else ""
    return f"there is no device '{name}' here; choose {others}{hint}"


def adapter_names(base: str) -> dict[int, str]:
    """The names of a device's adapters by their numbers; empty where they are unknown.

    Raises DeviceError if the device's plugin can't be loaded.
    """
    found = [] if base == "cpu" else ort.provider_devices(base)
    if not found and base == "cuda":
        return _nvidia_names()
    return {_number(base, each, index): _describe(each) for index, each in enumerate(found)}


@dataclass(frozen=True, kw_only=True)
class DeviceStatus:
    """A device, as it is on this machine."""

    device: str
    """A key of DEVICES."""
    provider: str
    version: str | None
    """Of the library with the provider; None where there is none."""
    adapters: dict[int, str]
    """The names of its adapters by their numbers, as far as they are known."""
    problem: str | None
    """Why it can't be used, and what helps; None where nothing is known that speaks against it."""


def device_statuses() -> list[DeviceStatus]:
    """All devices, in the order in which ``auto`` tries them; DeviceError without an ONNX Runtime."""
    return [_status(base) for base in DEVICES]


def _status(base: str) -> DeviceStatus:
    device, adapters, version, problem = DEVICES[base], dict[int, str](), None, None
    try:
        if ort.is_installed(device):
            ort.candidates(base)
            adapters = adapter_names(base)
            said = (each.ep_metadata.get("version") for each in ort.provider_devices(base))
            version = next(said, ort.runtime_version())
        else:
            problem = f"{ort.install_hint(base)}; it requires {device.requires}"
    except DeviceError as error:
        problem = str(error)
    return DeviceStatus(device=base, provider=device.provider, version=version, adapters=adapters, problem=problem)


def _check_number(base: str, number: int) -> None:
    names = adapter_names(base)
    if number not in names and (names or (number > 0 and DEVICES[base].plugin is not None)):
        present = ", ".join(f"{base}:{each} ({name})" for each, name in names.items()) or f"{base} alone"
        raise DeviceError(f"there is no device '{base}:{number}' here; choose {present}")


def _number(base: str, ep_device: Any, index: int) -> int:
    """The number of an adapter: that of the provider's option where the provider says it, else its place."""
    option = DEVICES[base].adapter_option
    known = None if option is None else ep_device.ep_options.get(option)
    return int(known) if known is not None and str(known).isdecimal() else index


def _describe(ep_device: Any) -> str:
    """The name of the hardware of an OrtEpDevice."""
    hardware, metadata, kind = ep_device.device, ep_device.device.metadata, ep_device.device.type.name
    if (name := ep_device.ep_metadata.get("FULL_DEVICE_NAME")) is not None:
        return f"{name}, {kind}"
    if kind == "CPU":
        return "software, on the CPU"
    size = {"1": "discrete ", "0": "integrated "}.get(metadata.get("Discrete", ""), "")
    name = metadata.get("Description") or f"{hardware.vendor or 'unknown'} {hardware.device_id:04x}"
    return f"{name}, {size}{kind}"


def _power_preference(found: Sequence[Any], number: int) -> dict[str, str]:
    """The options by which the WebGPU provider takes a certain GPU: it chooses by power, whatever device it is given.

    Raises DeviceError if another GPU can't be told from it so.
    """
    if len(found) == 1:
        return {}
    kinds = [each.device.metadata.get("Discrete") == "1" for each in found]
    if kinds.count(kinds[number]) > 1:
        raise DeviceError(
            f"the WebGPU provider can't choose among several {'discrete' if kinds[number] else 'integrated'} GPUs; "
            "use --device webgpu, and hide the others from it by the settings of the GPU's driver"
        )
    return {"powerPreference": "high-performance" if kinds[number] else "low-power"}


def _nvidia_names() -> dict[int, str]:
    """The names of NVIDIA's GPUs by their numbers, as its driver lists them; empty where CUDA may count otherwise."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return {}
    try:
        lines = run_command("nvidia-smi", "--query-gpu=index,name", "--format=csv,noheader").splitlines()
    except (OSError, SubprocessError):
        return {}
    pairs = (line.partition(",") for line in lines)
    return {int(index): name.strip() for index, _, name in pairs if index.strip().isdecimal()}
