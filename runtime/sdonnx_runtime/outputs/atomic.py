"""Files that appear whole or not at all."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sdonnx_runtime.errors import SdonnxError


def check_writable(path: Path) -> None:
    """Check that a file can be written.

    Raises:
        SdonnxError: its directory is missing or read-only, or ``path`` is a directory.
    """
    if path.is_dir():
        raise SdonnxError(f"{path} is a directory; give the name of a file such as {path / 'image.png'}")
    with _open_temporary(path):
        pass


@contextmanager
def replace_file(path: Path) -> Generator[IO[bytes], None, None]:
    """Open a stream whose content replaces the file at the end of the context, if it ends without an error.

    Raises:
        SdonnxError: the file can't be written.
    """
    with _open_temporary(path) as (stream, temporary):
        yield stream
        stream.close()
        temporary.replace(path)


@contextmanager
def _open_temporary(path: Path) -> Generator[tuple[IO[bytes], Path], None, None]:
    """Open a temporary file in the directory of ``path``; it is deleted at the end unless it was renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as stream:
                yield stream, temporary
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise SdonnxError(f"{path} can't be written: {error.strerror or error}; choose another path with -o") from None
