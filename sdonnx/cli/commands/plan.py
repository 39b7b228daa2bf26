"""``sdonnx plan``."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

import sdonnx
from sdonnx.benchmark.worker import macs_per_second
from sdonnx.cli.console import out, print_json, strategy_text
from sdonnx.cli.options import Memory, Size, Threads, Vae
from sdonnx.cli.parsing import parse_size
from sdonnx.loading import find_model


def plan(
    package: Annotated[str, typer.Argument(metavar="PACKAGE", help="A package's directory, or a Hub id of one.")],
    memory: Memory = "auto",
    size: Size = None,
    guidance: Annotated[float | None, typer.Option(metavar="G", help="As for [b]sdonnx run[/b]; 1 is none.")] = None,
    reuse: Annotated[int, typer.Option(metavar="N", help="As for [b]sdonnx run[/b].")] = 1,
    vae: Vae = None,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show how a picture would be made in some memory on the CPU, and what that takes, without making it.

    [dim]sdonnx plan sd15-onnx --size 512x512 --memory 600MB[/dim]
    """
    fields: dict[str, Any] = {**parse_size(size), "guidance_scale": guidance, "reuse": reuse}
    with sdonnx.load(find_model(package), vae=vae, memory=memory, device="cpu", threads=threads) as pipe:
        request = pipe.check("", **fields)
        found = pipe.plan(request, whole=True)
        speed = macs_per_second(pipe.package.graph("unet"), threads)
    assert found is not None  # noqa: S101 — for the type checker
    seconds = [choice.work / speed + choice.extra for choice in found.choices]
    if as_json:
        rows = zip(found.choices, seconds, strict=True)
        listed = [{**asdict(each), "way": strategy_text(each), "seconds": took} for each, took in rows]
        print_json({"peak": found.peak, "least": found.least, "components": listed})
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("component", "how", "memory", "a run"):
        table.add_column(heading, justify="right" if heading in ("memory", "a run") else "left")
    for choice, took in zip(found.choices, seconds, strict=True):
        table.add_row(choice.component, strategy_text(choice), f"{choice.peak / 1e6:,.0f} MB", f"{took:.2g} s")
    out.print(table, highlight=False, soft_wrap=True)
    out.print(
        f"\n{request.width}x{request.height}: {found.peak / 1e6:,.0f} MB at most, Python included; "
        f"{found.least / 1e6:,.0f} MB would do. Times are rough.",
        highlight=False,
        soft_wrap=True,
    )
