"""Which devices are tried for a graph, in which order, and which ones ``auto`` leaves out."""

import logging
import re
from collections.abc import Collection, Mapping
from itertools import product, takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdonnx_runtime.errors import DeviceError, PackageError
from sdonnx_runtime.execution import ort
from sdonnx_runtime.execution.devices.adapters import choose_adapter
from sdonnx_runtime.execution.devices.computing import computes, resolve_compute
from sdonnx_runtime.execution.devices.node_assignment import check_operators
from sdonnx_runtime.execution.devices.table import DEVICES, DeviceName
from sdonnx_runtime.packages.package import Package

DEVICE_NOTES = __name__
"""The log of what ``auto`` chose, at level INFO; commands print it."""

_logger = logging.getLogger(DEVICE_NOTES)


class Notes:
    """The lines about devices that this process has logged; NOTES is the one. Sessions are opened again and again."""

    def __init__(self) -> None:
        self._logged = set[str]()

    def log(self, text: str, level: int = logging.INFO) -> None:
        """Log a line, unless it was logged before, with the same figures of memory or others."""
        kind = re.sub(r"\d[\d,.]*(?= ?MB)", "", text)
        if kind not in self._logged:
            self._logged.add(kind)
            _logger.log(level, "%s", text)


NOTES = Notes()


def note(text: str, level: int = logging.INFO) -> None:
    """Log a line about devices, once in a process."""
    NOTES.log(text, level)


