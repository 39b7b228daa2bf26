"""What the command line shows: consoles, the progress bar, tables, JSON."""

import json
import logging
import statistics
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from sdonnx_models import Recipe
from sdonnx_runtime.execution.process_memory import peak_memory
from sdonnx_runtime.packages.manifest import Defaults, Manifest
from sdonnx_runtime.request import generation_parameters as recipe_of
from sdonnx_runtime.sampling.registry import A1111_NAMES, SAMPLERS
from sdonnx_runtime.sampling.scheduler_config import CLASSES

import sdonnx

out = Console(markup=False)  # names of files and models may look like markup
err = Console(stderr=True, markup=False)


def log_handler() -> logging.Handler:
    """Warnings of the libraries, on stderr."""
    return RichHandler(console=err, show_time=False, show_path=False, markup=False)


@contextmanager
def progress(text: str, *columns: ProgressColumn) -> Generator[Progress, None, None]:
    """A progress bar on stderr that is gone when the work is done; none where no person is looking."""
    with Progress(
        TextColumn(text),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    ) as bar:
        yield bar


def defaults_text(defaults: Defaults) -> str:
    """What a package suggests, in one line."""
    sampler = "" if defaults.sampler is None else f", {defaults.sampler}"
    shown = "" if defaults.enlarge == 1 else f", saved {defaults.enlarge} times larger"
    return (
        f"{defaults.size}x{defaults.size} pixels{shown}, {defaults.num_inference_steps} steps, "
        f"guidance {defaults.guidance_scale:g}{sampler}"
    )


_TASKS: Mapping[str | None, tuple[str, str | None]] = {
    None: ("pictures of text", "of pictures (--image), of parts of them (--mask) and around them (--outpaint)"),
    "mask": ("parts of pictures, or what is around them: needs --image with --mask or --outpaint", None),
    "picture": ("pictures edited as the prompt tells: needs --image", None),
    "depth": ("pictures of text with the depth of another: needs --depth", "of pictures (--image) as well"),
}
"""What a model makes by what its U-Net is given beside the latents; the second needs a VAE encoder."""


def tasks(manifest: Manifest) -> str:
    """What a package makes, and what it needs for it."""
    always, encoding = _TASKS[manifest.conditions.beside]
    more = encoding is not None and "vae_encoder" in manifest.components
    distilled = "; guided by itself" if manifest.conditions.guidance_width is not None else ""
    return f"{always}; {encoding}{distilled}" if more else f"{always}{distilled}"


def recipe_lines(generation_parameters: Recipe) -> list[str]:
    """A recipe in a few lines."""
    disk = ", ".join(f"{size:g} GB ({precision})" for precision, size in generation_parameters.package_gb.items())
    memory = ", ".join(f"{size:g} GB ({precision})" for precision, size in generation_parameters.memory_gb.items())
    return [
        generation_parameters.title,
        generation_parameters.source,
        generation_parameters.licence,
        defaults_text(Defaults(**generation_parameters.defaults)),
        f"disk {disk}" + (f"; memory {memory}" if memory else ""),
    ]


def samplers_table() -> Table:
    """Every sampler by our name, AUTOMATIC1111's and diffusers'."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("--sampler", "AUTOMATIC1111", "diffusers"):
        table.add_column(heading, no_wrap=True)
    for name in SAMPLERS:
        table.add_row(name, A1111_NAMES[name], CLASSES.get(name, ""))
    return table


def result_json(result: sdonnx.Result, paths: list[Path]) -> dict[str, Any]:
    """What was made, as JSON can hold it."""
    return {
        "images": [{"path": str(path), "seed": seed} for path, seed in zip(paths, result.seeds, strict=True)],
        "request": recipe_of(result.request),
        "model": result.model,
        "vae": result.vae,
        "refiner": result.refiner,
        "controls": list(result.controls),
        "timings": asdict(result.timings),
    }


def strategy_text(choice: sdonnx.ComponentPlan) -> str:
    """How a component is run."""
    how, kept = choice.way, len(choice.way.kept)
    cut = how.staged and choice.stages > 1 and how.tile is None
    words = [f"{choice.stages} stages" + (f", {kept} kept" if kept else "")] if cut else []
    words += ["a row at a time"] if how.rows else []
    words += [f"tiles of {how.tile} cells"] if how.tile is not None else []
    words += ["nothing for reuse"] if how.frugal else []
    return "; ".join(words) or "whole"


def print_plan(plan: sdonnx.Plan) -> None:
    """Says how a picture is going to be made, and what that takes."""
    parts = ", ".join(
        f"{choice.component}: {strategy_text(choice)}" for choice in plan.choices if strategy_text(choice) != "whole"
    )
    err.print(f"{plan.peak / 1e6:,.0f} MB at most; {parts or 'every component whole'}", highlight=False, soft_wrap=True)


def print_usage(result: sdonnx.Result) -> None:
    """Says what memory and time a picture took that there was a plan for."""
    seconds = statistics.median(result.timings.steps) if result.timings.steps else 0.0
    err.print(f"took {peak_memory() / 1e6:,.0f} MB at most, {seconds:.2g} s a step", highlight=False, soft_wrap=True)


def print_results(result: sdonnx.Result, paths: list[Path]) -> None:
    """Says where pictures are."""
    for path, seed in zip(paths, result.seeds, strict=True):
        err.print(f"{path}  seed {seed}", highlight=False, soft_wrap=True)


def print_json(data: dict[str, Any], *, indent: int | None = 2) -> None:
    """Writes JSON to stdout; without an indent, on one line, and at once."""
    sys.stdout.write(json.dumps(data, indent=indent, allow_nan=False) + "\n")
    sys.stdout.flush()
