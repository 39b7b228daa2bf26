"""``sdonnx run``."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from PIL.Image import Image
from rich.progress import MofNCompleteColumn, TextColumn
from sdonnx_models import DEFAULT
from sdonnx_runtime.images import save_preview
from sdonnx_runtime.latents import save_latents as write_latents
from sdonnx_runtime.manifest import Manifest
from sdonnx_runtime.pictures import (
    FITS,
    UPSCALERS,
    check_picture,
    extended,
    fitted,
    in_whole_cells,
    mask_of,
    open_picture,
)
from sdonnx_runtime.request import given
from sdonnx_runtime.schedule import SPACINGS
from sdonnx_runtime.sigmas import SCHEDULES

import sdonnx
from sdonnx.arguments import (
    Device,
    Threads,
    check_outputs,
    output_paths,
    parse_hires,
    parse_margins,
    parse_numbers,
    parse_size,
    parse_variation,
    unused,
)
from sdonnx.models import find_model
from sdonnx.show import described, err, print_json, progress

logger = logging.getLogger(__name__)

_FROM_A_PICTURE, _SAMPLING = "From a picture", "Sampling"


def run(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="PACKAGE",
            help="A package's directory, or a Hub id of one. Default: pictogram, which comes with sdonnx.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT.png",
            help="Where to; several get their seed's number added. Default: sdonnx-SEED.png.",
        ),
    ] = None,
    negative: Annotated[str, typer.Option(metavar="TEXT", help="What to keep away from.")] = "",
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Denoising steps: more is slower and finer. Default: the model's own."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="G",
            help="How closely to follow the prompt; 1 is without, and twice as fast. Default: the model's own.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="S", help="The same seed is the same picture. Default: random.")
    ] = None,
    variation: Annotated[
        str | None,
        typer.Option(metavar="SEED:STRENGTH", help="Like the seed's picture, but a share of another seed's, 0 to 1."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Pixels; Stable Diffusion wants multiples of 8. Default: the model's own."),
    ] = None,
    enlarge: Annotated[
        bool, typer.Option("--enlarge/--no-enlarge", help="Enlarge pictures of a model that makes very small ones.")
    ] = True,
    count: Annotated[int, typer.Option(metavar="N", help="Pictures to make, with seeds S, S+1, …")] = 1,
    sampler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help='From [b]sdonnx samplers[/b], or as elsewhere: "DPM++ 2M Karras". Default: the model\'s own.',
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Start from this picture.", rich_help_panel=_FROM_A_PICTURE),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="How much of the picture is made anew, 0 to 1. Default: 0.75, or 1 with a mask.",
            rich_help_panel=_FROM_A_PICTURE,
        ),
    ] = None,
    fit: Annotated[
        str,
        typer.Option(
            metavar="|".join(FITS),
            help="How a picture of other proportions gets the size.",
            rich_help_panel=_FROM_A_PICTURE,
        ),
    ] = "crop",
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Repaint only where this picture, of the same size, is white.",
            rich_help_panel=_FROM_A_PICTURE,
        ),
    ] = None,
    mask_blur: Annotated[
        int,
        typer.Option(
            metavar="PX", help="Pixels over which what is new fades out at the edge.", rich_help_panel=_FROM_A_PICTURE
        ),
    ] = 4,
    paste: Annotated[
        bool,
        typer.Option(
            "--paste/--no-paste",
            help="Keep the pixels outside the mask bit by bit.",
            rich_help_panel=_FROM_A_PICTURE,
        ),
    ] = True,
    only_masked: Annotated[
        int | None,
        typer.Option(
            metavar="PX",
            help="Work only in the mask and so many pixels around it, and keep the picture's size; 32 is usual.",
            rich_help_panel=_FROM_A_PICTURE,
        ),
    ] = None,
    outpaint: Annotated[
        str | None,
        typer.Option(
            metavar="L,T,R,B",
            help="Paint this many pixels more at the picture's left, top, right and bottom.",
            rich_help_panel=_FROM_A_PICTURE,
        ),
    ] = None,
    hires: Annotated[
        str | None,
        typer.Option(
            metavar="2x[:S[:N]]",
            help="Enlarge the picture so many times and go over it again with strength S (0.55) and N steps.",
        ),
    ] = None,
    hires_upscaler: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(UPSCALERS),
            help="What --hires enlarges: the latents (the default), or the pixels, which asks more of the memory.",
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"How noise levels are laid: {', '.join(SCHEDULES)}. Default: the model's own.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(SPACINGS),
            help="How timesteps are spaced. Default: the model's own.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(
            metavar="E",
            help="How much noise comes in with each step, 0 to 1. Default: the sampler's own.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    sigmas: Annotated[
        str | None,
        typer.Option(
            metavar="S,S,…",
            help="The noise level of each step, falling; instead of --steps.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    timesteps: Annotated[
        str | None,
        typer.Option(
            metavar="T,T,…", help="The timestep of each step, falling; instead of --steps.", rich_help_panel=_SAMPLING
        ),
    ] = None,
    guidance_rescale: Annotated[
        float,
        typer.Option(
            metavar="R",
            help="How much of guidance's contrast is taken back, 0 to 1; 0.7 suits zero-SNR models.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0.0,
    device: Device = "auto",
    threads: Threads = None,
    preview: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Show there, step by step, what is becoming of it.")
    ] = None,
    save_latents: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Keep the latents too, for [b]sdonnx decode[/b].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Make a picture with a package.

    [dim]sdonnx run "a red apple on a blue background" -o apple.png[/dim]
    [dim]sdonnx run "a photograph of a cat" -m sd15-onnx --seed 7[/dim]
    [dim]sdonnx run "a tiger on a white background" --image cat.png --strength 0.6[/dim]
    """
    width, height = parse_size(size)
    picture, stencil = (None if path is None else open_picture(path) for path in (image, mask))
    package = find_model(_bundled() if model is None else model)
    with sdonnx.load(package, device=device, threads=threads) as pipe:
        manifest = pipe.package.manifest
        if outpaint is not None:
            picture, stencil = _outpainted(
                picture, stencil, outpaint, manifest, sized=size is not None or only_masked is not None
            )
        request = pipe.check(
            prompt,
            negative_prompt=negative,
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=seed,
            variation=parse_variation(variation),
            num_images=count,
            sampler=sampler,
            schedule=schedule,
            spacing=spacing,
            eta=eta,
            sigmas=parse_numbers("sigmas", sigmas),
            timesteps=parse_numbers("timesteps", timesteps),
            guidance_rescale=guidance_rescale,
            image=picture,
            strength=strength,
            fit=fit,
            mask_image=stencil,
            mask_blur=mask_blur,
            paste=paste,
            padding_mask_crop=only_masked,
            **parse_hires(hires),
            hires_upscaler=hires_upscaler,
        )
        if outpaint is not None and not paste:
            request = _in_whole_cells(request, manifest)
        paths = output_paths(output, request)
        if preview is not None and manifest.latents.preview is None:
            raise sdonnx.PackageError("the package has no preview; run 'sdonnx export' again, or leave out --preview")
        check_outputs(paths, preview, save_latents)
        result = _generate(pipe, request, preview, save_latents or unused(paths[0].with_suffix(".npz")))
        factor = manifest.defaults.enlarge if enlarge and only_masked is None else 1
    try:
        for index, path in enumerate(paths):
            sdonnx.save_png(result, index, path, enlarge=factor)
    finally:  # neither is lost for the other's failing
        if save_latents is not None:
            write_latents(save_latents, result.latents, result.request, result.model)
    if as_json:
        print_json(described(result, paths))
        return
    for path, made in zip(paths, result.seeds, strict=True):
        err.print(f"{path}  seed {made}", highlight=False, soft_wrap=True)


