"""What ``sdonnx info`` says of devices: those of this machine, and which nodes of a package they run."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table
from sdonnx_runtime.execution.components import check_device
from sdonnx_runtime.execution.devices.adapters import choose_adapter, device_statuses
from sdonnx_runtime.execution.devices.choosing import describe_graph, first_choice
from sdonnx_runtime.execution.devices.compiled_graphs import compiled_graphs
from sdonnx_runtime.execution.devices.computing import computes
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
    """The same for programs, with what `cache_text` says."""
    return {
        "devices": [asdict(status) for status in device_statuses()],
        "instruction_set": instruction_set(),
        "compiled_graphs": _cache_json(),
    }


def cache_text() -> str | None:
    """Say where compiled graphs are kept, and how large they are; None before there are any."""
    kept = _cache_json()
    if kept is None:
        return None
    used, limit = (f"{kept[name] / 1e9:.1f} GB" for name in ("bytes", "limit"))
    return (
        f"{kept['graphs']} compiled graphs, {used} of at most {limit}, in {kept['path']}; delete it to free the space"
    )


def _cache_json() -> dict[str, Any] | None:
    kept = compiled_graphs()
    if kept is None or not kept.root.is_dir():
        return None
    sizes = kept.sizes().values()
    return {"path": str(kept.root), "graphs": len(sizes), "bytes": sum(sizes), "limit": kept.allowed}


def compute_text(package: sdonnx.Package, device: str, compute: str) -> str:
    """Say what a package is computed in on a device: "bf16 on openvino; f32 with --compute f32".

    Raises DeviceError if the device can't be used here, does not compute so, or the package is made for another one.
    """
    _check(package, device, compute)
    graph = describe_graph(package, next(iter(package.manifest.components)))
    chosen, used = first_choice(device, compute=compute, **graph)
    others = [each for each in computes(chosen, graph["graph_compute"]) if each != used]
    alternatives = [f"; {each} with --compute {each}" for each in others]
    return f"{used} on {chosen}{''.join(alternatives)}"


def _check(package: sdonnx.Package, device: str, compute: str) -> None:
    """Check that a device is here and runs the package."""
    check_device(device, package, compute=compute, operators=False)
    first, *_ = candidates(device, package.manifest.target, str(package.root))
    choose_adapter(DeviceName.parse(first))


def node_rows(package: sdonnx.Package, device: str, compute: str) -> Iterator[tuple[str, str]]:
    """Open each component of a package on a device; yields which nodes of it the device runs, in words.

    Raises DeviceError as `compute_text` does.
    """
    _check(package, device, compute)
    for name in package.manifest.components:
        try:
            session = Session(
                package.graph(name, PLAIN), device=device, compute=compute, cache=False, **describe_graph(package, name)
            )
            compiles_late = DeviceName.parse(session.device).base == "directml"
            if not compiles_late:
                session.open_for_any_size()
        except sdonnx.DeviceError as error:
            yield name, str(error)
            continue
        if session.device == "cpu":
            yield name, "all nodes on the CPU"
        elif compiles_late:
            yield name, "not opened: the device compiles it in its first run, for the sizes of that run"
        elif (assignment := session.assignment) is None:
            yield name, "opens; this ONNX Runtime does not say which nodes the device runs"
        else:
            yield name, assignment.describe(session.device)
