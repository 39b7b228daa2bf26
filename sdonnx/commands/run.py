"""``sdonnx run``."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from sdonnx_models import DEFAULT
from sdonnx_runtime.canny import canny
from sdonnx_runtime.pictures import FITS, UPSCALERS, opaque, open_picture
from sdonnx_runtime.schedule import SPACINGS
from sdonnx_runtime.sigmas import SCHEDULES

import sdonnx
from sdonnx.arguments import (
    Device,
    Threads,
    Vae,
    parse_control,
    parse_hires,
    parse_interval,
    parse_margins,
    parse_numbers,
    parse_refiner,
    parse_size,
    parse_variation,
)
from sdonnx.batch import make_batch, read_batch
from sdonnx.making import Outputs, make
from sdonnx.models import find_model
from sdonnx.show import described, err, print_json, print_made

_FROM_A_PICTURE, _SAMPLING, _FASTER = "From a picture", "Sampling", "Faster, at some loss"


def run(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to draw.", show_default=False)] = None,
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
            help="How closely to follow the prompt; 1 or 0 is without, and twice as fast. Default: the model's own.",
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
    vae: Vae = None,
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
    image_guidance: Annotated[
        float | None,
        typer.Option(
            metavar="G",
            help="Of a model that edits pictures: how closely to keep to the picture. Default: 1.5.",
            rich_help_panel=_FROM_A_PICTURE,
        ),
    ] = None,
    depth: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Of a model that is given one: a depth map, brighter where it is nearer.",
            rich_help_panel=_FROM_A_PICTURE,
        ),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PACKAGE:FILE[:S[:START[:END]]]",
            help="Let this ControlNet or T2I-Adapter steer by this picture, with scale S (1), between these shares of "
            "the steps (0 and 1). Several add up.",
            rich_help_panel=_FROM_A_PICTURE,
        ),
    ] = None,
    control_prep: Annotated[
        Literal["canny"] | None,
        typer.Option(help="Show --control this of its pictures: their edges.", rich_help_panel=_FROM_A_PICTURE),
    ] = None,
    control_guess: Annotated[
        bool,
        typer.Option(
            "--control-guess",
            help="ControlNet's guess mode: it doesn't read the negative prompt, and the prompt may be empty.",
            rich_help_panel=_FROM_A_PICTURE,
        ),
    ] = False,
    batch_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Make one picture for each line instead: of a .txt a prompt, of a .jsonl an object with a request's "
            "fields, over what is asked for here.",
        ),
    ] = None,
    refiner: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE[:0.8]",
            help="Let this package, such as SDXL's refiner, go on from that share of the noise levels.",
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
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help=f"A preset: one of {sdonnx.FAST['reuse']} steps whole, tokens downsampled.",
            rich_help_panel=_FASTER,
        ),
    ] = False,
    reuse: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Run the whole U-Net in one of N steps only, and its outermost part in the others.",
            rich_help_panel=_FASTER,
        ),
    ] = None,
    token_downsampling: Annotated[
        bool | None,
        typer.Option(
            "--token-downsampling/--no-token-downsampling",
            help="Attend to every other row and column at the highest resolution.",
            rich_help_panel=_FASTER,
        ),
    ] = None,
    guidance_interval: Annotated[
        str | None,
        typer.Option(
            metavar="LOW,HIGH",
            help="Guide only between these noise levels; elsewhere a step is half the work.",
            rich_help_panel=_FASTER,
        ),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    preview: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Show there, step by step, what is becoming of it.")
    ] = None,
    preview_vae: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE", help="Decode the preview with this package's VAE, a tiny one, say."),
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
    lossy = {
        "reuse": reuse,
        "token_downsampling": token_downsampling,
        "guidance_interval": parse_interval(guidance_interval),
    }
    other, refined = parse_refiner(refiner)
    nets = [parse_control(each) for each in control or ()]
    if control_prep is not None and not nets:
        raise sdonnx.RequestError("--control-prep is given without --control; give the net that reads the edges")
    prepare = canny if control_prep is not None else opaque
    fields: dict[str, Any] = {
        "negative_prompt": negative,
        **parse_size(size),
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "seed": seed,
        "variation": parse_variation(variation),
        "num_images": count,
        "sampler": sampler,
        "schedule": schedule,
        "spacing": spacing,
        "eta": eta,
        "sigmas": parse_numbers("sigmas", sigmas),
        "timesteps": parse_numbers("timesteps", timesteps),
        "guidance_rescale": guidance_rescale,
        "image": None if image is None else open_picture(image),
        "strength": strength,
        "fit": fit,
        "mask_image": None if mask is None else open_picture(mask),
        "mask_blur": mask_blur,
        "paste": paste,
        "padding_mask_crop": only_masked,
        "image_guidance_scale": image_guidance,
        "depth_image": None if depth is None else open_picture(depth),
        "controls": tuple(sdonnx.Control(image=prepare(open_picture(path)), **how) for _, path, how in nets),
        "control_guess": control_guess,
        **refined,
        **parse_hires(hires),
        "hires_upscaler": hires_upscaler,
        **(sdonnx.FAST if fast else {}),
        **{name: value for name, value in lossy.items() if value is not None},
    }
    margins = None if outpaint is None else parse_margins(outpaint)
    lines = None if batch_file is None else read_batch(batch_file)
    if (prompt is None) == (lines is None):
        raise sdonnx.RequestError("give a PROMPT, or a file of them with --batch-file")
    if preview_vae is not None and preview is None:
        raise sdonnx.RequestError("--preview-vae is given without --preview; give the file that the preview goes to")
    with sdonnx.load(
        find_model(_bundled() if model is None else model),
        vae=vae,
        preview_vae=preview_vae,
        device=device,
        threads=threads,
        keep_loaded=lines is not None,
        refiner=other,
        controls=[package for package, _, _ in nets],
    ) as pipe:
        if preview is not None and preview_vae is None and pipe.package.manifest.latents.preview is None:
            raise sdonnx.PackageError("the package has no preview; run 'sdonnx export' again, or leave out --preview")
        outputs = Outputs(pictures=output, preview=preview, latents=save_latents, enlarge=enlarge)
        if batch_file is not None and lines is not None:
            make_batch(pipe, batch_file, lines, fields, outputs, margins, as_json=as_json)
            return
        result, paths = make(pipe, {**fields, "prompt": prompt}, outputs, margins)
    if as_json:
        print_json(described(result, paths))
    else:
        print_made(result, paths)


def _bundled() -> str:
    err.print(
        f"using {DEFAULT}, the small model that comes with sdonnx; for a published one: "
        "sdonnx export sd15, then -m sd15-onnx",
        highlight=False,
        soft_wrap=True,
    )
    return DEFAULT