def choose_devices(
    device: str,
    target: str,
    *,
    compute: str = "auto",
    graph_compute: str = "f32",
    avoided: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """The devices to try for a graph, in this order: ``device`` itself, or for ``auto`` what can be used here.

    Args:
        device: auto, or the name of a device.
        target: what the graph is made for: one of TARGETS.
        compute: what it is to be computed in; ``auto`` leaves out devices that don't compute so.
        graph_compute: what the graph is written to compute in, as of `resolve_compute`.
        avoided: why ``auto`` leaves out a device, by its name, unless there is no other.

    Raises:
        RequestError: there is no such device, or no such arithmetic.
        DeviceError: no device can be used, or none computes so.
    """
    if device != "auto":
        names = ort.candidates(device, target)
        resolve_compute(device, compute, graph_compute)
        return names
    try:
        names = _able(target, compute, graph_compute, avoided)
    except DeviceError:
        if not avoided:
            raise
        names = _able(target, compute, graph_compute)
    for name in _preferred(target, names[0]):
        if name in avoided:
            note(f"not using {name}: {avoided[name]}; using {names[0]}")
        else:
            _note_absent(name, target, names[0])
    return names


def first_choice(
    device: str, target: str, *, compute: str = "auto", graph_compute: str = "f32", **how: Any
) -> tuple[str, str]:
    """The device that is tried first, and what it computes in; arguments and errors are those of `choose_devices`."""
    name = choose_devices(device, target, compute=compute, graph_compute=graph_compute, **how)[0]
    return name, resolve_compute(name, compute, graph_compute)


def avoid_unstaged(
    device: str, target: str, *, compute: str = "auto", graph_compute: str = "f32",
    avoided: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:  # fmt: skip
    """``avoided`` for a graph that runs in stages: also the devices that would compile each stage for long.

    Arguments are those of `choose_devices`. Raises DeviceError if there is no other, and as `choose_devices` does.
    """
    names = choose_devices(device, target, compute=compute, graph_compute=graph_compute, avoided=avoided)
    unsuited = [name for name in names if not DeviceName.parse(name).device.runs_stages]
    if unsuited == names:
        otherwise = ""
        if target in DEVICES["cpu"].targets:
            otherwise = ", or --device cpu" + (" --compute f32" if compute not in ("auto", "f32") else "")
        raise DeviceError(
            f"device '{names[0]}' can't run a model in stages, which this --memory requires, because it would compile "
            f"each stage in every step; use a higher --memory{otherwise}"
        )
    return {**avoided, **dict.fromkeys(unsuited, "it can't run a model in stages")}


def has_wrap(device: str, target: str, **how: Any) -> bool:
    """Whether each device that `choose_devices` may try has Pad's mode wrap; raises as it does."""
    return all(DeviceName.parse(name).device.has_wrap for name in choose_devices(device, target, **how))


def _able(target: str, compute: str, graph_compute: str, avoided: Collection[str] = ()) -> list[str]:
    """The devices that compute so, without the ``avoided`` ones; raises DeviceError if none does."""
    names = ort.candidates("auto", target, avoided=avoided)
    if compute == "auto":
        return names
    able, problems = list[str](), dict[bool, str]()
    for name in (*names, *(each for each in _choosing(target) if each not in {*names, *avoided})):
        try:
            ort.candidates(name, target)
            resolve_compute(name, compute, graph_compute)
            able.append(name)
        except DeviceError as error:
            problems[DEVICES[name].chooses_compute] = str(error)
    if not able:
        raise DeviceError(f"no device here computes in {compute}: {problems[max(problems)]}")
    return able


def _choosing(target: str) -> list[str]:
    """The devices that run graphs of a target and have a choice of what they compute in."""
    return [name for name, each in DEVICES.items() if each.chooses_compute and target in each.targets]


def _preferred(target: str, chosen: str) -> list[str]:
    """The devices that are installed, run graphs of a target, and that ``auto`` prefers to the one it came to."""
    before = takewhile(lambda name: name != chosen, DEVICES)
    return [name for name in before if target in DEVICES[name].targets and ort.is_installed(DEVICES[name])]


def _note_absent(name: str, target: str, chosen: str) -> None:
    """Say why ``auto`` can't take a device that has a choice of what it computes in."""
    if DEVICES[name].chooses_compute:
        try:
            ort.candidates(name, target)
            choose_adapter(DeviceName.parse(name))
        except DeviceError as error:
            note(f"{error}; using {chosen}")


def avoided_devices(*packages: Package) -> dict[str, str]:
    """Why ``auto`` leaves out devices for packages, by their names: others run such graphs faster, or as a whole."""
    found = dict[str, str]()
    for package in packages:
        generic = [name for name in package.manifest.components if package.target(name) == "generic"]
        for name, (base, device) in product(generic, DEVICES.items()):
            precision = package.manifest.components[name].precision
            if precision in device.auto_avoids:
                found[base] = f"{package.name} is made for the CPU in {precision}"
            elif precision in _ANY_OPERATORS and (lacking := _lacking(base, package.graph(name))):
                found[base] = lacking
    return found


_ANY_OPERATORS = ("mixed", "unknown")
"""Precisions of components that may compute in int8, or not: those of optimum exports are unknown."""


def _lacking(base: str, graph: Path) -> str | None:
    """Say which operators of a graph a device lacks; None if it has all, or the graph is missing or damaged."""
    try:
        if graph.is_file():
            check_operators(DeviceName(base), graph, None)
    except DeviceError as error:
        return str(error).partition(";")[0]
    except PackageError:  # opening it says more
        pass
    return None


def describe_graph(package: Package, component: str) -> dict[str, Any]:
    """The arguments of `choose_devices` and `Session` that say what a component's graph is."""
    avoided = avoided_devices(package)
    return {"target": package.target(component), "graph_compute": package.compute(component), "avoided": avoided}


_DIFFERENCES = {"bf16": " (median 50 dB)"}
"""PSNR of images to those that are computed in f32: the bundled model's, by bench/quality.py; see docs/devices.md."""


def note_choice(device: str, compute: str, asked: str) -> None:
    """Log which device was chosen and what it computes in, where it has a choice; ``asked`` is one of COMPUTES."""
    name = DeviceName.parse(device)
    if not name.device.chooses_compute:
        return
    adapter = choose_adapter(name).ep_device
    hardware = "" if adapter is None else f" ({adapter.ep_metadata.get('FULL_DEVICE_NAME', adapter.device.vendor)})"
    said = f"computing in {compute} on {device}{hardware}"
    if asked == "auto" and compute != "f32":
        said += f": images differ a little from those in f32{_DIFFERENCES.get(compute, '')}"
        said += "; --compute f32 gives those" if "f32" in computes(device, compute) else ""
    note(said)
