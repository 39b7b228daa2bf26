"""Requests that other processes carry out: the files that they are saved to, and batches of them that go on."""

import base64
import hashlib
import io
import json
import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import typer
from PIL.Image import Image
from sdonnx_runtime.images.preprocess import open_image
from sdonnx_runtime.outputs.atomic import write_file
from sdonnx_runtime.outputs.metadata import save_grid
from sdonnx_runtime.request import CONTROL_FIELDS, PACKAGE_FIELDS, Request
from sdonnx_runtime.validation import check_fields, check_names

import sdonnx
from sdonnx.cli.batch import BatchReport, Line, batch_outputs, number_outputs, parse_line
from sdonnx.cli.console import print_note
from sdonnx.cli.generate import OutputPaths
from sdonnx.cli.journal import Journal
from sdonnx.cli.parsing import check_outputs, grid_path, is_url, output_paths


class DistributedRequest:
    """A request, the files that it is saved to, and the seed that it keeps wherever it is carried out.

    Args:
        read: reads the fields of `Request`.
        outputs: the files.
    """

    def __init__(self, read: Callable[[], dict[str, Any]], outputs: OutputPaths) -> None:
        self._read, self._outputs = read, outputs
        self._seed = secrets.randbits(32)
        self._paths: list[Path] = []
        self._grid: Path | None = None
        self._overwrite = outputs.overwrite and outputs.images is not None
        self.digest = ""
        """Of all that makes its images; another one for another request."""

    def prepare(self) -> dict[str, Any]:
        """Check the request and its outputs, and make what is sent.

        Raises:
            RequestError: the request is invalid, a file name has the wrong suffix, or an output is an input.
            SdonnxError: a path is not writable.
        """
        raise NotImplementedError

    def save(self, outcome: Any) -> dict[str, Any]:
        """Save the images of an outcome, and return what `result_json` is; raises why the request failed."""
        raise NotImplementedError

    def read_fields(self) -> dict[str, Any]:
        """Read the fields, and check their names."""
        fields = self._read()
        check_names(fields)
        return fields

    def check(self, fields: Mapping[str, Any]) -> Request:
        """Check the fields and the outputs; returns the request, with a seed; raises as `prepare` does."""
        request = check_fields(Request(**fields))
        request = replace(request, seed=self._seed) if request.seed is None else request
        self._paths = output_paths(self._outputs.images, request)
        self._grid = grid_path(self._outputs.images, self._paths) if self._outputs.grid else None
        self.check_paths([*self._paths, *([] if self._grid is None else [self._grid])])
        return request

    def check_paths(self, images: list[Path]) -> None:
        """Check that the images can be written."""
        outputs = self._outputs
        check_outputs(images, outputs.preview, outputs.latents, inputs=outputs.inputs, overwrite=self._overwrite)

    def note_digest(self, *made_by: object) -> None:
        """Note the digest of what makes the images, as JSON has it."""
        self.digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()

    @property
    def num_images(self) -> int:
        """How many images it has, once it is prepared."""
        return len(self._paths)

    def save_images(self, pngs: Sequence[bytes | None]) -> tuple[list[str | None], str | None]:
        """Save the images, and their grid; returns the paths or URLs, None for an image that is None.

        Raises:
            SdonnxError: a file can't be written, or these are no images.
        """
        paths = [
            None if png is None else self.save_image(png, path) for png, path in zip(pngs, self._paths, strict=True)
        ]
        saved = [Path(path) for path in paths if path is not None]
        if self._grid is None or not saved:
            return paths, None
        return paths, str(save_grid(saved, self._grid, overwrite=self._overwrite))

    def save_image(self, png: bytes, path: Path) -> str:
        """Save an image; returns its path or URL."""
        open_image(png, name="the image that came", formats=("PNG",))
        return str(write_file(path, lambda stream: stream.write(png), overwrite=self._overwrite))

    def is_saved(self, path: Path) -> bool:
        """Whether there is a file that `save_image` wrote."""
        return path.is_file()


def refuse_options(context: typer.Context, options: Mapping[str, str], where: str) -> None:
    """Refuse the options that were typed and have no effect ``where``; each has what to do instead.

    Raises:
        RequestError: there is one.
    """
    for option, remedy in options.items():
        source = context.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            raise sdonnx.RequestError(f"--{option.replace('_', '-')} has no effect {where}; {remedy}")


def fields_json(fields: Mapping[str, Any], request: Request) -> dict[str, Any]:
    """The fields that are given as JSON data, images as base64 of PNG files, with the values that ``request`` has.

    Raises:
        RequestError: an image can't be encoded.
    """
    return {name: _to_json(name, getattr(request, name)) for name in fields if fields[name] is not None}


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


R = TypeVar("R", bound=DistributedRequest)


def generate_lines(
    path: Path,
    lines: list[Line],
    fields: Mapping[str, Any],
    outputs: OutputPaths,
    make: Callable[[Callable[[], dict[str, Any]], OutputPaths], R],
    generate: Callable[[Sequence[R]], Generator[tuple[int, Any], None, None]],
    *,
    as_json: bool,
) -> None:
    """Generate the images of every line, as `generate_batch` does; lines that were done before are left out.

    Args:
        path: the batch file.
        lines: its lines.
        fields: the fields of `Request`, which a line may replace.
        outputs: the files to write; the line's number is appended to their names.
        make: makes a request of what reads its fields, and of its files.
        generate: generates the images of requests; gives the index of each, and what its ``save`` takes.
        as_json: print each line's result as one line of JSON.

    Raises:
        RequestError: the images' name does not end in .png.
        SdonnxError: a line failed, or nothing is left that could carry out requests.
    """
    outputs = batch_outputs(outputs, lines, path)
    requests = {line: _make(path, line, fields, outputs, make) for line in lines}
    journal = Journal(journal_path(outputs.images or Path(path.name)))
    left = [line for line in lines if not _is_done(journal, line, requests[line])]
    num_done = len(lines) - len(left)
    if num_done:
        print_note(f"{num_done} of {len(lines)} requests were done before; delete {journal.path} to repeat them")
    try:
        with (
            BatchReport(len(lines), as_json=as_json) as report,
            closing(generate([requests[line] for line in left])) as outcomes,
        ):
            for index, outcome in outcomes:
                line, request = left[index], requests[left[index]]
                try:
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


def journal_path(images: Path) -> Path:
    """The journal of images: beside them, or in the working directory if they are at a URL."""
    return (Path(images.name) if is_url(images) else images).with_suffix(".journal")


def _make(
    path: Path,
    line: Line,
    fields: Mapping[str, Any],
    outputs: OutputPaths,
    make: Callable[[Callable[[], dict[str, Any]], OutputPaths], R],
) -> R:
    return make(lambda: {**fields, **parse_line(line, path)}, number_outputs(outputs, path, line))


def _is_done(journal: Journal, line: Line, request: DistributedRequest) -> bool:
    """Whether a line was done before, and is still the same request."""
    if line.number not in journal:
        return False
    try:
        request.prepare()
        return journal.is_done(line.number, request.digest, request.is_saved)
    except (sdonnx.SdonnxError, MemoryError):
        return False
