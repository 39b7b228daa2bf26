"""``sdonnx run --server``: requests that other machines carry out."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import typer
from rich.progress import MofNCompleteColumn, Progress, TaskID, TextColumn
from sdonnx_runtime.outputs.atomic import write_file
from sdonnx_runtime.outputs.metadata import enlarge_png
from sdonnx_runtime.request import PACKAGE_FIELDS

import sdonnx
from sdonnx.cli.batch import Line
from sdonnx.cli.console import print_note, print_report, progress
from sdonnx.cli.distributed import DistributedRequest, fields_json, generate_lines, refuse_options
from sdonnx.cli.generate import OutputPaths
from sdonnx.client.connection import ServerError, parse_address
from sdonnx.client.pool import Advanced, Failed, Finished, Lost, Pool, Previewed
from sdonnx.client.server import Event, Selection, Server

_LOCAL_OPTIONS = {
    "device": "the server chose its own when it started",
    "compute": "the server chose its own when it started",
    "cache": "the server chose its own when it started",
    "threads": "the server chose its own when it started",
    "memory": "the server chose its own when it started",
    "preview_vae": "the server makes the previews",
    "refiner": "servers have no refiners",
    "outpaint": "enlarge the image and its mask first, then give both",
    "lora": "put the file into the server's --lora-dir and <lora:NAME:0.8> into the prompt",
    "lora_dir": "the server has its own",
    "wildcards": "the server has its own",
    "styles": "the server has its own",
    "lora_ignore_unmatched": "it requires --lora",
    "embedding": "put the file into the server's --embedding-dir and its trigger word into the prompt",
    "save_latents": "servers keep no latents",
    "safety": "the server chose its own when it started",
    "provenance": "the server chose its own when it started",
}
"""Options of ``sdonnx run`` that can't have an effect on a server, and what to do instead."""


def connect(context: typer.Context, servers: str, token: str | None, selection: Selection, *, previews: bool) -> Pool:
    """Check the options, and connect to the servers of ``--server``.

    Raises:
        RequestError: an address is malformed, or an option has no effect on a server.
        ServerError: a server is of no use, or none is there.
        PackageError: the model has no previews, which are asked for.
    """
    refuse_options(context, _LOCAL_OPTIONS, "on a --server")
    addresses = [parse_address(url.strip(), token) for url in servers.split(",")]
    pool = Pool([Server(address=each) for each in dict.fromkeys(addresses)], selection, previews=previews)
    if previews and not pool.packages.has_preview:
        raise sdonnx.PackageError("this package has no preview; export it again, or leave out --preview")
    return pool


class RemoteRequest(DistributedRequest):
    """A request for servers."""

    def __init__(self, pool: Pool, read: Callable[[], dict[str, Any]], outputs: OutputPaths) -> None:
        super().__init__(read, outputs)
        self._packages, self._selection, self._upscale = pool.packages, pool.selection, outputs.upscale
        self._enlarge = 1

    def prepare(self) -> dict[str, Any]:
        """Make the body of ``POST /api/jobs``."""
        fields = self.read_fields()
        request = self.check(fields)
        body = fields_json(fields, request)
        for field in PACKAGE_FIELDS:
            for each, name in zip(body.get(field, ()), getattr(self._selection, field), strict=False):
                each["package"] = name
        self._enlarge = self._packages.enlarge if self._upscale and request.padding_mask_crop is None else 1
        self.note_digest(body, self._enlarge, self._packages.titles)
        return {**body, "seed": request.seed}

    def save(self, outcome: Finished | Failed) -> dict[str, Any]:
        """Save the images that a server made; raises SdonnxError, also if the server sent something else."""
        if isinstance(outcome, Failed):
            raise outcome.error
        answer, images = outcome.answer, iter(outcome.images)
        refused = [sdonnx.Safety(**each).is_refused for each in answer["safety"]] or [False] * self.num_images
        expected = self.num_images - sum(refused)
        if len(outcome.images) != expected or len(refused) != self.num_images:
            raise ServerError(f"{outcome.server} made {len(outcome.images)} images; expected {expected}")
        paths, grid = self.save_images([None if each else next(images) for each in refused])
        made = zip(paths, answer["seeds"], answer["prompts"], strict=True)
        shown = [{"path": path, "seed": seed, **prompts} for path, seed, prompts in made]
        found = {"images": shown, "grid": grid, "request": answer["request"]}
        return {**found, **answer["result"], "safety": answer["safety"]}

    def save_image(self, png: bytes, path: Path) -> str:
        """Save an image, larger where the model's images are small."""
        return super().save_image(png if self._enlarge == 1 else enlarge_png(png, self._enlarge), path)


