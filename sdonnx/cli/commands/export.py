"""``sdonnx export``."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer
from sdonnx_runtime.libraries import required
from sdonnx_runtime.packages.families import PackageKind

import sdonnx
from sdonnx.cli.console import print_note, progress
from sdonnx.cli.parsing import parse_lora
from sdonnx.loading import find_source

_RUN = 'sdonnx run "a photograph of a cat"'
_USE = {
    PackageKind.MODEL: f"{_RUN} -m {{}}",
    PackageKind.VAE: f"{_RUN} -m PACKAGE --vae {{}}",
    PackageKind.CONTROLNET: f"{_RUN} -m PACKAGE --control {{}}:IMAGE.png",
    PackageKind.T2I_ADAPTER: f"{_RUN} -m PACKAGE --control {{}}:IMAGE.png",
    PackageKind.UPSCALER: "sdonnx upscale IMAGE.png -m {}",
    PackageKind.IP_ADAPTER: f"{_RUN} -m PACKAGE --ip-adapter {{}}:IMAGE.png",
}
"""The command that uses an exported package, by kind."""

Target: TypeAlias = Literal["generic", "cuda", "directml", "webgpu", "openvino"]
Via: TypeAlias = Literal["native", "optimum"]
Prediction: TypeAlias = Literal["epsilon", "v_prediction", "sample"]


def export(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SRC",
            help="A diffusers directory, a .safetensors, .ckpt, .pth, .bin or .gguf file, a Hub id, or a name from "
            "[b]sdonnx models[/b]. If left out, with --vae: exports that VAE alone.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Output directory. Default: SRC's name + -onnx."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="fp32|fp16|int8|int8-weights|int4|mixed:FILE",
            help="int8 is fastest on a CPU; fp16, int8-weights and int4 are smaller, not faster; "
            "mixed reads the precision of each layer from a TOML file. A GPU's --target takes fp16 and fp32. "
            "Default: fp32 for generic, int8 for openvino, fp16 for a GPU.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        Target,
        typer.Option(
            help="What the package is made for: generic runs on every device; the others run on that one alone. Those "
            "for a GPU compute in float16; openvino is for int8, which OpenVINO computes by other operators."
        ),
    ] = "generic",
    calibration: Annotated[
        str,
        typer.Option(
            metavar="full|fast|none|FILE",
            help="Calibration prompts for int8: several, one, none, or a file (one per line).",
        ),
    ] = "full",
    vae: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="Take the VAE from here: like SRC, or a VAE-only checkpoint."),
    ] = None,
    text_encoder: Annotated[
        list[str] | None,
        typer.Option(metavar="SRC", help="Take a text encoder from here: like SRC, or one alone. Repeatable."),
    ] = None,
    unet: Annotated[
        str | None,
        typer.Option(
            metavar="SRC", help="Take the U-Net from here: like SRC, or a U-Net-only file. Then SRC may be left out."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="A checkpoint that lends what SRC lacks: VAE, text encoders, the base of a ControlNet difference.",
        ),
    ] = None,
    image_encoder: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="The CLIP image encoder of an IP-Adapter: its directory or Hub id. Default: the one beside SRC.",
        ),
    ] = None,
    prediction_type: Annotated[
        Prediction | None,
        typer.Option(help="What the U-Net predicts. Default: what SRC says, else what is usual in its family."),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:SCALE]", help="Fuse these LoRAs into the weights. Repeatable."),
    ] = None,
    safety_checker: Annotated[
        bool,
        typer.Option("--safety-checker", help="Also export SRC's own safety checker (1.2 GB in fp32), for --safety."),
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="R", help="Branch, tag or commit of a Hub id. Default: main.")
    ] = None,
    via: Annotated[
        Via, typer.Option(help="native writes sdonnx' own graphs; optimum traces the model (requires torch).")
    ] = "native",
    force: Annotated[bool, typer.Option("--force", help="Replace the package if it exists.")] = False,
) -> None:
    """Export a checkpoint to a package for [b]sdonnx run[/b].

    [dim]sdonnx export sd15[/dim] or [dim]sdonnx export my-checkpoint.safetensors -o my-package --precision fp16[/dim]
    """
    with required('pip install "sdonnx[export]"', error=sdonnx.ExportError, purpose="exporting"):
        from sdonnx_export.export import export as export_package
    source, recipe = (None, None) if source is None else find_source(source)
    with progress("{task.description}") as bar:
        task = bar.add_task("starting", total=1.0)
        directory = export_package(
            source,
            Path(f"{recipe.name}-onnx") if output is None and recipe is not None else output,
            precision=precision,
            target=target,
            vae=companion(vae) or (None if recipe is None else recipe.vae),
            unet=companion(unet),
            text_encoders=[find_source(each)[0] for each in text_encoder or []],
            base=companion(base),
            prediction_type=prediction_type,
            image_encoder=image_encoder,
            revision=revision,
            via=via,
            calibration=calibration,
            defaults={} if recipe is None else recipe.defaults,
            loras=[parse_lora(each) for each in lora or []],
            safety_checker=safety_checker,
            force=force,
            report=lambda what, done: bar.update(task, description=what, completed=done),
        )
    print_note(f"{directory} is ready: {_USE[sdonnx.Package.open(directory).kind].format(directory)}")


def companion(source: str | None) -> str | None:
    """Resolve what is given in addition to the source of an export to a path or a Hub id."""
    return None if source is None else find_source(source)[0]
