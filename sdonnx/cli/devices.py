"""What ``sdonnx info`` says of devices: those of this machine, and which nodes of a package they run."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table
from sdonnx_runtime.execution.components import check_device
from sdonnx_runtime.execution.devices.adapters import device_statuses
from sdonnx_runtime.execution.devices.table import DeviceName
from sdonnx_runtime.execution.ort import candidates
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.packages.variant import PLAIN

import sdonnx
from sdonnx.benchmark.cpu import cpu_name, instruction_set


def devices_table() -> Table:
    """The devices of this machine, with their adapters, or with what is missing."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("device", "provider", "adapters"):
        table.add_column(heading, overflow="fold")
    for status in device_statuses():
        adapters = [f"{number}: {name}" for number, name in status.adapters.items()]
        if status.device == "cpu":
            adapters = [f"{cpu_name()}, {instruction_set()}"]
        provider = status.provider if status.version is None else f"{status.provider} {status.version}"
        table.add_row(status.device, provider, status.problem or "\n".join(adapters) or "names unknown")
    return table


def devices_json() -> dict[str, Any]:
    """The same for programs."""
    return {"devices": [asdict(status) for status in device_statuses()], "instruction_set": instruction_set()}


def node_rows(package: sdonnx.Package, device: str) -> Iterator[tuple[str, str]]:
    """Open each component of a package on a device; yields which nodes of it the device runs, in words.

    Raises DeviceError if the device can't be used here, or the package is made for another one.
    """
    check_device(device, package)
    candidates(device, package.manifest.target, str(package.root))
    for name in package.manifest.components:
        try:
            session = Session(package.graph(name, PLAIN), device=device, target=package.target(name))
        except sdonnx.DeviceError as error:
            yield name, str(error)
            continue
        if session.device == "cpu":
            yield name, "all nodes on the CPU"
        elif DeviceName.parse(session.device).device.fixed_sizes:
            yield name, "not opened: the device compiles it in its first run, for the sizes of that run"
        elif (assignment := session.assignment) is None:
            yield name, "opens; this ONNX Runtime does not say which nodes the device runs"
        else:
            yield name, assignment.describe(session.device)
