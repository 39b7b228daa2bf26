"""``sdonnx plan``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table
from sdonnx_runtime.execution.devices.choosing import describe_graph, first_choice
from sdonnx_runtime.execution.devices.table import base_name
from sdonnx_runtime.graphs.shape_inference import UnsupportedGraph
from sdonnx_runtime.memory.budget import MIN
from sdonnx_runtime.memory.device_memory import OUTSIDE, DevicePlan, plan_device
from sdonnx_runtime.memory.planner import MemoryPhase
from sdonnx_runtime.memory.workload import memory_phases, upscaler_phase
from sdonnx_runtime.packages.families import PackageKind

import sdonnx
from sdonnx.benchmark.worker import macs_per_second
from sdonnx.cli.console import out, print_json, strategy_text
from sdonnx.cli.options import Compute, Memory, SafetyMode, Threads, Vae, parse_request, request_option
from sdonnx.loading import find_model

_UPSCALED = {"width": 512, "height": 512}
"""The image that an upscaler is planned for unless there is a --size."""

_OF_PROCESS = ("cpu", "openvino")
"""The devices that take memory of the process."""


def plan(
    package: Annotated[str, typer.Argument(metavar="PACKAGE", help="A package's directory, or a Hub id of one.")],
    memory: Memory = "auto",
    size: Annotated[str | None, request_option("width")] = None,
    guidance: Annotated[float | None, request_option("guidance_scale")] = None,
    cache_interval: Annotated[int | None, request_option("cache_interval")] = None,
    vae: Vae = None,
    safety: SafetyMode = "off",
    device: Annotated[
        str | None,
        typer.Option(
            metavar="|".join((*_OF_PROCESS, *OUTSIDE)),
            help="A GPU's memory is predicted from the graphs: this machine needs no GPU for it. Default: what the "
            "package is made for, else cpu.",
        ),
    ] = None,
    compute: Compute = "auto",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict the memory and time of a request on the CPU or openvino, or its memory on a GPU, without running it.

    [dim]sdonnx plan sd15-onnx --size 512x512 --memory 600MB[/dim] or [dim]sdonnx plan sd15-cuda --device cuda[/dim]
    """
    opened = sdonnx.Package.open(find_model(package))
    options = {"size": size, "guidance": guidance, "cache_interval": cache_interval}
    if opened.kind is PackageKind.UPSCALER and (
        any(each is not None for each in (guidance, cache_interval, vae)) or safety != "off"
    ):
        raise sdonnx.RequestError(f"{opened.root} is an upscaler; of the request's options it has --size alone")
    is_chosen = device is not None
    if device is None:
        device = "cpu" if opened.manifest.target == "generic" else opened.manifest.target
    if base_name(device) in _OF_PROCESS:
        opening = {"memory": memory, "device": device, "compute": compute, "threads": threads}
        _plan_process(opened, options, opening, vae=vae, safety=safety, as_json=as_json)
        if not (is_chosen or as_json or memory == MIN):
            _print_preferred(opened, compute)
    elif memory != "auto" or threads is not None or compute != "auto":
        said = "--memory, --threads and --compute are about the CPU and openvino"
        raise sdonnx.RequestError(f"{said}; leave them out with --device {device}")
    else:
        _plan_gpu(opened, options, vae=vae, safety=safety, device=device, as_json=as_json)


