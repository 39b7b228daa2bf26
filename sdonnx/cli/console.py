"""Output of the command line: consoles, the progress bar, tables, JSON."""

import json
import logging
import os
import statistics
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from sdonnx_models import Recipe
from sdonnx_runtime.execution.devices.choosing import DEVICE_NOTES
from sdonnx_runtime.execution.process_memory import peak_memory
from sdonnx_runtime.packages.concat import CONCAT
from sdonnx_runtime.packages.manifest import Defaults, Manifest
from sdonnx_runtime.request import generation_parameters
from sdonnx_runtime.sampling.registry import A1111_NAMES, SAMPLERS
from sdonnx_runtime.sampling.scheduler_config import CLASSES

import sdonnx
from sdonnx.cli.streams import escape_controls, ignore_impossible_sizes, one_line


class _EscapingConsole(Console):
    """Escapes control characters in text: the names in files that others made are not to control the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escape_controls(segment.text), segment.style)


ignore_impossible_sizes(os.environ)
out = _EscapingConsole(markup=False, emoji=False)  # names of files and models can look like markup
err = _EscapingConsole(stderr=True, markup=False, emoji=False)

OUT_OF_MEMORY = "out of memory; choose a smaller size"


class LogHandler(logging.Handler):
    """Prints log records on stderr, above a progress bar; a line is never wrapped."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record; its text is not measured, since rich remembers the words that it measured."""
        is_note = record.name == DEVICE_NOTES and record.levelno < logging.WARNING
        level = "" if is_note else f"{record.levelname:8} "
        err.out(f"{level}{self.format(record)}", highlight=False)


@contextmanager
def progress(text: str, *columns: ProgressColumn) -> Generator[Progress, None, None]:
    """Show a progress bar on stderr, removed at the end; nothing if stderr is not a terminal."""
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
    """Describe a package's defaults in one line."""
    sampler = "" if defaults.sampler is None else f", {defaults.sampler}"
    upscaled = "" if defaults.enlarge == 1 else f", saved {defaults.enlarge} times larger"
    width, height = defaults.sides
    return (
        f"{width}x{height} pixels{upscaled}, {defaults.num_inference_steps} steps, "
        f"guidance {defaults.guidance_scale:g}{sampler}"
    )


def tasks(manifest: Manifest) -> str:
    """Describe what a package generates and which inputs it requires."""
    task, img2img = "text to image", "image to image (--image), inpainting (--mask), outpainting (--outpaint)"
    if manifest.conditions.concat is not None:
        concat = CONCAT[manifest.conditions.concat]
        task, img2img = concat.task, concat.img2img
    has_encoder = img2img is not None and "vae_encoder" in manifest.components
    distilled = "; guidance-distilled" if manifest.conditions.guidance_width is not None else ""
    return f"{task}; {img2img}{distilled}" if has_encoder else f"{task}{distilled}"


def recipe_lines(recipe: Recipe) -> list[str]:
    """Describe an export recipe in a few lines."""
    disk = ", ".join(f"{size:g} GB ({precision})" for precision, size in recipe.package_gb.items())
    memory = ", ".join(f"{size:g} GB ({precision})" for precision, size in recipe.memory_gb.items())
    return [
        recipe.title,
        recipe.source,
        recipe.licence,
        defaults_text(Defaults(**recipe.defaults)),
        f"disk {disk}" + (f"; memory {memory}" if memory else ""),
    ]


