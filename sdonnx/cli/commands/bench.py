"""``sdonnx bench``."""

import math
from dataclasses import asdict
from typing import Annotated, Any

import typer
from sdonnx_models import DEFAULT

import sdonnx
from sdonnx.benchmark.report import Report
from sdonnx.benchmark.report import bench as measure
from sdonnx.benchmark.worker import ComponentFigures
from sdonnx.cli.console import out, print_json, progress
from sdonnx.cli.options import Device, Threads
from sdonnx.cli.parsing import parse_size
from sdonnx.loading import find_model


def bench(
    package: Annotated[
        str, typer.Argument(metavar="PACKAGE", help="A package's directory, a Hub id of one, or a bundled model.")
    ] = DEFAULT,
    reference: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE", help="Say how near the outputs come to those of this package."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Denoising steps of the picture. Default: the model's own.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Pixels, multiples of 8. Default: the model's own.")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Pictures that each component works on at once.")] = 1,
    repeat: Annotated[int, typer.Option(metavar="N", help="Runs of each component after the first.")] = 5,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure what a package costs on this machine, as a table that can be pasted into an issue.

    [dim]sdonnx bench pictogram[/dim] or [dim]sdonnx bench sd15-int8 --reference sd15-onnx --steps 5[/dim]
    """
    opened = sdonnx.Package.open(find_model(package))
    compared = None if reference is None else sdonnx.Package.open(find_model(reference))
    with progress("{task.description}") as bar:
        task = bar.add_task("starting", total=1.0)
        report = measure(
            opened,
            reference=compared,
            steps=steps,
            **parse_size(size),
            batch=batch,
            repeat=repeat,
            device=device,
            threads=threads,
            progress=lambda what, done: bar.update(task, description=what, completed=done),
        )
    if as_json:
        print_json(_as_json(report))
        return
    out.print(markdown(report), markup=False, highlight=False, soft_wrap=True)


def markdown(report: Report) -> str:
    """The report as a table with a line about the machine above it."""
    machine, picture, found = report.machine, report.picture, report.comparison
    threads = "one thread for each physical core" if report.threads is None else f"{report.threads} threads"
    lines = [
        f"sdonnx {machine.sdonnx}, ONNX Runtime {machine.onnxruntime}, Python {machine.python}, {machine.system}",
        f"{machine.cpu}, {machine.cpus} CPUs, {machine.instruction_set}, {threads}",
        f"{report.model}, {report.width}x{report.height}, batch {report.batch}, guidance {report.guidance_scale:g}",
        "",
        "| component | precision | provider | on the CPU instead | load s | first s | median s | peak MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_row(figures) for figures in report.components),
        f"| picture, {picture.num_inference_steps} steps | | | | {picture.load_s:.3g} | {picture.first_step_s:.3g} | "
        f"{picture.step_s:.3g} | {picture.peak_rss_mb:.0f} |",
        "",
        "Each row is a process of its own. The picture's first and median are its steps, the first with opening the "
        f"U-Net; it took {picture.total_s:.3g} s in all.",
    ]
    if found is not None:
        middle = sorted(found.unet_psnr)[len(found.unet_psnr) // 2]
        lines += [
            "",
            f"Against {found.reference}: picture {found.psnr:.1f} dB PSNR; U-Net {middle:.1f} dB in the median step, "
            f"{min(found.unet_psnr):.1f} in the worst.",
        ]
    return "\n".join(lines)


def _row(figures: ComponentFigures) -> str:
    on_cpu = ", ".join(f"{count} {name}" for name, count in figures.on_cpu.items()) or "none"
    provider = figures.provider.removesuffix("ExecutionProvider")
    return (
        f"| {figures.component} | {figures.precision} | {provider} | {on_cpu} | "
        f"{figures.load_s:.3g} | {figures.first_s:.3g} | {figures.median_s:.3g} | {figures.peak_rss_mb:.0f} |"
    )


def _as_json(report: Report) -> dict[str, Any]:
    data = asdict(report)
    found = report.comparison
    if found is not None:
        data["comparison"] |= {"psnr": _number(found.psnr), "unet_psnr": [_number(each) for each in found.unet_psnr]}
    return data


def _number(value: float) -> float | str:
    """JSON has no number for what is infinite."""
    return value if math.isfinite(value) else str(value)