def _bundled() -> str:
    err.print(
        f"using {DEFAULT}, the small model that comes with sdonnx; for a published one: "
        "sdonnx export sd15, then -m sd15-onnx",
        highlight=False,
        soft_wrap=True,
    )
    return DEFAULT


def _outpainted(
    picture: Image | None, stencil: Image | None, outpaint: str, manifest: Manifest, *, sized: bool
) -> tuple[Image, Image]:
    """The canvas and its mask; one that is to have another size anyway may have any."""
    if picture is None or stencil is not None:
        raise sdonnx.RequestError("--outpaint goes with --image and without --mask; it masks what is new by itself")
    area = 0 if sized else manifest.defaults.size**2
    check_picture("image", picture)
    return extended(picture, parse_margins(outpaint), area=area, multiple=manifest.latents.downscale)


def _in_whole_cells(request: sdonnx.Request, manifest: Manifest) -> sdonnx.Request:
    """Without pasting, cells that are only partly new would stay as they are."""
    size, fit = (given(request.width), given(request.height)), request.fit
    mask = mask_of(fitted(given(request.mask_image), size, fit))
    return replace(
        request,
        image=fitted(given(request.image), size, fit),
        mask_image=in_whole_cells(mask, manifest.latents.downscale),
    )


def _generate(pipe: sdonnx.Pipeline, request: sdonnx.Request, preview: Path | None, rescue: Path) -> sdonnx.Result:
    """The result; should decoding fail, what was sampled is in ``rescue``."""
    stream = pipe.stream(request)
    try:
        _follow(stream, preview, pipe.package.manifest.latents.downscale)
    except (sdonnx.SdonnxError, MemoryError) as error:
        if stream.latents is None:
            raise
        kind = sdonnx.DeviceError if isinstance(error, MemoryError) else type(error)
        said = "there is too little memory to go on" if isinstance(error, MemoryError) else str(error)
        try:
            write_latents(rescue, stream.latents, stream.latents_request, pipe.package.name)
        except sdonnx.SdonnxError as other:
            raise kind(f"{said}; what was sampled is lost too: {other}") from None
        raise kind(f"{said}; what was sampled is kept: sdonnx decode {rescue} -m {pipe.package.root}") from None
    return stream.result


def _follow(stream: sdonnx.Stream, preview: Path | None, downscale: int) -> None:
    with progress("{task.description}", MofNCompleteColumn(), TextColumn("{task.fields[pace]}")) as bar:
        task = bar.add_task("encoding the prompt", total=None, pace="")
        for done, step in enumerate(stream, 1):
            total = step.num_steps * step.num_images
            what = "decoding" if done == total else "denoising"
            pace = f"{step.seconds:.2f} s/step"
            bar.update(task, description=what, total=total, completed=done, pace=pace)
            if preview is not None:
                try:
                    save_preview(preview, step.preview(), downscale)
                except sdonnx.SdonnxError as error:
                    logger.warning("going on without a preview: %s", error)
                    preview = None