def run_remotely(
    pool: Pool,
    fields: dict[str, Any],
    outputs: OutputPaths,
    path: Path | None,
    lines: list[Line] | None,
    *,
    as_json: bool,
) -> None:
    """Generate the images of a request, or of every line of a batch file.

    Args:
        pool: the servers.
        fields: the fields of `Request`, which a line may replace.
        outputs: the files to write.
        path: the batch file.
        lines: its lines.
        as_json: print results as JSON.

    Raises:
        SdonnxError: as `generate` and `generate_batch` do, or no server is left.
    """

    def make(read: Callable[[], dict[str, Any]], outputs: OutputPaths) -> RemoteRequest:
        return RemoteRequest(pool, read, outputs)

    def generate(requests: Sequence[RemoteRequest]) -> Generator[tuple[int, Finished | Failed], None, None]:
        return _generate(pool, requests, outputs.preview)

    if path is not None and lines is not None:
        generate_lines(path, lines, fields, outputs, make, generate, as_json=as_json)
        return
    request = make(lambda: fields, outputs)
    with closing(generate([request])) as outcomes:
        reports = [request.save(outcome) for _, outcome in outcomes]
    print_report(reports[0], as_json=as_json)


def _generate(
    pool: Pool, requests: Sequence[RemoteRequest], preview: Path | None
) -> Generator[tuple[int, Finished | Failed], None, None]:
    """Generate the images of requests with a progress bar, which is not there while an outcome is worked with."""
    with (
        progress("{task.description}", MofNCompleteColumn(), TextColumn("{task.fields[pace]}")) as bar,
        closing(pool.run([request.prepare for request in requests])) as updates,
    ):
        names = {server: f"{server} " if len(pool.servers) > 1 else "" for server in pool.servers}
        tasks = {server: bar.add_task(f"{name}waiting", total=None, pace="") for server, name in names.items()}
        for update in updates:
            match update:
                case Advanced(server=server, event=event):
                    _show(bar, tasks[server], names[server], event)
                case Previewed(png=png) if preview is not None:
                    write_file(preview, lambda stream, png=png: stream.write(png))
                case Lost(error=error, is_final=is_final):
                    print_note(f"{error} ({'given up' if is_final else 'trying again'})")
                case Finished() | Failed():
                    bar.stop()
                    yield update.index, update
                    bar.start()
                case _:
                    pass


_DESCRIPTIONS = {
    "queued": "queued",
    "running": "encoding the prompt",
    "done": "waiting",
    "failed": "waiting",
    "cancelled": "waiting",
}
"""Of events that begin a bar anew."""


def _show(bar: Progress, task: TaskID, name: str, event: Event) -> None:
    data: Mapping[str, Any] = event.data
    if event.kind == "step":
        total, completed = data["num_steps"] * data["num_images"], data["image"] * data["num_steps"] + data["step"]
        pace = f"{data['seconds']:.2f} s/step"
        bar.update(task, description=f"{name}denoising", total=total, completed=completed, pace=pace)
    elif event.kind == "decoding":
        bar.update(task, description=f"{name}decoding")
    elif event.kind in _DESCRIPTIONS:
        bar.reset(task, description=name + _DESCRIPTIONS[event.kind], pace="")
