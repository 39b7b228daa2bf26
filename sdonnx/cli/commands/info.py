"""``sdonnx info``, ``models`` and ``samplers``: what there is."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text
from sdonnx_models import bundled, recipes
from sdonnx_runtime.denoising.control import described as steered_by
from sdonnx_runtime.execution.cpu import cpu_name, instruction_set
from sdonnx_runtime.packages.manifest import FAMILIES

import sdonnx
from sdonnx.cli.console import defaults_text, out, print_json, recipe_lines, samplers_table, tasks
from sdonnx.loading import find_model


def info(
    package: Annotated[str, typer.Argument(metavar="PACKAGE", help="A package's directory, or a Hub id of one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything the manifest says as JSON.")] = False,
) -> None:
    """Show what a package is: where it came from, what it holds, what it takes on disk, and what this CPU is."""
    opened = sdonnx.Package.open(find_model(package))
    manifest = opened.manifest
    if as_json:
        here = {"path": str(opened.root), "inferred": opened.foreign, "instruction_set": instruction_set()}
        print_json({**here, **asdict(manifest)})
        return
    facts = Table.grid(padding=(0, 2))
    source = manifest.source
    facts.add_row("package", str(opened.root))
    facts.add_row("family", FAMILIES[manifest.family])
    facts.add_row(*_use(opened))
    facts.add_row("source", source.name if source.revision is None else f"{source.name} at {source.revision}")
    facts.add_row("exporter", source.exporter)
    if "unet" in manifest.components:
        facts.add_row("suggests", defaults_text(manifest.defaults))
        predicts = manifest.scheduler.get("prediction_type", "epsilon")
        facts.add_row("scheduler", f"{manifest.scheduler.get('_class_name')}, predicts {predicts}")
    latents = manifest.latents
    if opened.control is None:
        facts.add_row("latents", f"{latents.channels} channels, {latents.downscale} pixels a cell")
    for name, component in manifest.components.items():
        megabytes = sum(file.size for file in component.files.values()) / 1e6
        facts.add_row(name, f"{component.precision}, {megabytes:,.1f} MB")
    facts.add_row("this CPU", f"{cpu_name()}, {instruction_set()}")
    out.print(facts, highlight=False, soft_wrap=True)


def _use(package: sdonnx.Package) -> tuple[str, str]:
    """What a package is good for: a row of a table."""
    if package.control is not None:
        return "steers", f"{steered_by(package)}; give it with --control"
    if package.is_vae_alone:
        return "makes", "pictures of other packages' latents: give it with --vae"
    return "makes", tasks(package.manifest)


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
        listing.add_row(Text(name, style="bold"), f"comes with sdonnx\n{defaults_text(manifest.defaults)}\n")
    for name, recipe in known.items():
        listing.add_row(Text(name, style="bold"), "\n".join(recipe_lines(recipe)) + "\n")
    out.print(listing, highlight=False, soft_wrap=True)


def samplers() -> None:
    """List the samplers, with their names elsewhere."""
    out.print(samplers_table(), highlight=False)
