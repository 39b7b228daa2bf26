"""``sdonnx decode``."""

import logging
from pathlib import Path
from typing import Annotated

import typer
from sdonnx_models import DEFAULT
from sdonnx_runtime.outputs.atomic import check_writable
from sdonnx_runtime.outputs.latents_file import load_latents
from sdonnx_runtime.request import seeds_of

import sdonnx
from sdonnx.cli.console import err
from sdonnx.cli.options import Device, Memory, Threads, Vae
from sdonnx.cli.parsing import output_paths

logger = logging.getLogger(__name__)


def decode(
    latents: Annotated[
        Path, typer.Argument(metavar="LATENTS", help="What [b]sdonnx run --save-latents[/b] wrote, an .npz.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="PACKAGE",
            help="The package whose VAE decodes; needed for latents of another model than pictogram.",
        ),
    ] = None,
    vae: Vae = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT.png", help="Where to. Default: sdonnx-SEED.png."),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    memory: Memory = "auto",
) -> None:
    """Make pictures of latents that were sampled before, as they are: without a mask's pasting, not enlarged."""
    sampled, request, name = load_latents(latents)
    paths = output_paths(output, request)
    for path in paths:
        check_writable(path)
    package = DEFAULT if model is None else model
    with sdonnx.load(package, vae=vae, device=device, threads=threads, memory=memory) as pipe:
        if pipe.package.name != name and model is None:
            raise sdonnx.RequestError(f"the latents are of the model '{name}'; give its package with -m")
        if pipe.package.name != name:
            logger.warning("the latents are of '%s', and '%s' decodes them", name, pipe.package.name)
        images, other = pipe.decode(sampled), pipe.package.vae
    result = sdonnx.Result(
        images=images,
        seeds=seeds_of(request),
        latents=sampled,
        request=request,
        model=name,
        timings=sdonnx.Timings(),
        vae=None if other is None else other.name,
    )
    for index, path in enumerate(paths):
        sdonnx.save_png(result, index, path)
        err.print(str(path), highlight=False, soft_wrap=True)
