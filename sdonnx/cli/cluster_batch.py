"""``sdonnx run --ray``: a batch on the nodes of a Ray cluster."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich.progress import MofNCompleteColumn, TextColumn
from sdonnx_runtime.execution.process_memory import resident_memory
from sdonnx_runtime.memory.budget import MAX, Budget
from sdonnx_runtime.outputs.latents_file import save_latents

import sdonnx
from sdonnx.cli.batch import Line, parse_line
from sdonnx.cli.console import print_note, progress, result_json
from sdonnx.cli.distributed import DistributedRequest, fields_json, generate_lines, refuse_options
from sdonnx.cli.generate import OutputPaths
from sdonnx.cli.parsing import is_url
from sdonnx.cluster.actors import ActorPool, Failed, Generated, Machine, Opening
from sdonnx.cluster.connection import check_address, connect, nodes
from sdonnx.cluster.packages import Source, file_source, package_source, portable_name
from sdonnx.cluster.resources import ACTOR_BYTES, Actors, choose_actors
from sdonnx.cluster.storage import check_url, exists_at, write_url

_OTHER_OPTIONS = {
    "preview": "a batch has many images at a time",
    "preview_vae": "a batch has many images at a time",
    "threads": "give --threads-per-actor",
    "memory": "give --memory-per-actor",
    "server": "give either servers or a cluster",
    "token": "it is a server's",
}
"""Options of ``sdonnx run`` that can't have an effect on a cluster, and what to do instead."""

_PREDICTION = 1.1
"""Predicted peaks are within 10 % of the measured ones."""


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """What the user asked for of the cluster."""

    address: str
    actors: int | None
    threads: int | None
    memory: str | None


def check_options(context: typer.Context, outputs: OutputPaths) -> None:
    """Check that no option is given that has no effect on a cluster.

    Raises:
        RequestError: there is one.
    """
    refuse_options(context, _OTHER_OPTIONS, "with --ray")
    if outputs.images is not None and is_url(outputs.images):
        if outputs.grid or outputs.latents is not None:
            raise sdonnx.RequestError("--grid and --save-latents require images on this machine; give another -o")
        check_url(outputs.images)


class ClusterRequest(DistributedRequest):
    """A request for an actor, and the files that it is saved to."""

    def __init__(self, made_by: Mapping[str, Any], read: Callable[[], dict[str, Any]], outputs: OutputPaths) -> None:
        super().__init__(read, outputs)
        self._made_by, self._latents = made_by, outputs.latents

    def prepare(self) -> dict[str, Any]:
        """Make the fields of the request, with a seed."""
        fields = self.read_fields()
        request = self.check(fields)
        self.note_digest(fields_json(fields, request), self._made_by)
        return {**fields, "seed": request.seed}

    def check_paths(self, images: list[Path]) -> None:
        """Check that the images can be written; those at a URL when they are."""
        if not is_url(images[0]):
            super().check_paths(images)

    def save(self, outcome: Generated | Failed) -> dict[str, Any]:
        """Save the images of an actor, and say on which machine they were made."""
        if isinstance(outcome, Failed):
            raise outcome.error
        result = outcome.result
        paths, grid = self.save_images(outcome.pngs)
        if self._latents is not None:
            save_latents(self._latents, result.latents, result.request, result.model, compute=result.compute)
        report = result_json(result, [None] * len(paths), None)
        for image, path in zip(report["images"], paths, strict=True):
            image["path"] = path
        made = {"actor": outcome.actor, "seconds": outcome.seconds, "peak_memory": outcome.peak_memory}
        return {**report, "grid": grid, "machine": {**asdict(outcome.machine), **made}}

    def save_image(self, png: bytes, path: Path) -> str:
        """Save an image, also at a URL."""
        return write_url(path, png) if is_url(path) else super().save_image(png, path)

    def is_saved(self, path: Path) -> bool:
        """Whether there is such an image, also at a URL."""
        return exists_at(path) if is_url(path) else super().is_saved(path)


def run_on_cluster(
    options: ClusterOptions,
    opening: Opening,
    fields: dict[str, Any],
    outputs: OutputPaths,
    path: Path,
    lines: list[Line],
    *,
    as_json: bool,
) -> None:
    """Generate the images of every line of a batch file.

    Args:
        options: what the user asked for of the cluster.
        opening: how actors open their pipelines; ``sources`` are made here.
        fields: the fields of `Request`, which a line may replace.
        outputs: the files to write.
        path: the batch file.
        lines: its lines.
        as_json: print each line's result as one line of JSON.

    Raises:
        SdonnxError: as `generate_batch` does; or the cluster can't be used, or a node's packages differ.
    """
    check_address(options.address)
    asked = None if options.memory is None else _parse_memory(options.memory)
    opening = replace(opening, sources=_sources(opening))
    opening = replace(opening, arguments=_portable(opening))
    memory = _choose_memory(asked, opening, fields, path, lines)
    made_by = {
        "sources": {each.name: each.digest for each in opening.sources},
        "adapters": [str(each) for each in (*opening.loras, *opening.embeddings)],
        "options": [opening.arguments["safety"], opening.enlarge, opening.provenance, opening.margins],
    }
    made_by |= {} if (compute := opening.arguments["compute"]) == "auto" else {"compute": compute}

    def make(read: Callable[[], dict[str, Any]], files: OutputPaths) -> ClusterRequest:
        return ClusterRequest(made_by, read, files)

    def generate(requests: Sequence[ClusterRequest]) -> Generator[tuple[int, Generated | Failed], None, None]:
        if not requests:
            return
        with connect(options.address) as is_local:
            actors = choose_actors(
                nodes(), requests=len(requests), memory=memory, count=options.actors, threads=options.threads
            )
            _print_actors(actors, options.address, is_local=is_local)
            yield from _generate(ActorPool(opening, actors, print_note), requests)

    generate_lines(path, lines, fields, outputs, make, generate, as_json=as_json)


