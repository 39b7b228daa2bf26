"""``sdonnx run --server``: requests that other machines carry out."""

import base64
import hashlib
import io
import json
import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from PIL.Image import Image
from rich.progress import MofNCompleteColumn, Progress, TaskID, TextColumn
from sdonnx_runtime.images.preprocess import open_image
from sdonnx_runtime.outputs.atomic import write_file
from sdonnx_runtime.outputs.metadata import enlarge_png, save_grid
from sdonnx_runtime.request import CONTROL_FIELDS, PACKAGE_FIELDS, Request
from sdonnx_runtime.validation import check_fields, check_names

import sdonnx
from sdonnx.cli.batch import BatchReport, Line, batch_outputs, number_outputs, parse_line
from sdonnx.cli.console import print_note, print_report, progress
from sdonnx.cli.generate import OutputPaths
from sdonnx.cli.journal import Journal
from sdonnx.cli.parsing import check_outputs, grid_path, output_paths
from sdonnx.client.connection import ServerError, parse_address
from sdonnx.client.pool import Advanced, Failed, Finished, Lost, Pool, Previewed
from sdonnx.client.server import Event, Selection, Server

_LOCAL_OPTIONS = {
    "device": "the server chose its own when it started",
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
    for option, remedy in _LOCAL_OPTIONS.items():
        source = context.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            raise sdonnx.RequestError(f"--{option.replace('_', '-')} has no effect on a --server; {remedy}")
    addresses = [parse_address(url.strip(), token) for url in servers.split(",")]
    pool = Pool([Server(address=each) for each in dict.fromkeys(addresses)], selection, previews=previews)
    if previews and not pool.packages.has_preview:
        raise sdonnx.PackageError("this package has no preview; export it again, or leave out --preview")
    return pool


class RemoteRequest:
    """A request, the files that it is saved to, and the seed that it keeps on every server."""

    def __init__(self, read: Callable[[], dict[str, Any]], outputs: OutputPaths, pool: Pool) -> None:
        self._read, self._outputs = read, outputs
        self._packages, self._selection = pool.packages, pool.selection
        self._seed = secrets.randbits(32)
        self._paths: list[Path] = []
        self._grid: Path | None = None
        self._overwrite = outputs.overwrite and outputs.images is not None
        self._enlarge = 1
        self.digest = ""
        """Of all that makes its images; another one for another request."""

    def prepare(self) -> dict[str, Any]:
        """Check the request and its outputs, and make the body of ``POST /api/jobs``.

        Raises:
            RequestError: the request is invalid, a file name has the wrong suffix, or an output is an input.
            SdonnxError: a path is not writable.
        """
        fields, outputs = self._read(), self._outputs
        check_names(fields)
        request = check_fields(Request(**fields))
        body = {name: _to_json(name, getattr(request, name)) for name in fields if fields[name] is not None}
        for field in PACKAGE_FIELDS:
            for each, name in zip(body.get(field, ()), getattr(self._selection, field), strict=False):
                each["package"] = name
        if request.seed is None:
            request = replace(request, seed=self._seed)
        self._enlarge = self._packages.enlarge if outputs.upscale and request.padding_mask_crop is None else 1
        made_by = [body, self._enlarge, self._packages.titles]
        self.digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
        self._paths = output_paths(outputs.images, request)
        self._grid = grid_path(outputs.images, self._paths) if outputs.grid else None
        written = [*self._paths, *([] if self._grid is None else [self._grid])]
        check_outputs(written, outputs.preview, inputs=outputs.inputs, overwrite=self._overwrite)
        return {**body, "seed": request.seed}

    def save(self, finished: Finished) -> dict[str, Any]:
        """Save the images, and return what `result_json` is for a request of this machine.

        Raises:
            SdonnxError: a file can't be written, or the server sent something else.
        """
        answer, images = finished.answer, iter(finished.images)
        safety = [sdonnx.Safety(**each) for each in answer["safety"]]
        refused = [index for index, each in enumerate(safety) if each.is_refused]
        expected = len(self._paths) - len(refused)
        if len(finished.images) != expected:
            raise ServerError(f"{finished.server} made {len(finished.images)} images; expected {expected}")
        paths = [
            None if index in refused else self._save_image(next(images), path) for index, path in enumerate(self._paths)
        ]
        made = zip(paths, answer["seeds"], answer["prompts"], strict=True)
        shown = [{"path": None if path is None else str(path), "seed": seed, **prompts} for path, seed, prompts in made]
        saved = [path for path in paths if path is not None]
        grid = None
        if self._grid is not None and saved:
            grid = str(save_grid(saved, self._grid, overwrite=self._overwrite))
        found = {"images": shown, "grid": grid, "request": answer["request"]}
        return {**found, **answer["result"], "safety": answer["safety"]}

    def _save_image(self, png: bytes, path: Path) -> Path:
        open_image(png, name="the server's image", formats=("PNG",))
        content = png if self._enlarge == 1 else enlarge_png(png, self._enlarge)
        return write_file(path, lambda stream: stream.write(content), overwrite=self._overwrite)


def _to_json(name: str, value: Any) -> Any:
    if isinstance(value, Image):
        return _encode_image(name, value)
    if name in PACKAGE_FIELDS:
        return [{key: _to_json(key, getattr(each, key)) for key in CONTROL_FIELDS} for each in value]
    return value


def _encode_image(name: str, image: Image) -> str:
    """Encode an image as base64 of a PNG with the same pixels."""
    if image.mode in ("I", "F"):
        raise sdonnx.RequestError(f"{name} has 32 bits a pixel, which a PNG can't hold; give a PNG of 16 bits")
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA") and not image.mode.startswith("I;16"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    content = io.BytesIO()
    image.save(content, format="PNG", compress_level=1)
    return base64.b64encode(content.getvalue()).decode()


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
    if path is None or lines is None:
        print_report(generate_remotely(pool, lambda: fields, outputs), as_json=as_json)
    else:
        generate_batch_remotely(pool, path, lines, fields, outputs, as_json=as_json)


def generate_remotely(pool: Pool, read: Callable[[], dict[str, Any]], outputs: OutputPaths) -> dict[str, Any]:
    """Generate and save the images of one request on the first server that is free; returns its `result_json`.

    Raises:
        SdonnxError: as `generate` does, or no server is left.
    """
    request = RemoteRequest(read, outputs, pool)
    with closing(_generate(pool, [request], outputs.preview)) as outcomes:
        for _, outcome in outcomes:
            if isinstance(outcome, Finished):
                return request.save(outcome)
            raise outcome.error
    raise AssertionError


def generate_batch_remotely(
    pool: Pool, path: Path, lines: list[Line], fields: dict[str, Any], outputs: OutputPaths, *, as_json: bool
) -> None:
    """Generate the images of every line, as `generate_batch` does; lines that were done before are left out.

    Raises:
        RequestError: the images' name does not end in .png.
        SdonnxError: a line failed, or no server is left.
    """
    outputs = batch_outputs(outputs, lines, path)
    requests = {line: _line_request(pool, path, line, fields, outputs) for line in lines}
    journal = Journal((outputs.images or Path(path.name)).with_suffix(".journal"))
    left = [line for line in lines if not _is_done(journal, line, requests[line])]
    num_done = len(lines) - len(left)
    if num_done:
        print_note(f"{num_done} of {len(lines)} requests were done before; delete {journal.path} to repeat them")
    try:
        with (
            BatchReport(len(lines), as_json=as_json) as report,
            closing(_generate(pool, [requests[line] for line in left], outputs.preview)) as outcomes,
        ):
            for index, outcome in outcomes:
                line, request = left[index], requests[left[index]]
                try:
                    if isinstance(outcome, Failed):
                        raise outcome.error
                    saved = request.save(outcome)
                    paths = [Path(image["path"]) for image in saved["images"] if image["path"] is not None]
                    journal.add(line.number, request.digest, paths)
                except (sdonnx.SdonnxError, MemoryError) as error:
                    report.fail(line, error)
                else:
                    num_done += 1
                    report.finish(line, saved)
    finally:
        journal.close(delete=num_done == len(lines))
        if num_done < len(lines):
            print_note(f"{num_done} of {len(lines)} requests are done; the same command goes on with the others")


def _line_request(pool: Pool, path: Path, line: Line, fields: dict[str, Any], outputs: OutputPaths) -> RemoteRequest:
    return RemoteRequest(lambda: {**fields, **parse_line(line, path)}, number_outputs(outputs, path, line), pool)


def _is_done(journal: Journal, line: Line, request: RemoteRequest) -> bool:
    """Whether a line was done before, and is still the same request."""
    if line.number not in journal:
        return False
    try:
        request.prepare()
    except (sdonnx.SdonnxError, MemoryError):
        return False
    return journal.is_done(line.number, request.digest)


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
