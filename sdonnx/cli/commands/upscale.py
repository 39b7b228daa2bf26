"""``sdonnx upscale``."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import MofNCompleteColumn, TextColumn
from sdonnx_runtime.images.preprocess import open_image
from sdonnx_runtime.outputs.metadata import save_upscaled

import sdonnx
from sdonnx.cli.console import print_json, print_note, print_plan, progress
from sdonnx.cli.options import Cache, Compute, Device, Memory, Threads
from sdonnx.cli.parsing import check_outputs


def upscale(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Images to enlarge.", show_default=False)],
    model: Annotated[
        str,
        typer.Option("--model", "-m", metavar="PACKAGE", help="An upscaler's package: its directory, or its Hub id."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT.png",
            help="Output file; with several images their names are appended. Default: IMAGE-4x.png, by the scale.",
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            help="Factor of width and height. Default: the model's own; others are resized to after as many passes "
            "as it takes.",
        ),
    ] = None,
    device: Device = "auto",
    compute: Compute = "auto",
    threads: Threads = None,
    cache: Cache = True,
    memory: Memory = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Enlarge images with an upscaler.

    [dim]sdonnx upscale photo.jpg -m realesrgan-x4plus-onnx[/dim]
    [dim]sdonnx upscale *.png -m realesrgan-x4plus-onnx --scale 2 --memory 1GB[/dim]
    """
    missing = next((path for path in images if not path.exists()), None)
    if missing is not None:
        raise sdonnx.RequestError(f"{missing} does not exist; give the file of an image")
    with sdonnx.load_upscaler(
        model, device=device, compute=compute, threads=threads, cache=cache, memory=memory
    ) as upscaler:
        factor = upscaler.scale if scale is None else scale
        paths = _output_paths(output, images, factor)
        check_outputs(paths, inputs=images, overwrite=output is not None)
        done = [
            _upscale(upscaler, image, path, scale, overwrite=output is not None)
            for image, path in zip(images, paths, strict=True)
        ]
    if as_json:
        print_json({"images": done, "model": upscaler.package.name, "scale": factor})


def _output_paths(output: Path | None, images: Sequence[Path], factor: float) -> list[Path]:
    if output is None:
        return [Path(f"{image.stem}-{factor:g}x.png") for image in images]
    if output.suffix.lower() != ".png":
        raise sdonnx.RequestError(f"the image is named {output.name}; give a name that ends in .png")
    if len(images) == 1:
        return [output]
    paths = [output.with_name(f"{output.stem}-{image.stem}.png") for image in images]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise sdonnx.RequestError(f"two of the images would be saved as {twice}; leave out -o, or give them apart")
    return paths


def _upscale(
    upscaler: sdonnx.Upscaler, source: Path, path: Path, scale: float | None, *, overwrite: bool
) -> dict[str, Any]:
    """Upscale and save an image; return what is to be said of it, as JSON data."""
    start, image = time.perf_counter(), open_image(source)
    plan = upscaler.plan(image.size, scale=scale)
    if plan is not None:
        print_plan(plan)
    with progress("{task.description}", MofNCompleteColumn(), TextColumn("tiles")) as bar:
        task = bar.add_task(source.name, total=None)
        upscaled = upscaler.upscale(
            image, scale=scale, on_tile=lambda done, total: bar.update(task, completed=done, total=total)
        )
    factor = upscaler.scale if scale is None else scale
    made: dict[str, Any] = {"scale": factor, "model": upscaler.package.name, "compute": upscaler.compute}
    saved = save_upscaled(upscaled, path, image, **made, overwrite=overwrite)
    seconds = time.perf_counter() - start
    print_note(f"{saved}  {upscaled.width}x{upscaled.height} in {seconds:.3g} s")
    sizes = {"width": upscaled.width, "height": upscaled.height}
    return {"path": str(saved), "source": str(source), **sizes, "seconds": seconds}