def _plan_process(
    opened: sdonnx.Package, options: Mapping[str, Any], opening: Mapping[str, Any], *, vae: str | None,
    safety: SafetyMode, as_json: bool,
) -> None:  # fmt: skip
    if opened.kind is PackageKind.UPSCALER:
        sides = {**_UPSCALED, **parse_request({"size": options["size"]})}
        width, height, component = sides["width"], sides["height"], "upscaler"
        with sdonnx.Upscaler(opened, **opening) as upscaler:
            memory_plan = upscaler.plan((width, height), always=True)
    else:
        with sdonnx.load(opened.root, vae=vae, safety=safety, **opening) as pipe:
            resolved = pipe.resolve("", **parse_request(options))
            memory_plan, component = pipe.plan(resolved, always=True), "unet"
            width, height = resolved.request.width, resolved.request.height
    speed = macs_per_second(opened.graph(component), **{key: opening[key] for key in ("device", "compute", "threads")})
    assert memory_plan is not None  # noqa: S101 — for the type checker
    rows = [(planned, planned.macs / speed + planned.overhead_seconds) for planned in memory_plan.components]
    if as_json:
        components = [
            {**asdict(planned), "strategy": strategy_text(planned), "seconds": seconds} for planned, seconds in rows
        ]
        peaks = {"peak": memory_plan.peak, "minimum_budget": memory_plan.minimum_budget}
        print_json({**peaks, "components": components})
        return
    table = _make_table("component", "strategy", right=("memory", "time per run"))
    for planned, seconds in rows:
        table.add_row(planned.component, strategy_text(planned), f"{planned.peak / 1e6:,.0f} MB", f"{seconds:.2g} s")
    out.print(table, highlight=False, soft_wrap=True)
    out.print(
        f"\n{width}x{height} on {opening['device']}: peak {memory_plan.peak / 1e6:,.0f} MB (predicted, Python "
        f"included); possible from {memory_plan.minimum_budget / 1e6:,.0f} MB. Times are estimates.",
        highlight=False,
        soft_wrap=True,
    )


def _print_preferred(opened: sdonnx.Package, compute: str) -> None:
    """Name openvino if ``auto`` prefers it to the CPU: it takes more memory."""
    component = "upscaler" if opened.kind is PackageKind.UPSCALER else "unet"
    preferred, _ = first_choice("auto", compute=compute, **describe_graph(opened, component))
    if preferred == "openvino" and opened.target(component) == "generic":
        out.print("openvino, which --device auto prefers here, takes more: see --device openvino", highlight=False)


def _plan_gpu(
    opened: sdonnx.Package, options: Mapping[str, Any], *, vae: str | None, safety: SafetyMode, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    try:
        phases, (width, height) = _phases(opened, options, vae=vae, safety=safety, device=device)
        planned = plan_device(phases, device)
    except UnsupportedGraph:
        raise sdonnx.RequestError(
            f"cannot predict the memory of {opened.name} (not exported by sdonnx); export its checkpoint with "
            "'sdonnx export'"
        ) from None
    if as_json:
        print_json({"device": device, **asdict(planned)})
        return
    table = _make_table("component", right=("on disk", "weights", "activations"))
    for each in planned.components:
        sizes = (each.disk, each.weights, each.activations)
        table.add_row(each.component, *(f"{size / 1e6:,.0f} MB" for size in sizes))
    out.print(table, highlight=False, soft_wrap=True)
    out.print(_describe(planned, f"{width}x{height} on {device}"), highlight=False, soft_wrap=True)


def _phases(
    opened: sdonnx.Package, options: Mapping[str, Any], *, vae: str | None, safety: SafetyMode, device: str
) -> tuple[Sequence[MemoryPhase], tuple[int, int]]:
    """What a request opens at a time, and its width and height."""
    if opened.kind is PackageKind.UPSCALER:
        sides = {**_UPSCALED, **parse_request({"size": options["size"]})}
        width, height = sides["width"], sides["height"]
        return [upscaler_phase(opened, width, height)], (width, height)
    with sdonnx.load(opened.root, vae=vae, device=device, safety=safety) as pipe:
        resolved = pipe.resolve("", **parse_request(options))
        checker = None if pipe.safety is None else pipe.safety.checker
        phases = memory_phases(pipe.package, resolved, checker=checker)
        return phases, (resolved.request.width, resolved.request.height)


def _describe(planned: DevicePlan, what: str) -> str:
    resident, single = (f"{peak / 1e9:,.1f} GB" for peak in (planned.resident_peak, planned.single_peak))
    return (
        f"\n{what}: {resident} of VRAM with all components resident, {single} with one at a time (predicted, not "
        f"measured). Weights are exact, activations are the values that live together; {planned.outside / 1e9:.1f} GB "
        "in each sum is an estimate for the driver's context, libraries and workspaces."
    )


def _make_table(*left: str, right: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in (*left, *right):
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    return table
