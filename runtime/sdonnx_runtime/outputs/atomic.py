"""Files that appear whole or not at all."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sdonnx_runtime.errors import SdonnxError


def check_writable(path: Path) -> None:
    """Finds out before the work whether a picture can be written to ``path``.

    Raises:
        SdonnxError: its directory is missing or read-only, or ``path`` is a directory.
    """
    if path.is_dir():
        raise SdonnxError(f"{path} is a directory; give the name of a file such as {path / 'picture.png'}")
    with _written_beside(path):
        pass


@contextmanager
def replacing(path: Path) -> Generator[IO[bytes], None, None]:
    """A stream to write ``path`` anew with: it takes the place of what was there once it is whole.

    Raises:
        SdonnxError: the place can't be written to.
    """
    with _written_beside(path) as (stream, temporary):
        yield stream
        stream.flush()
        stream.close()
        temporary.replace(path)


@contextmanager
def _written_beside(path: Path) -> Generator[tuple[IO[bytes], Path], None, None]:
    """A temporary file in the directory of ``path``, gone at the end unless it was renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as stream:
                yield stream, temporary
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise SdonnxError(f"{path} can't be written: {error.strerror or error}; choose another place with -o") from None
