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
from sdonnx.cli.options import Cache, Compute, Device, Threads, parse_request, request_option
from sdonnx.loading import find_model


def bench(
    package: Annotated[
        str, typer.Argument(metavar="PACKAGE", help="A package's directory, a Hub id of one, or a bundled model.")
    ] = DEFAULT,
    reference: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE", help="Reference package to compare outputs with (PSNR)."),
    ] = None,
    steps: Annotated[int | None, request_option("num_inference_steps")] = None,
    size: Annotated[str | None, request_option("width")] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Images that each component runs on at once.")] = 1,
    repeat: Annotated[int, typer.Option(metavar="N", help="Timed runs of each component, after the first.")] = 5,
    device: Device = "auto",
    compute: Compute = "auto",
    threads: Threads = None,
    cache: Cache = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure time and memory of a package on this machine, as a Markdown table.

    [dim]sdonnx bench pictogram[/dim] or [dim]sdonnx bench sd15-int8 --reference sd15-onnx --steps 5[/dim]
    """
    opened = sdonnx.Package.open(find_model(package))
    other = None if reference is None else sdonnx.Package.open(find_model(reference))
    with progress("{task.description}") as bar:
        task = bar.add_task("starting", total=1.0)
        report = measure(
            opened,
            reference=other,
            steps=steps,
            **parse_request({"size": size}),
            batch=batch,
            repeat=repeat,
            device=device,
            compute=compute,
            threads=threads,
            cache=cache,
            progress=lambda what, done: bar.update(task, description=what, completed=done),
        )
    if as_json:
        print_json(_as_json(report))
        return
    out.print(markdown(report), markup=False, highlight=False, soft_wrap=True)


def markdown(report: Report) -> str:
    """Format the report as a Markdown table below a description of the machine."""
    machine, image, comparison = report.machine, report.image, report.comparison
    threads = "one thread per physical core" if report.threads is None else f"{report.threads} threads"
    lines = [
        f"sdonnx {machine.sdonnx}, ONNX Runtime {machine.onnxruntime}, Python {machine.python}, {machine.system}",
        f"{machine.cpu}, {machine.cpus} CPUs, {machine.instruction_set}, {threads}",
        f"{report.model}, {report.width}x{report.height}, batch {report.batch}, guidance {report.guidance_scale:g}",
        "",
        "| component | precision | computes in | provider | ops on the CPU | load s | first s | median s | peak MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_row(figures) for figures in report.components),
        f"| image, {image.num_inference_steps} steps | | | | | {image.load_s:.3g} | {image.first_step_s:.3g} | "
        f"{image.step_s:.3g} | {image.peak_rss_mb:.0f} |",
        "",
        "Each row is measured in its own process. First and median of the image are its steps; the first includes "
        f"loading the U-Net. The image took {image.total_s:.3g} s in all.",
    ]
    if comparison is not None:
        median = sorted(comparison.unet_psnr)[len(comparison.unet_psnr) // 2]
        lines += [
            "",
            f"PSNR to {comparison.reference}: image {comparison.psnr:.1f} dB; U-Net {median:.1f} dB in the median "
            f"step, {min(comparison.unet_psnr):.1f} dB in the worst.",
        ]
    return "\n".join(lines)


def _row(figures: ComponentFigures) -> str:
    on_cpu = ", ".join(f"{count} {name}" for name, count in figures.on_cpu.items()) or "none"
    provider = figures.provider.removesuffix("ExecutionProvider")
    return (
        f"| {figures.component} | {figures.precision} | {figures.compute} | {provider} | {on_cpu} | "
        f"{figures.load_s:.3g} | {figures.first_s:.3g} | {figures.median_s:.3g} | {figures.peak_rss_mb:.0f} |"
    )


def _as_json(report: Report) -> dict[str, Any]:
    data, comparison = asdict(report), report.comparison
    if comparison is not None:
        unet = [_json_number(value) for value in comparison.unet_psnr]
        data["comparison"] |= {"psnr": _json_number(comparison.psnr), "unet_psnr": unet}
    return data


def _json_number(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else str(value)
