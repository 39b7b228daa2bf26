"""``sdonnx info``, ``models`` and ``samplers``."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text
from sdonnx_models import bundled, recipes
from sdonnx_runtime.denoising.control import describe_control
from sdonnx_runtime.denoising.ip_adapter import describe_ip_adapter
from sdonnx_runtime.execution.devices.table import DEVICES, check_name
from sdonnx_runtime.packages.families import PackageKind
from sdonnx_runtime.packages.upscaler_config import UpscalerConfig
from sdonnx_runtime.safety.checkers import find_checker

import sdonnx
from sdonnx.benchmark.cpu import cpu_name, instruction_set
from sdonnx.cli.console import defaults_text, out, print_json, recipe_lines, samplers_table, tasks
from sdonnx.cli.devices import cache_text, compute_text, devices_json, devices_table, node_rows
from sdonnx.cli.options import Compute
from sdonnx.loading import find_model


def info(
    package: Annotated[
        str | None, typer.Argument(metavar="PACKAGE", help="A package's directory, or a Hub id of one.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="Open the package on this device, and say which nodes the device runs."),
    ] = None,
    compute: Compute = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest, or the devices, as JSON.")] = False,
) -> None:
    """Show a package: its source, components, precision and size; or without one, the devices of this machine."""
    if compute != "auto" and device is None:
        raise sdonnx.RequestError("--compute requires --device; add the device that the package is opened on")
    if device is not None:
        check_name(device)
        if package is None:
            raise sdonnx.RequestError("--device requires a PACKAGE to open; leave it out to list the devices")
    if package is None:
        if as_json:
            print_json(devices_json())
        else:
            out.print(devices_table(), highlight=False, soft_wrap=True)
            if (kept := cache_text()) is not None:
                out.print(f"\n{kept}", markup=False, highlight=False, soft_wrap=True)
        return
    opened = sdonnx.Package.open(find_model(package))
    manifest = opened.manifest
    if as_json:
        context = {"path": str(opened.root), "inferred": opened.is_optimum, "instruction_set": instruction_set()}
        context |= {"safety": _safety(opened)}
        if device is not None:
            computed = compute_text(opened, device, compute)
            context |= {"computes_in": computed, "nodes": dict(node_rows(opened, device, compute))}
        print_json({**context, **asdict(manifest)})
        return
    table = _grid()
    source = manifest.source
    table.add_row("package", str(opened.root))
    table.add_row("family", opened.title)
    table.add_row(*_usage(opened))
    table.add_row("made for", "every device" if manifest.target == "generic" else DEVICES[manifest.target].title)
    table.add_row("source", source.name if source.revision is None else f"{source.name} at {source.revision}")
    table.add_row("exporter", source.exporter)
    for what, said in source.stated.items():
        table.add_row(what, said)
    if "unet" in manifest.components:
        table.add_row("defaults", defaults_text(manifest.defaults))
        prediction = manifest.scheduler.get("prediction_type", "epsilon")
        table.add_row("scheduler", f"{manifest.scheduler.get('_class_name')}, {prediction} prediction")
        table.add_row("--safety", _safety(opened))
    latents = manifest.latents
    if opened.kind.has_latents:
        table.add_row("latents", f"{latents.channels} channels, {latents.downscale}x downscale")
    for name, component in manifest.components.items():
        megabytes = sum(file.size for file in component.files.values()) / 1e6
        table.add_row(name, f"{component.precision}, {megabytes:,.1f} MB")
    table.add_row("CPU", f"{cpu_name()}, {instruction_set()}")
    if device is not None:
        table.add_row("computes in", compute_text(opened, device, compute))
        for name, text in node_rows(opened, device, compute):
            table.add_row(name, text)
    out.print(table, highlight=False, soft_wrap=True)


def _grid() -> Table:
    """A table of two columns, whose words are cut rather than shortened where there is no room for them."""
    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    return table


def _safety(package: sdonnx.Package) -> str | None:
    """Say which safety checker ``--safety`` uses, or how to get one; None for a package that generates no images."""
    if package.kind is not PackageKind.MODEL:
        return None
    try:
        return find_checker(package).name
    except sdonnx.RequestError as error:
        return str(error)


def _usage(package: sdonnx.Package) -> tuple[str, str]:
    """Describe what a package is used for: a row of the table."""
    if package.kind.is_control:
        return "controls", f"{describe_control(package)}; use it with --control"
    if package.kind is PackageKind.IP_ADAPTER:
        return "image prompts", f"{describe_ip_adapter(package)}; use it with --ip-adapter"
    if package.kind is PackageKind.VAE:
        return "VAE", "for other packages; use it with --vae"
    if package.kind is PackageKind.UPSCALER:
        config = UpscalerConfig.read(package.root)
        return "upscales", f"{config.scale}x ({config.architecture}); use it with sdonnx upscale"
    return "generates", tasks(package.manifest)


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """List the bundled model, and the published checkpoints that [b]sdonnx export[/b] knows by name."""
    if as_json:
        packages = {name: str(path) for name, path in bundled().items()}
        print_json({"bundled": packages, "recipes": {name: asdict(recipe) for name, recipe in recipes().items()}})
        return
    table = _grid()
    for name, path in bundled().items():
        manifest = sdonnx.Package.open(path).manifest
        table.add_row(Text(name, style="bold"), f"bundled with sdonnx\n{defaults_text(manifest.defaults)}\n")
    for name, recipe in recipes().items():
        table.add_row(Text(name, style="bold"), "\n".join(recipe_lines(recipe)) + "\n")
    out.print(table, highlight=False, soft_wrap=True)


def samplers() -> None:
    """List the samplers with their names in AUTOMATIC1111 and diffusers."""
    out.print(samplers_table(), highlight=False)