def samplers_table() -> Table:
    """List the samplers with their names in sdonnx, AUTOMATIC1111 and diffusers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("--sampler", "AUTOMATIC1111", "diffusers"):
        table.add_column(heading, overflow="fold")
    for name in SAMPLERS:
        table.add_row(name, A1111_NAMES[name], CLASSES.get(name, ""))
    return table


def result_json(result: sdonnx.Result, paths: Sequence[Path | None], grid: Path | None) -> dict[str, Any]:
    """Convert a result to JSON data; the path of a refused image is None."""
    images = zip(paths, result.seeds, result.prompts, strict=True)
    return {
        "images": [
            {"path": None if path is None else str(path), "seed": seed, **asdict(prompts)}
            for path, seed, prompts in images
        ],
        "grid": None if grid is None else str(grid),
        "request": generation_parameters(result.request),
        "model": result.model,
        "compute": result.compute,
        "vae": result.vae,
        "refiner": result.refiner,
        "controls": list(result.controls),
        "ip_adapters": list(result.ip_adapters),
        "timings": asdict(result.timings),
        "safety": [asdict(each) for each in result.safety],
    }


def strategy_text(planned: sdonnx.ComponentPlan) -> str:
    """Describe how a component is run."""
    how, resident = planned.strategy, len(planned.strategy.resident_stages)
    upscales = planned.component.endswith("upscaler")
    is_staged = how.staged and planned.stages > 1 and (how.tile is None or upscales)
    words = [f"{planned.stages} stages" + (f", {resident} resident" if resident else "")] if is_staged else []
    words += ["batch split"] if how.split_batch else []
    words += [f"{'tiles' if upscales else 'VAE tiles'} {how.tile}"] if how.tile is not None else []
    words += ["arena off"] if how.no_arena else []
    return "; ".join(words) or "whole"


def print_safety(pipe: sdonnx.Pipeline) -> None:
    """Print which safety checker there is, if it is on."""
    if pipe.safety is not None:
        print_note(f"images are checked by {pipe.safety.checker.name}; --safety {pipe.safety.mode}")


def print_plan(plan: sdonnx.Plan) -> None:
    """Print how a request will be run, and its predicted peak memory."""
    parts = ", ".join(
        f"{planned.component}: {strategy_text(planned)}"
        for planned in plan.components
        if strategy_text(planned) != "whole"
    )
    print_note(f"peak {plan.peak / 1e6:,.0f} MB (predicted); {parts or 'every component whole'}")


def print_usage(result: sdonnx.Result) -> None:
    """Print the measured peak memory and the median time of a step."""
    seconds = statistics.median(result.timings.steps) if result.timings.steps else 0.0
    print_note(f"peak {peak_memory() / 1e6:,.0f} MB, {seconds:.2g} s/step")


def print_results(report: Mapping[str, Any]) -> None:
    """Print the path and the seed of each image of a `result_json` with what the safety checker says, and the grid."""
    safety = [f"  {sdonnx.Safety(**each)}" for each in report["safety"]] or [""] * len(report["images"])
    for image, checked in zip(report["images"], safety, strict=True):
        print_note(f"{image['path'] or 'not saved'}  seed {image['seed']}{checked}")
    if report["grid"] is not None:
        print_note(report["grid"])


def refusal(report: Mapping[str, Any]) -> str | None:
    """Describe how many images of a `result_json` are refused; None if none is."""
    count, refused = len(report["images"]), sum(image["path"] is None for image in report["images"])
    what = "the image is" if count == 1 else f"{refused} of {count} images {'is' if refused == 1 else 'are'}"
    return f"{what} refused by the safety checker and not saved" if refused else None


def print_report(report: Mapping[str, Any], *, as_json: bool) -> None:
    """Print a `result_json`, as JSON or as `print_results` does.

    Raises:
        SafetyError: an image is refused.
    """
    if as_json:
        print_json(report)
    else:
        print_results(report)
    if (reason := refusal(report)) is not None:
        raise sdonnx.SafetyError(reason)


def print_note(text: str) -> None:
    """Print a line on stderr, as it is."""
    err.print(one_line(text), highlight=False, soft_wrap=True)


def print_json(data: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Print JSON on stdout and flush it; on one line without an indent."""
    sys.stdout.write(json.dumps(data, indent=indent, allow_nan=False) + "\n")
    sys.stdout.flush()
