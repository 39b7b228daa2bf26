"""Many pictures with one package: the lines of a file, each a request."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from sdonnx_runtime.images.preprocess import open_image
from sdonnx_runtime.request import IMAGE_FIELDS

import sdonnx
from sdonnx.cli.console import err, print_json, print_results, result_json
from sdonnx.cli.generate import Margins, OutputPaths, generate
from sdonnx.cli.parsing import next_free_path


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line that is not empty."""

    number: int
    """From 1."""
    text: str
    """Without the space around it."""


def read_batch(path: Path) -> list[Line]:
    """The lines of a batch file, UTF-8.

    Raises:
        RequestError: it can't be read, has another suffix than .txt and .jsonl, or nothing in it.
    """
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise sdonnx.RequestError(f"{path} is no batch file; give a .txt of prompts, or a .jsonl of requests")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not in UTF-8"
        raise sdonnx.RequestError(f"{path} can't be read: {reason}") from None
    found = [Line(number=number, text=line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise sdonnx.RequestError(f"{path} is empty; give one prompt or request on each line")
    return found


def make_batch(
    pipe: sdonnx.Pipeline,
    path: Path,
    lines: list[Line],
    fields: dict[str, Any],
    outputs: OutputPaths,
    margins: Margins | None,
    *,
    as_json: bool,
) -> None:
    """Makes every line's pictures; what fails is told of at the end, also of one that is interrupted.

    Args:
        pipe: the package.
        path: the batch file.
        lines: what is in it.
        fields: a request's, where a line has none of its own.
        outputs: where to; the number of the line is added.
        margins: for outpainting.
        as_json: print what becomes of each line as one line of JSON.

    Raises:
        RequestError: the pictures' name is none.
        SdonnxError: a line failed.
    """
    if outputs.pictures is not None and outputs.pictures.suffix.lower() != ".png":
        raise sdonnx.RequestError(f"the pictures are named {outputs.pictures.name}; give a name that ends in .png")
    failed: dict[int, str] = {}
    try:
        for line in lines:
            try:
                result, paths = generate(
                    pipe, {**fields, **_fields(line, path)}, _of_line(outputs, path, line), margins
                )
            except (sdonnx.SdonnxError, MemoryError) as error:
                failed[line.number] = str(error) or "there is too little memory for this; choose a smaller size"
                if as_json:
                    print_json({"line": line.number, "error": failed[line.number]}, indent=None)
                continue
            if as_json:
                print_json({"line": line.number, **result_json(result, paths)}, indent=None)
            else:
                print_results(result, paths)
    finally:
        for number, reason in failed.items():
            err.print(f"line {number}: {reason}", highlight=False, soft_wrap=True)
    if failed:
        raise sdonnx.SdonnxError(f"of {len(lines)} lines of {path}, {len(failed)} were not made")


def _fields(line: Line, path: Path) -> dict[str, Any]:
    """The request's fields that a line gives; pictures are files, beside the batch file where they are relative."""
    if path.suffix.lower() == ".txt":
        return {"prompt": line.text}
    try:
        given = json.loads(line.text)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise sdonnx.RequestError('it is no JSON object; give one such as {"prompt": "a cat", "seed": 7}')
    found = cast("dict[str, Any]", given)
    if "prompt" not in found:
        raise sdonnx.RequestError('it has no prompt; give one such as {"prompt": "a cat", "seed": 7}')
    return {name: _value(name, value, path) for name, value in found.items()}


def _value(name: str, value: Any, path: Path) -> Any:
    if name in IMAGE_FIELDS and value is not None:
        if not isinstance(value, str):
            raise sdonnx.RequestError(f"{name} is {value!r}; give the name of a picture's file")
        return open_image(path.parent / value)
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


def _of_line(outputs: OutputPaths, path: Path, line: Line) -> OutputPaths:
    """Names of their own: with the line's number."""

    def numbered(name: Path) -> Path:
        return name.with_name(f"{name.stem}-{line.number:04}{name.suffix}")

    pictures = (
        next_free_path(numbered(Path(f"{path.stem}.png"))) if outputs.pictures is None else numbered(outputs.pictures)
    )
    latents = None if outputs.latents is None else numbered(outputs.latents)
    return replace(outputs, pictures=pictures, latents=latents)
