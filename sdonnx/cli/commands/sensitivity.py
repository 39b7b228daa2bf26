"""``sdonnx sensitivity``."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer
from sdonnx_runtime.outputs.atomic import check_writable

import sdonnx
from sdonnx.cli.console import err, out, print_json, progress
from sdonnx.loading import find_source

if TYPE_CHECKING:
    from sdonnx_export.quantization.sensitivity import Sensitivity

Narrow: TypeAlias = Literal["int8", "int8-weights", "int4"]


def sensitivity(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="As for [b]sdonnx export[/b]; also a package of fp32 or fp16."),
    ],
    precision: Annotated[Narrow, typer.Option(help="What the layers are narrowed to.")] = "int8",
    write: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep the costliest in fp16: for [b]export --precision mixed:FILE[/b]."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(metavar="MB", help="How much that may add. Default: a twentieth of what is saved."),
    ] = None,
    vae: Annotated[str | None, typer.Option(metavar="SRC", help="As for [b]sdonnx export[/b].")] = None,
    revision: Annotated[str | None, typer.Option(metavar="R", help="As for [b]sdonnx export[/b].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Show which layers of the U-Net cost the most quality for each byte that narrowing them saves.

    [dim]sdonnx sensitivity sd15 --write sd15.toml[/dim] then [dim]sdonnx export sd15 --precision mixed:sd15.toml[/dim]
    """
    if budget is not None and (write is None or not 0 <= budget < math.inf):
        raise sdonnx.RequestError(f"budget is {budget:g}; give 0 or more, in MB, and with it --write FILE")
    if write is not None:
        check_writable(write)
    try:
        from sdonnx_export.quantization.sensitivity import sensitivity as measure
        from sdonnx_export.quantization.sensitivity import write_mixed_precision
    except ModuleNotFoundError as error:
        raise sdonnx.ExportError(
            f"""this needs {error.name}, which is not installed; pip install "sdonnx[export]\""""
        ) from None
    found_at, recipe = find_source(source)
    with progress("{task.description}") as bar:
        task = bar.add_task("starting", total=1.0)
        found = measure(
            found_at,
            precision=precision,
            vae=recipe.vae if vae is None and recipe is not None else vae,
            revision=revision,
            defaults={} if recipe is None else recipe.defaults,
            report=lambda what, done: bar.update(task, description=what, completed=done),
        )
    if write is not None:
        saved = sum(group.saved for group in found.groups)
        mix = write_mixed_precision(write, found, saved // 20 if budget is None else int(budget * 1e6))
        kept = len(mix.patterns["unet"])
        what = f"{write} keeps {kept} of {len(found.groups)}: sdonnx export {source} --precision mixed:{write}"
        err.print(what, highlight=False, soft_wrap=True)
    if as_json:
        print_json(asdict(found))
        return
    out.print(_listed(found), highlight=False, soft_wrap=True)


def _listed(found: "Sensitivity") -> str:
    """A line for each group."""
    saved = sum(group.saved for group in found.groups)
    rows = [(group.name, group.error, group.saved, group.cost) for group in found.groups]
    width = max(len(name) for name, *_ in rows)
    lines = [f"{f'{found.precision} alone in':{width}}    error  MB saved  error per byte"]
    for name, error, count, cost in [*rows, ("all of them", found.error, saved, 1.0)]:
        lines.append(f"{name:{width}}  {error:7.2%}  {count / 1e6:8.2f}  {cost:14.2f}")
    return "\n".join(lines)