def _print_actors(actors: Actors, address: str, *, is_local: bool) -> None:
    where = "a Ray cluster that was started for this" if is_local else f"the Ray cluster ({address})"
    count, threads = _plural(actors.count, "actor"), _plural(actors.threads, "thread")
    print_note(f"{count} on {where}: {threads} and {actors.memory / 1e6:,.0f} MB each")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _generate(
    pool: ActorPool, requests: Sequence[ClusterRequest]
) -> Generator[tuple[int, Generated | Failed], None, None]:
    """Generate the images of requests with one progress bar, which is not there while an outcome is worked with."""
    start, images, machines = time.monotonic(), 0, set[Machine]()
    with (
        progress("{task.description}", MofNCompleteColumn(), TextColumn("{task.fields[pace]}")) as bar,
        closing(pool.run([request.prepare for request in requests])) as outcomes,
    ):
        task = bar.add_task("starting the actors", total=len(requests), pace="")
        for done, outcome in enumerate(outcomes, 1):
            if isinstance(outcome, Generated):
                images += len(outcome.pngs)
                machines.add(replace(outcome.machine, node=""))
            bar.stop()
            yield outcome.index, outcome
            pace = f"{60 * images / (time.monotonic() - start):.1f} images/min"
            bar.update(task, description="generating", completed=done, pace=pace)
            bar.start()
    if len(machines) > 1:
        kinds = "; ".join(f"{each.cpu}, ONNX Runtime {each.onnxruntime}, {each.provider}" for each in machines)
        print_note(f"images of unequal machines may differ in their last bits: {kinds}")


_PACKAGES = ("model", "vae", "refiner", "upscaler")
_LISTS = ("controls", "ip_adapters")
_FOLDERS = ("lora_folder", "wildcard_folder", "styles")
"""Arguments of `sdonnx.load` that name packages, several of them, or other files."""


def _sources(opening: Opening) -> tuple[Source, ...]:
    """The packages and files that have to be the same on every node."""
    arguments = opening.arguments
    packages = [arguments[name] for name in _PACKAGES if arguments[name] is not None]
    packages += [each for name in _LISTS for each in arguments[name]]
    files = [arguments[name] for name in _FOLDERS if arguments[name] is not None]
    files += [each.path for each in opening.loras] + [file for file, _ in opening.embeddings]
    found = [package_source(each) for each in packages] + [file_source(each) for each in files]
    return tuple(dict.fromkeys(found))


def _portable(opening: Opening) -> dict[str, Any]:
    """The arguments of `sdonnx.load` by the names that nodes have for them."""

    def portable(value: Any) -> Any:
        return None if value is None else portable_name(value)

    found = dict(opening.arguments)
    found |= {name: portable(found[name]) for name in _PACKAGES}
    found |= {name: [portable(each) for each in found[name]] for name in _LISTS}
    return found | {name: None if found[name] is None else str(Path(found[name]).absolute()) for name in _FOLDERS}


def _parse_memory(text: str) -> int:
    size = None
    with suppress(sdonnx.RequestError):
        size = Budget(text).device_limit
    if size is None:
        raise sdonnx.RequestError(f"--memory-per-actor is {text}; give a size such as 1500MB or 2GB")
    return size


def _choose_memory(
    asked: int | None, opening: Opening, fields: Mapping[str, Any], path: Path, lines: Sequence[Line]
) -> int:
    """The memory of an actor in bytes: as asked, or the peak of the largest request with all components loaded.

    Raises:
        RequestError: less is asked for than the largest request can run with.
    """
    with sdonnx.load(**opening.arguments, memory=MAX) as pipe:
        pipe.set_loras(opening.loras, ignore_unmatched=opening.ignore_unmatched)
        largest, pixels = None, 0
        for line in lines:
            try:
                resolved = pipe.resolve("", **{**fields, **parse_line(line, path)})
            except (sdonnx.SdonnxError, MemoryError, TypeError):
                continue  # it will be reported as a line that failed
            last = resolved.passes[-1]
            if last.width * last.height > pixels:
                largest, pixels = resolved, last.width * last.height
        plan = None if largest is None else pipe.plan(largest, always=True)
        own = resident_memory()
        bound = pipe.memory_upper_bound(pixels)
    if asked is not None and plan is not None and asked < (least := plan.minimum_budget - own + ACTOR_BYTES):
        raise sdonnx.RequestError(
            f"--memory-per-actor is {asked / 1e6:,.0f} MB; the largest request needs at least {least / 1e6:,.0f} MB"
        )
    return asked or int(bound if plan is None else _PREDICTION * (plan.peak - own) + ACTOR_BYTES)
