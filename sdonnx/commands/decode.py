"""``sdonnx decode``."""

from pathlib import Path
from typing import Annotated

import typer
from sdonnx_models import DEFAULT
from sdonnx_runtime.images import check_writable
from sdonnx_runtime.latents import load_latents

import sdonnx
from sdonnx.arguments import Device, Threads, output_paths
from sdonnx.show import err


def decode(
    latents: Annotated[
        Path, typer.Argument(metavar="LATENTS", help="What [b]sdonnx run --save-latents[/b] wrote, an .npz.")
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="PACKAGE", help="The package whose VAE decodes.")
    ] = DEFAULT,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT.png", help="Where to. Default: sdonnx-SEED.png."),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Make pictures of latents that were sampled before, as they are: without a mask's pasting, not enlarged."""
    sampled, request, name = load_latents(latents)
    paths = output_paths(output, request)
    for path in paths:
        check_writable(path)
    with sdonnx.load(model, device=device, threads=threads) as pipe:
        images = pipe.decode(sampled)
    first = request.seed or 0
    result = sdonnx.Result(
        images=images,
        seeds=tuple(range(first, first + len(images))),
        latents=sampled,
        request=request,
        model=name,
        timings=sdonnx.Timings(),
    )
    for index, path in enumerate(paths):
        sdonnx.save_png(result, index, path)
        err.print(str(path), highlight=False, soft_wrap=True)
