"""``sdonnx plan``."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

import sdonnx
from sdonnx.benchmark.worker import macs_per_second
from sdonnx.cli.console import out, print_json, strategy_text
from sdonnx.cli.options import Memory, Threads, Vae, parse_request, request_option
from sdonnx.loading import find_model


def plan(
    package: Annotated[str, typer.Argument(metavar="PACKAGE", help="A package's directory, or a Hub id of one.")],
    memory: Memory = "auto",
    size: Annotated[str | None, request_option("width")] = None,
    guidance: Annotated[float | None, request_option("guidance_scale")] = None,
    cache_interval: Annotated[int | None, request_option("cache_interval")] = None,
    vae: Vae = None,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict the memory and time of a request on the CPU, without running it.

    [dim]sdonnx plan sd15-onnx --size 512x512 --memory 600MB[/dim]
    """
    fields = parse_request({"size": size, "guidance": guidance, "cache_interval": cache_interval})
    with sdonnx.load(find_model(package), vae=vae, memory=memory, device="cpu", threads=threads) as pipe:
        resolved = pipe.resolve("", **fields)
        request, memory_plan = resolved.request, pipe.plan(resolved, always=True)
        speed = macs_per_second(pipe.package.graph("unet"), threads)
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
        f"\n{request.width}x{request.height}: peak {memory_plan.peak / 1e6:,.0f} MB (predicted, Python included); "
        f"possible from {memory_plan.minimum_budget / 1e6:,.0f} MB. Times are estimates.",
        highlight=False,
        soft_wrap=True,
    )
