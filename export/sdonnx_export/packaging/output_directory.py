"""The directory that a package is written to: which ones may be replaced, and how one is replaced at once."""

import os
import stat
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sdonnx_runtime.errors import ExportError, SdonnxError
from sdonnx_runtime.files.json_file import load_json
from sdonnx_runtime.outputs.atomic import describe_errors, is_reserved
from sdonnx_runtime.packages.manifest import MANIFEST
from sdonnx_runtime.storage.staging import open_staging, remove_stale, replace_directory

_INDEX = "model_index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".gguf", ".pt", ".pth")
_FOLDERS = ("scheduler", "tokenizer", "tokenizer_2")
_SMALL_FILES = (".json", ".txt")
"""Suffixes of a package's files in the folders of its components and in these, besides those that it lists."""
_DROPPINGS = (".DS_Store", "Thumbs.db", "desktop.ini")


def default_output(source: str) -> Path:
    """Return the name of a source, without the suffix of a weights file, and ``-onnx``."""
    path = Path(source)
    name = path.name if path.name not in ("", "..") else path.resolve().name
    is_weights = Path(name).suffix.lower() in _WEIGHT_SUFFIXES and not path.is_dir()
    return Path(f"{Path(name).stem if is_weights else name}-onnx")


@contextmanager
def replace_package(output: Path, *, sources: Sequence[str | Path], force: bool) -> Generator[Path, None, None]:
    """Yield a new directory that gets the name ``output`` at the end, or is deleted after a failure.

    A symbolic link stays, and the directory that it names is written.

    Args:
        output: the package's directory.
        sources: what the export reads; none of it is ever replaced.
        force: whether a package at ``output`` is replaced.

    Raises:
        ExportError: ``output`` can't be written, must not be replaced, or is being written by another process.
    """
    target, made = Path(os.path.realpath(output)), list[Path]()
    try:
        with describe_errors(output, ExportError):
            _check_target(output, target, sources, force=force)
            made = _make_directories(target.parent)
            remove_stale(target.parent)
            with open_staging(target.parent, target=target.name) as folder:
                new = folder / target.name
                new.mkdir()
                with _describe_read_errors(sources):
                    yield new
                _check_target(output, target, sources, force=force)  # what is there can have changed meanwhile
                if target.exists():
                    new.chmod(stat.S_IMODE(target.stat().st_mode))
                replace_directory(new, target)
    except SdonnxError as error:
        raise error if isinstance(error, ExportError) else ExportError(str(error)) from None
    finally:
        with suppress(OSError):
            for directory in reversed(made):
                directory.rmdir()  # fails if it isn't empty


@contextmanager
def _describe_read_errors(sources: Sequence[str | Path]) -> Generator[None, None, None]:
    """Turn an OSError about a file of a source into one that says so."""
    try:
        yield
    except OSError as error:
        path = error.filename
        is_copied = error.filename2 is not None  # where the fault can be the copy's
        if isinstance(path, str) and not is_copied and any(Path(path).is_relative_to(source) for source in sources):
            raise ExportError(f"{path} can't be read: {error.strerror}; check the file and its disk") from None
        raise


def _check_target(output: Path, target: Path, sources: Sequence[str | Path], *, force: bool) -> None:
    """Raise ExportError unless a directory may be made at ``target``, or replaced there."""
    reason = None
    if is_reserved(target.name):
        reason = "has a name that Windows reserves"
    elif target.is_symlink():
        reason = "is a symbolic link to itself"
    elif target.exists():
        reason = _overlap(target, sources) or _foreign_entry(target)
        reason = "is read-only" if reason is None and not os.access(target, os.W_OK) else reason
        if reason is None and not force:
            raise ExportError(f"{output} exists; choose another directory with -o, or replace it with --force")
    if reason is not None:
        raise ExportError(f"{output} {reason}; choose another directory with -o")


def _overlap(target: Path, sources: Sequence[str | Path]) -> str | None:
    """Say why a directory must not be replaced, whatever it holds."""
    for path in (source for source in map(Path, sources) if source.exists()):
        contains, lies_inside = _is_within(path, target), _is_within(target, path)
        if contains or lies_inside:
            relation = "is the same as" if contains and lies_inside else "contains" if contains else "lies inside"
            return f"{relation} {path}, which the export reads"
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 — Path's raises an error where there is none
    for path, name in ((Path(), "the working directory"), (home, "your home directory")):
        if path.exists() and _is_within(path, target):
            return f"is or contains {name}"
    return "is a mount point" if os.path.ismount(target) else None


def _is_within(path: Path, directory: Path) -> bool:
    """Whether an existing path is a directory or lies in it, whatever its spelling."""
    real = path.resolve()
    return any(parent.samefile(directory) for parent in (real, *real.parents))


def _foreign_entry(directory: Path) -> str | None:
    """Say what makes a directory other than a package and nothing else; None if it is one, or is empty."""
    if not directory.is_dir():
        return "is not a directory"
    if not any(directory.iterdir()):
        return None
    manifest, index = _read_json(directory / MANIFEST), _read_json(directory / _INDEX)
    components, source = manifest.get("components"), manifest.get("source")
    if not isinstance(components, dict) or not isinstance(source, dict) or "exporter" not in source:
        return f"is not a package: its {MANIFEST} is missing or damaged, so --force does not replace it"
    files = (each.get("files") for each in components.values() if isinstance(each, dict))
    listed = {name for each in files if isinstance(each, dict) for name in each}
    for root, folders, files in os.walk(directory):
        for path in (Path(root, name) for name in (*files, *folders)):
            place = path.relative_to(directory)
            if path.is_dir() and not path.is_symlink():
                continue
            is_small = place.suffix in _SMALL_FILES and place.parent.as_posix() in {*components, *index, *_FOLDERS}
            if place.as_posix() not in {MANIFEST, _INDEX, *listed} and not is_small and not _is_negligible(path):
                return f"holds {place}, which is no part of a package, so --force does not replace it"
    return None


def _is_negligible(path: Path) -> bool:
    """Whether a file is empty, or one that file managers make."""
    return path.name in _DROPPINGS or (stat.S_ISREG(path.lstat().st_mode) and path.stat().st_size == 0)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = load_json(path)
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _make_directories(directory: Path) -> list[Path]:
    """Make a directory and its parents, and return those that were made, from the outermost."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()][::-1]
    directory.mkdir(parents=True, exist_ok=True)
    return missing
