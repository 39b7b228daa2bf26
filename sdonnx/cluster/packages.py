"""The packages and files that a pipeline opens: they have to be the same on every node."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sdonnx_models import bundled
from sdonnx_runtime.packages.package import Package

import sdonnx
from sdonnx.loading import find_model

_SMALL = 1 << 20
"""Bytes up to which the files of a folder are compared by their content; larger ones by their size."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A package or file, as it is on the machine that asks."""

    name: str
    """What `find_model` takes, the path of a file, or a folder's; absolute where it is a path."""
    digest: str
    """SHA-256, hexadecimal."""
    is_package: bool

    def check(self, node: str) -> None:
        """Check that a node has the same; raises PackageError if it doesn't."""
        try:
            found = _digest(self.name, is_package=self.is_package)
        except (sdonnx.SdonnxError, OSError) as error:
            reason = str(error) if isinstance(error, sdonnx.SdonnxError) else error.strerror
            raise sdonnx.PackageError(f"node {node}: {self.name} can't be opened: {reason}") from None
        if found != self.digest:
            kind = "package" if self.is_package else "file"
            raise sdonnx.PackageError(
                f"node {node}: {self.name} differs from the {kind} of this machine (SHA-256 {found[:10]}…, expected "
                f"{self.digest[:10]}…); copy it there"
            )


def portable_name(model: str | Path) -> str:
    """The name of a package for `find_model` on every node: an absolute path, a bundled name or a Hub id."""
    name = str(model)
    return name if name in bundled() or not Path(name).exists() else str(Path(name).absolute())


def package_source(model: str | Path) -> Source:
    """Describe a package; raises PackageError if there is none."""
    name = portable_name(model)
    return Source(name=name, digest=_digest(name, is_package=True), is_package=True)


def file_source(path: str | Path) -> Source:
    """Describe a file or folder; raises RequestError if there is none."""
    name = str(Path(path).absolute())
    try:
        return Source(name=name, digest=_digest(name, is_package=False), is_package=False)
    except OSError as error:
        raise sdonnx.RequestError(f"{path} can't be read ({error.strerror}); check its spelling") from None


def _digest(name: str, *, is_package: bool) -> str:
    if is_package:
        return Package.open(find_model(name)).digest
    path, digest = Path(name), hashlib.sha256()
    if not path.is_dir():
        return _file_digest(path)
    for each in sorted(file for file in path.rglob("*") if file.is_file()):
        size = each.stat().st_size
        content = _file_digest(each) if size <= _SMALL else ""
        digest.update(f"{each.relative_to(path).as_posix()} {size} {content}\n".encode())
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sources(sources: Iterable[Source], node: str) -> None:
    """Check that a node has all of them; raises PackageError that names the node and the first that differs."""
    for each in sources:
        each.check(node)
