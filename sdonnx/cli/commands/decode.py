"""``sdonnx decode``."""

import logging
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from sdonnx_models import DEFAULT
from sdonnx_runtime.execution.devices.computing import coarsest
from sdonnx_runtime.outputs.latents_file import load_compute, load_latents

import sdonnx
from sdonnx.cli.console import print_report, print_safety, result_json
from sdonnx.cli.options import Cache, Compute, Device, Memory, Provenance, SafetyMode, Threads, Vae
from sdonnx.cli.parsing import check_outputs, output_paths

logger = logging.getLogger(__name__)


def decode(
    latents: Annotated[
        Path, typer.Argument(metavar="LATENTS", help="An .npz written by [b]sdonnx run --save-latents[/b].")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="PACKAGE",
            help="The package whose VAE decodes. Default: pictogram, the bundled model.",
        ),
    ] = None,
    vae: Vae = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT.png", help="Output file. Default: sdonnx-SEED.png."),
    ] = None,
    provenance: Provenance = True,
    safety: SafetyMode = "off",
    device: Device = "auto",
    compute: Compute = "auto",
    threads: Threads = None,
    cache: Cache = True,
    memory: Memory = "auto",
) -> None:
    """Decode saved latents to images.

    The original pixels outside the mask are not pasted back, and nothing is upscaled.
    """
    sampled, request, name = load_latents(latents)
    paths = output_paths(output, request)
    overwrite = output is not None
    check_outputs(paths, inputs=[latents], overwrite=overwrite)
    package = DEFAULT if model is None else model
    with sdonnx.load(
        package, vae=vae, device=device, compute=compute, threads=threads, cache=cache, memory=memory, safety=safety
    ) as pipe:
        print_safety(pipe)
        if pipe.package.name != name and model is None:
            raise sdonnx.RequestError(f"the latents were made by the model '{name}'; give its package with -m")
        if pipe.package.name != name:
            logger.warning("the latents were made by '%s', but are decoded by '%s'", name, pipe.package.name)
        checked, separate_vae = pipe.decode_and_check(sampled, tiling=request.tiling), pipe.package.vae
    result = sdonnx.Result(
        images=checked.images,
        safety=checked.safety,
        seeds=request.seeds,
        latents=checked.latents,
        request=request,
        model=name,
        timings=sdonnx.Timings(),
        compute=coarsest((load_compute(latents), checked.compute)),
        vae=None if separate_vae is None else separate_vae.name,
    )
    save = partial(sdonnx.save_png, overwrite=overwrite, provenance=provenance)
    saved = [None if index in result.refused else save(result, index, path) for index, path in enumerate(paths)]
    print_report(result_json(result, saved, None), as_json=False)
