"""``sdonnx sensitivity``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer
from sdonnx_runtime.libraries import required
from sdonnx_runtime.outputs.atomic import check_writable

import sdonnx
from sdonnx.cli.commands.export import Prediction, companion
from sdonnx.cli.console import out, print_json, print_note, progress
from sdonnx.cli.parsing import check_not_inputs
from sdonnx.loading import find_source

if TYPE_CHECKING:
    from sdonnx_export.quantization.sensitivity import Sensitivity

_MAX_BUDGET = 1e6
"""MB, more than a checkpoint has."""

Target: TypeAlias = Literal["int8", "int8-weights", "int4"]


def sensitivity(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="As for [b]sdonnx export[/b]; or an fp32 or fp16 package."),
    ],
    precision: Annotated[Target, typer.Option(help="Precision to test.")] = "int8",
    write: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a mixed-precision file that keeps the most sensitive layers in fp16, for "
            "[b]sdonnx export --precision mixed:FILE[/b].",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(metavar="MB", help="Size budget for those layers. Default: 5 % of what quantizing saves."),
    ] = None,
    vae: Annotated[str | None, typer.Option(metavar="SRC", help="As for [b]sdonnx export[/b].")] = None,
    base: Annotated[str | None, typer.Option(metavar="SRC", help="As for [b]sdonnx export[/b].")] = None,
    prediction_type: Annotated[Prediction | None, typer.Option(help="As for [b]sdonnx export[/b].")] = None,
    revision: Annotated[str | None, typer.Option(metavar="R", help="As for [b]sdonnx export[/b].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure the error that quantizing each layer of the U-Net adds, per byte saved.

    [dim]sdonnx sensitivity sd15 --write sd15.toml[/dim] then [dim]sdonnx export sd15 --precision mixed:sd15.toml[/dim]
    """
    if budget is not None and (write is None or not 0 <= budget <= _MAX_BUDGET):
        raise sdonnx.RequestError(f"budget is {budget:g}; give 0 to {_MAX_BUDGET:.0f} MB, together with --write FILE")
    checkpoint, recipe = find_source(source)
    if write is not None:
        check_not_inputs([write], [Path(each) for each in (checkpoint, vae) if each is not None])
        check_writable(write)
    with required('pip install "sdonnx[export]"', error=sdonnx.ExportError, purpose="this command"):
        from sdonnx_export.quantization.sensitivity import sensitivity as measure
        from sdonnx_export.quantization.sensitivity import write_mixed_precision
    with progress("{task.description}") as bar:
        task = bar.add_task("starting", total=1.0)
        report = measure(
            checkpoint,
            precision=precision,
            vae=companion(vae) or (None if recipe is None else recipe.vae),
            base=companion(base),
            prediction_type=prediction_type,
            revision=revision,
            defaults={} if recipe is None else recipe.defaults,
            report=lambda what, done: bar.update(task, description=what, completed=done),
        )
    if write is not None:
        saved = sum(group.saved for group in report.groups)
        mix = write_mixed_precision(write, report, saved // 20 if budget is None else int(budget * 1e6))
        count = len(mix.patterns["unet"])
        print_note(
            f"{write} keeps {count} of {len(report.groups)} groups of layers in fp16: "
            f"sdonnx export {source} --precision mixed:{write}"
        )
    if as_json:
        print_json(asdict(report))
        return
    out.print(_table(report), highlight=False, soft_wrap=True)


def _table(report: "Sensitivity") -> str:
    """Format a line for each group of layers."""
    saved = sum(group.saved for group in report.groups)
    rows = [(group.name, group.error, group.saved, group.cost) for group in report.groups]
    width = max(len(name) for name, *_ in rows)
    lines = [f"{f'{report.precision} only in':{width}}    error  MB saved  error per byte"]
    for name, error, count, cost in [*rows, ("all layers", report.error, saved, 1.0)]:
        lines.append(f"{name:{width}}  {error:7.2%}  {count / 1e6:8.2f}  {cost:14.2f}")
    return "\n".join(lines)
