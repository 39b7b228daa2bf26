"""``sdonnx plan``."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from sdonnx_runtime.packages.families import PackageKind

import sdonnx
from sdonnx.benchmark.worker import macs_per_second
from sdonnx.cli.console import out, print_json, strategy_text
from sdonnx.cli.options import Memory, SafetyMode, Threads, Vae, parse_request, request_option
from sdonnx.loading import find_model

_UPSCALED = {"width": 512, "height": 512}
"""The image that an upscaler is planned for unless there is a --size."""


def plan(
    package: Annotated[str, typer.Argument(metavar="PACKAGE", help="A package's directory, or a Hub id of one.")],
    memory: Memory = "auto",
    size: Annotated[str | None, request_option("width")] = None,
    guidance: Annotated[float | None, request_option("guidance_scale")] = None,
    cache_interval: Annotated[int | None, request_option("cache_interval")] = None,
    vae: Vae = None,
    safety: SafetyMode = "off",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict the memory and time of a request on the CPU, without running it.

    [dim]sdonnx plan sd15-onnx --size 512x512 --memory 600MB[/dim]
    """
    opened = sdonnx.Package.open(find_model(package))
    options = {"size": size, "guidance": guidance, "cache_interval": cache_interval}
    if opened.kind is PackageKind.UPSCALER:
        if any(each is not None for each in (guidance, cache_interval, vae)) or safety != "off":
            raise sdonnx.RequestError(f"{opened.root} is an upscaler; of the request's options it has --size alone")
        sides = {**_UPSCALED, **parse_request({"size": size})}
        width, height, component = sides["width"], sides["height"], "upscaler"
        with sdonnx.Upscaler(opened, memory=memory, device="cpu", threads=threads) as upscaler:
            memory_plan = upscaler.plan((width, height), always=True)
    else:
        with sdonnx.load(opened.root, vae=vae, memory=memory, device="cpu", threads=threads, safety=safety) as pipe:
            resolved = pipe.resolve("", **parse_request(options))
            memory_plan, component = pipe.plan(resolved, always=True), "unet"
            width, height = resolved.request.width, resolved.request.height
    speed = macs_per_second(opened.graph(component), threads)
    assert memory_plan is not None  # noqa: S101 — for the type checker
    rows = [(planned, planned.macs / speed + planned.overhead_seconds) for planned in memory_plan.components]
    if as_json:
        components = [
            {**asdict(planned), "strategy": strategy_text(planned), "seconds": seconds} for planned, seconds in rows
        ]
        peaks = {"peak": memory_plan.peak, "minimum_budget": memory_plan.minimum_budget}
        print_json({**peaks, "components": components})
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("component", "strategy", "memory", "time per run"):
        right = heading in ("memory", "time per run")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for planned, seconds in rows:
        table.add_row(planned.component, strategy_text(planned), f"{planned.peak / 1e6:,.0f} MB", f"{seconds:.2g} s")
    out.print(table, highlight=False, soft_wrap=True)
    out.print(
        f"\n{width}x{height}: peak {memory_plan.peak / 1e6:,.0f} MB (predicted, Python included); "
        f"possible from {memory_plan.minimum_budget / 1e6:,.0f} MB. Times are estimates.",
        highlight=False,
        soft_wrap=True,
    )
