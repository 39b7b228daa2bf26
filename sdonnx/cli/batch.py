"""Batch files: many requests with one package, one on each line."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from sdonnx_runtime.images.preprocess import open_image
from sdonnx_runtime.request import IMAGE_FIELDS

import sdonnx
from sdonnx.cli.console import OUT_OF_MEMORY, print_json, print_note, print_results, refusal, result_json
from sdonnx.cli.generate import Margins, OutputPaths, generate
from sdonnx.cli.signals import SIGNALS


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a batch file that is not empty."""

    number: int
    """Counted from 1."""
    text: str
    """Without leading and trailing white space."""


def read_batch(path: Path) -> list[Line]:
    """Read the lines of a batch file, UTF-8.

    Raises:
        RequestError: the file can't be read, is empty, or does not end in .txt or .jsonl.
    """
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise sdonnx.RequestError(f"{path} is not a batch file; give a .txt of prompts, or a .jsonl of requests")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8; save it as UTF-8"
        raise sdonnx.RequestError(f"{path} can't be read: {reason}") from None
    batch = [Line(number=number, text=line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not batch:
        raise sdonnx.RequestError(f"{path} is empty; give one prompt or request on each line")
    return batch


def generate_batch(
    pipe: sdonnx.Pipeline,
    path: Path,
    lines: list[Line],
    fields: dict[str, Any],
    outputs: OutputPaths,
    margins: Margins | None,
    *,
    as_json: bool,
) -> None:
    """Generate the images of every line; failures are reported at the end, also after Ctrl-C.

    Args:
        pipe: the pipeline.
        path: the batch file.
        lines: its lines.
        fields: the fields of `Request` that a line may replace.
        outputs: the files to write; the line's number is appended to their names.
        margins: outpaint each request's image by these pixels.
        as_json: print each line's result as one line of JSON.

    Raises:
        RequestError: the images' name does not end in .png.
        SdonnxError: a line failed.
    """
    outputs = batch_outputs(outputs, lines, path)
    with BatchReport(len(lines), as_json=as_json) as report:
        for line in lines:
            try:
                merged = {**fields, **parse_line(line, path)}
                generated = generate(pipe, merged, number_outputs(outputs, path, line), margins)
            except (sdonnx.SdonnxError, MemoryError) as error:
                SIGNALS.raise_if_received()  # a library can turn an interrupt of its import into another error
                report.fail(line, error)
            else:
                report.finish(line, result_json(*generated))


class BatchReport:
    """What became of the lines: results are printed at once; failures are reported at the end, also after Ctrl-C."""

    def __init__(self, num_lines: int, *, as_json: bool) -> None:
        self._num_lines, self._as_json = num_lines, as_json
        self._failed: dict[int, str] = {}

    def finish(self, line: Line, report: Mapping[str, Any]) -> None:
        """Print the `result_json` of a line, which failed if an image of it is refused."""
        if (reason := refusal(report)) is not None:
            self._failed[line.number] = reason
        if self._as_json:
            print_json({"line": line.number, **report}, indent=None)
        else:
            print_results(report)

    def fail(self, line: Line, error: sdonnx.SdonnxError | MemoryError) -> None:
        """Note why a line failed."""
        self._failed[line.number] = str(error) or OUT_OF_MEMORY
        if self._as_json:
            print_json({"line": line.number, "error": self._failed[line.number]}, indent=None)

    def __enter__(self) -> "BatchReport":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Print the failures; raises SdonnxError if there are some."""
        for number, reason in sorted(self._failed.items()):
            print_note(f"line {number}: {reason}")
        if self._failed and kind is None:
            raise sdonnx.SdonnxError(f"{len(self._failed)} of {self._num_lines} requests failed")


def batch_outputs(outputs: OutputPaths, lines: list[Line], path: Path) -> OutputPaths:
    """Check the images' name, and add the images that any line reads to the files that are never replaced.

    Raises:
        RequestError: the images' name does not end in .png.
    """
    if outputs.images is not None and outputs.images.suffix.lower() != ".png":
        raise sdonnx.RequestError(f"the images are named {outputs.images.name}; give a name that ends in .png")
    return replace(outputs, inputs=(*outputs.inputs, *_image_files(lines, path)))


def parse_line(line: Line, path: Path) -> dict[str, Any]:
    """Parse a line to fields of `Request`; image files are relative to the batch file."""
    if path.suffix.lower() == ".txt":
        return {"prompt": line.text}
    values = _parse_object(line)
    if values is None:
        raise sdonnx.RequestError(f"not a JSON object; give one such as {_EXAMPLE}")
    if "prompt" not in values:
        raise sdonnx.RequestError(f"prompt is missing; give one such as {_EXAMPLE}")
    return {name: _parse_value(name, value, path) for name, value in values.items()}


_EXAMPLE = '{"prompt": "a cat", "seed": 7}'


def _parse_object(line: Line) -> dict[str, Any] | None:
    """Parse a JSON object; None if it is none."""
    try:
        data = json.loads(line.text)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", data) if isinstance(data, dict) else None


def _image_files(lines: list[Line], path: Path) -> list[Path]:
    """Return the existing files of images that any line reads, so that no other line replaces them."""
    if path.suffix.lower() == ".txt":
        return []
    values = [value for line in lines for name, value in (_parse_object(line) or {}).items() if name in IMAGE_FIELDS]
    files = (path.parent / value for value in values if isinstance(value, str) and "\0" not in value)
    return [file for file in dict.fromkeys(files) if os.path.exists(file)]  # noqa: PTH110 — Path's raises some errors


def _parse_value(name: str, value: Any, path: Path) -> Any:
    if name in IMAGE_FIELDS and value is not None:
        if not isinstance(value, str):
            raise sdonnx.RequestError(f"{name} is {value!r}; give the path of an image file")
        return open_image(path.parent / value)
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


def number_outputs(outputs: OutputPaths, path: Path, line: Line) -> OutputPaths:
    """Append the line's number to the names of the outputs."""

    def numbered(name: Path) -> Path:
        return name.with_name(f"{name.stem}-{line.number:04}{name.suffix}")

    images = numbered(Path(f"{path.stem}.png") if outputs.images is None else outputs.images)
    latents = None if outputs.latents is None else numbered(outputs.latents)
    return replace(outputs, images=images, overwrite=outputs.images is not None, latents=latents)
