"""The command line: ``sdonnx export``, ``run``, ``decode``, ``info``, ``models`` and ``samplers``."""

import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer
from PIL.Image import Image
from rich.markup import escape
from rich.progress import MofNCompleteColumn, TextColumn
from rich.table import Table
from sdonnx_models import DEFAULT, bundled, recipes
from sdonnx_runtime.images import check_writable, save_preview
from sdonnx_runtime.latents import load_latents
from sdonnx_runtime.latents import save_latents as write_latents
from sdonnx_runtime.pictures import FITS, extended, open_picture
from sdonnx_runtime.schedule import SPACINGS
from sdonnx_runtime.sigmas import SCHEDULES

import sdonnx
from sdonnx.arguments import output_paths, parse_margins, parse_numbers, parse_size, parse_variation
from sdonnx.models import find_model
from sdonnx.show import (
    described,
    described_recipe,
    err,
    log_handler,
    out,
    print_json,
    progress,
    samplers_table,
    suggested,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Stable Diffusion on ONNX Runtime, without PyTorch: export a checkpoint once, then run it anywhere.",
)

Precision: TypeAlias = Literal["fp32", "fp16"]
Via: TypeAlias = Literal["native", "optimum"]
Device: TypeAlias = Literal["auto", "cpu", "cuda", "directml"]

_FROM_A_PICTURE, _SAMPLING = "From a picture", "Sampling"


@app.command()
def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A diffusers directory, a .safetensors or .ckpt file, a Hub id, or a name from [b]sdonnx models[/b].",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="The package. Default: SRC's name + -onnx."),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="How weights are stored; fp16 takes half the disk.")] = "fp32",
    vae: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="Take the VAE from here instead: as SRC, or a VAE alone."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="R", help="Branch, tag or commit of a Hub id. Default: main.")
    ] = None,
    via: Annotated[
        Via, typer.Option(help="native writes its own graphs; optimum traces the model (needs torch).")
    ] = "native",
    force: Annotated[bool, typer.Option("--force", help="Replace the package if it exists.")] = False,
) -> None:
    """Turn a checkpoint into a package that [b]sdonnx run[/b] can use.

    [dim]sdonnx export sd15[/dim] or [dim]sdonnx export my-checkpoint.safetensors -o my-package --precision fp16[/dim]
    """
    try:
        from sdonnx_export.export import export as export_package
    except ModuleNotFoundError as error:
        raise sdonnx.ExportError(
            f"""exporting needs {error.name}, which is not installed; pip install "sdonnx[export]\""""
        ) from None
    recipe = None if Path(source).exists() else recipes().get(source)
    with progress("{task.description}") as bar:
        task = bar.add_task("starting", total=1.0)
        directory = export_package(
            source if recipe is None else recipe.source,
            Path(f"{recipe.name}-onnx") if output is None and recipe is not None else output,
            precision=precision,
            vae=recipe.vae if vae is None and recipe is not None else vae,
            revision=revision,
            via=via,
            defaults={} if recipe is None else recipe.defaults,
            force=force,
            report=lambda what, done: bar.update(task, description=what, completed=done),
        )
    err.print(f"""{directory} is ready: sdonnx run "a photograph of a cat" -m {directory}""", highlight=False)


