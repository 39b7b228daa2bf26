"""``sdonnx export``."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer
from sdonnx_runtime.packages.manifest import CONTROLS, FAMILIES, VAE_ALONE

import sdonnx
from sdonnx.cli.console import err, progress
from sdonnx.cli.parsing import parse_lora
from sdonnx.loading import find_source

_USE = {
    **dict.fromkeys(FAMILIES, "-m {}"),
    VAE_ALONE: "-m PACKAGE --vae {}",
    **dict.fromkeys(CONTROLS, "-m PACKAGE --control {}:PICTURE.png"),
}
"""How what was exported is given, by its family."""

Via: TypeAlias = Literal["native", "optimum"]


def export(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SRC",
            help="A diffusers directory, a .safetensors or .ckpt file, a Hub id, or a name from [b]sdonnx models[/b]. "
            "Left out, with --vae: a package of that VAE alone.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="The package. Default: SRC's name + -onnx."),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            metavar="fp32|fp16|int8|int8-weights|int4|mixed:FILE",
            help="int8 is fastest on a CPU; fp16, int8-weights and int4 are smaller, no faster; "
            "a TOML file chooses for each layer.",
        ),
    ] = "fp32",
    calibration: Annotated[
        str,
        typer.Option(
            metavar="full|fast|none|FILE",
            help="What int8 is fitted to: pictures of several prompts, of one, of none, or of a file's, one to a line.",
        ),
    ] = "full",
    vae: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="Take the VAE from here instead: as SRC, or a VAE alone."),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:SCALE]", help="Make these adapters part of it for good. May be given several times."
        ),
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
    source, recipe = (None, None) if source is None else find_source(source)
    with progress("{task.description}") as bar:
        task = bar.add_task("starting", total=1.0)
        directory = export_package(
            source,
            Path(f"{recipe.name}-onnx") if output is None and recipe is not None else output,
            precision=precision,
            vae=recipe.vae if vae is None and recipe is not None else vae,
            revision=revision,
            via=via,
            calibration=calibration,
            defaults={} if recipe is None else recipe.defaults,
            loras=[parse_lora(each) for each in lora or []],
            force=force,
            report=lambda what, done: bar.update(task, description=what, completed=done),
        )
    chosen = _USE[sdonnx.Package.open(directory).manifest.family].format(directory)
    err.print(f"""{directory} is ready: sdonnx run "a photograph of a cat" {chosen}""", highlight=False, soft_wrap=True)
