"""Wildcard files: text files in a folder, one option on each line."""

import os.path
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.text.templates import (
    Options,
    draw,
    is_template,
    parse_line,
    parse_template,
    wildcard_names,
)

_SUFFIX = ".txt"

_MAX_BYTES = 16 << 20
"""Of one file."""

_MAX_TOTAL = 64 << 20
"""Bytes of all files that a prompt names."""

_MAX_LISTED = 10_000
"""Files among which near names are looked for."""


class Wildcards:
    """The files of a folder and its subfolders, each read when it is first named; None is no folder.

    Files are UTF-8: empty lines and those that begin with ``#`` are skipped, lines may have alternatives, wildcards
    and, in front, a weight: ``2::red``. Nothing outside of the folder is read, whatever links in it point to.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._options: dict[str, Options] = {}
        self._size = 0

    def check(self, names: Iterable[str]) -> None:
        """Read the files of these wildcards and of those that they name.

        Raises:
            RequestError: a file is missing, empty or can't be read, a name leaves the folder, or a wildcard refers to
                itself.
        """
        path: dict[str, None] = {}
        done: set[str] = set()
        stack: list[tuple[str, Iterator[str]]] = [("", iter(names))]
        while stack:
            owner, others = stack[-1]
            name = next(others, None)
            if name is None:
                stack.pop()
                path.pop(owner, None)
                done.add(owner)
            elif name in path:
                cycle = " > ".join([*path, name][[*path].index(name) :])
                raise RequestError(
                    f"the wildcard __{name}__ refers to itself: {cycle[:300]}; change one of these files"
                )
            elif name not in done:
                path[name] = None
                stack.append((name, iter(self._names_in(name, owner))))

    def options(self, name: str) -> Options:
        """The lines of a wildcard's file; raises as `check` does."""
        return self._read(name, "")

    def _names_in(self, name: str, owner: str) -> list[str]:
        options = self._read(name, owner).options
        return list(dict.fromkeys(found for each in options for found in wildcard_names(str(each.source))))

    def _read(self, name: str, owner: str) -> Options:
        if name not in self._options:
            path = self._find(name, owner)
            lines = (line.strip() for line in self._text(path).split("\n"))
            options = tuple(parse_line(line) for line in lines if line and not line.startswith("#"))
            if not options:
                raise RequestError(f"the wildcard file {path} has no lines; write one option on each")
            self._options[name] = Options(options=options)
        return self._options[name]

    def _find(self, name: str, owner: str) -> Path:
        """Find the file of a wildcard, which the prompt or the wildcard ``owner`` names."""
        where = f"the wildcard __{owner}__" if owner else "the prompt"
        if self._folder is None:
            raise RequestError(
                f"{where} names the wildcard __{name}__, which requires a folder of wildcard files; give it with "
                "--wildcards (wildcard_folder=), or write \\__ for the signs themselves"
            )
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise RequestError(
                f"{where} names __{name}__, which is no path in the folder of wildcards; name a file there"
            )
        path = self._folder / f"{name}{_SUFFIX}"
        if not os.path.isfile(path):  # noqa: PTH113 — Path's raises some errors
            near = get_close_matches(name, self._names(), n=3)
            remedy = (
                f"did you mean {' or '.join(f'__{each}__' for each in near)}?" if near else "use a file's name there"
            )
            raise RequestError(f"{where} names __{name}__, and {self._folder} has no {name}{_SUFFIX}; {remedy}")
        if not path.resolve().is_relative_to(self._folder.resolve()):
            raise RequestError(f"the wildcard file {path} is a link out of the folder; copy the file into it")
        return path

    def _names(self) -> list[str]:
        assert self._folder is not None  # noqa: S101 — for the type checker
        found = islice(self._folder.rglob(f"*{_SUFFIX}"), _MAX_LISTED)
        return [path.relative_to(self._folder).with_suffix("").as_posix() for path in found]

    def _text(self, path: Path) -> str:
        try:
            with path.open("rb") as stream:
                data = stream.read(_MAX_BYTES + 1)
        except OSError as error:
            raise RequestError(f"the wildcard file {path} can't be read: {error.strerror}; check its rights") from None
        self._size += len(data)
        if len(data) > _MAX_BYTES or self._size > _MAX_TOTAL:
            limit, what = (_MAX_BYTES, "the file") if len(data) > _MAX_BYTES else (_MAX_TOTAL, "all files together")
            raise RequestError(f"the wildcard file {path} is too large; {what} may have {limit >> 20} MB")
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise RequestError(f"the wildcard file {path} is not UTF-8; save it as UTF-8") from None


def draw_texts(
    texts: Mapping[str, str], syntax: str, folder: Path | None, seeds: Iterable[int]
) -> dict[int, dict[str, str]]:
    """Draw texts by each seed, as `draw` does with their names as streams; empty if there is nothing to draw.

    Raises:
        RequestError: as `draw` and `Wildcards.check` do.
    """
    if syntax == "plain" or not any(map(is_template, texts.values())):
        return {}
    templates, wildcards = {name: parse_template(text) for name, text in texts.items()}, Wildcards(folder)
    wildcards.check(found for text in texts.values() for found in wildcard_names(text))
    return {
        seed: {name: draw(each, wildcards, seed=seed, stream=name) for name, each in templates.items()}
        for seed in dict.fromkeys(seeds)
    }