@app.command()
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
        str | None, typer.Option(metavar="WxH", help="Pixels, multiples of 8. Default: the model's own.")
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
    outpaint: Annotated[
        str | None,
        typer.Option(
            metavar="L,T,R,B",
            help="Paint this many pixels more at the picture's left, top, right and bottom.",
            rich_help_panel=_FROM_A_PICTURE,
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
    device: Annotated[Device, typer.Option(help="Where to run; auto takes the best there is.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="CPU threads. Default: one for each physical core.")
    ] = None,
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
    picture, stencil = _start(image, mask, outpaint)
    if outpaint is not None and picture is not None and width is None:
        width, height = picture.size
    package = find_model(_bundled() if model is None else model)
    with sdonnx.load(package, device=device, threads=threads) as pipe:
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
        )
        paths = output_paths(output, request)
        if preview is not None and pipe.package.manifest.latents.preview is None:
            raise sdonnx.PackageError("the package has no preview; run 'sdonnx export' again, or leave out --preview")
        for path in [*paths, *(extra for extra in (preview, save_latents) if extra is not None)]:
            check_writable(path)
        result = _generate(pipe, request, preview, paths[0].with_suffix(".npz"))
        factor = pipe.package.manifest.defaults.enlarge if enlarge else 1
    if save_latents is not None:
        write_latents(save_latents, result.latents, result.request, result.model)
    for index, path in enumerate(paths):
        sdonnx.save_png(result, index, path, enlarge=factor)
    if as_json:
        print_json(described(result, paths))
        return
    for path, made in zip(paths, result.seeds, strict=True):
        err.print(f"{path}  seed {made}", highlight=False, soft_wrap=True)


@app.command()
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
    device: Annotated[Device, typer.Option(help="Where to run; auto takes the best there is.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="CPU threads. Default: one for each physical core.")
    ] = None,
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


@app.command()
def info(
    package: Annotated[str, typer.Argument(metavar="PACKAGE", help="A package's directory, or a Hub id of one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything the manifest says as JSON.")] = False,
) -> None:
    """Show what a package is: where it came from, what it holds, what it takes on disk."""
    opened = sdonnx.Package.open(find_model(package))
    manifest = opened.manifest
    if as_json:
        print_json({"path": str(opened.root), "inferred": opened.foreign, **asdict(manifest)})
        return
    facts = Table.grid(padding=(0, 2))
    source = manifest.source
    facts.add_row("package", str(opened.root))
    facts.add_row("family", manifest.family)
    facts.add_row("source", source.name if source.revision is None else f"{source.name} at {source.revision}")
    facts.add_row("exporter", source.exporter)
    facts.add_row("suggests", suggested(manifest.defaults))
    predicts = manifest.scheduler.get("prediction_type", "epsilon")
    facts.add_row("scheduler", f"{manifest.scheduler.get('_class_name')}, predicts {predicts}")
    for name, component in manifest.components.items():
        megabytes = sum(file.size for file in component.files.values()) / 1e6
        facts.add_row(name, f"{component.precision}, {megabytes:,.1f} MB")
    out.print(facts, highlight=False, soft_wrap=True)


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """List the model that comes with sdonnx, and published ones that [b]sdonnx export[/b] knows by name."""
    known = recipes()
    if as_json:
        here = {name: str(path) for name, path in bundled().items()}
        print_json({"bundled": here, "recipes": {name: asdict(recipe) for name, recipe in known.items()}})
        return
    listing = Table.grid(padding=(0, 2))
    for name, path in bundled().items():
        manifest = sdonnx.Package.open(path).manifest
        listing.add_row(f"[b]{name}[/]", f"comes with sdonnx\n{suggested(manifest.defaults)}\n")
    for name, recipe in known.items():
        listing.add_row(f"[b]{name}[/]", escape("\n".join(described_recipe(recipe))) + "\n")
    out.print(listing, highlight=False, soft_wrap=True)


@app.command()
def samplers() -> None:
    """List the samplers, with their names elsewhere."""
    out.print(samplers_table(), highlight=False)


def main() -> None:
    """The entry point: errors become one line on stderr and an exit code, 2 for usage and 1 for the rest."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[log_handler()])
    try:
        app(standalone_mode=True)
    except sdonnx.RequestError as error:
        _fail(error, 2)
    except sdonnx.SdonnxError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        err.print("stopped")
        sys.exit(130)


def _fail(error: Exception, code: int) -> None:
    err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    sys.exit(code)


def _bundled() -> str:
    err.print(
        f"using {DEFAULT}, the small model that comes with sdonnx; for a published one: "
        "sdonnx export sd15, then -m sd15-onnx",
        highlight=False,
        soft_wrap=True,
    )
    return DEFAULT


def _start(image: Path | None, mask: Path | None, outpaint: str | None) -> tuple[Image | None, Image | None]:
    """The picture to start from and its mask."""
    picture, stencil = (None if path is None else open_picture(path) for path in (image, mask))
    if outpaint is None:
        return picture, stencil
    if picture is None or stencil is not None:
        raise sdonnx.RequestError("--outpaint goes with --image and without --mask; it masks what is new by itself")
    canvas, stencil = extended(picture, parse_margins(outpaint))
    return canvas, stencil


def _generate(pipe: sdonnx.Pipeline, request: sdonnx.Request, preview: Path | None, rescue: Path) -> sdonnx.Result:
    """The result; should decoding fail, what was sampled is in ``rescue``."""
    stream = pipe.stream(request)
    try:
        _follow(stream, preview)
    except sdonnx.SdonnxError as error:
        if stream.latents is None:
            raise
        write_latents(rescue, stream.latents, stream.request, pipe.package.name)
        raise type(error)(f"{error}; what was sampled is kept: sdonnx decode {rescue} -m {pipe.package.root}") from None
    return stream.result


def _follow(stream: sdonnx.Stream, preview: Path | None) -> None:
    with progress("{task.description}", MofNCompleteColumn(), TextColumn("{task.fields[pace]}")) as bar:
        task = bar.add_task("encoding the prompt", total=None, pace="")
        for step in stream:
            total = step.num_steps * step.num_images
            done = step.image * step.num_steps + step.step + 1
            what = "decoding" if done == total else "denoising"
            pace = f"{step.seconds:.2f} s/step"
            bar.update(task, description=what, total=total, completed=done, pace=pace)
            if preview is not None:
                save_preview(preview, step.preview(), stream.request)
