"""Images at a URL that fsspec knows: S3, Google Cloud Storage, SFTP and others."""

import secrets
from pathlib import Path
from typing import Any, cast

import fsspec  # pyright: ignore[reportMissingTypeStubs]

import sdonnx

_WHOLE = ("abfs", "abfss", "adl", "az", "gcs", "gs", "memory", "oci", "s3", "s3a")
"""Where a file that is put appears whole or not at all."""


def url_of(path: Path) -> str:
    """The URL that a path was."""
    scheme, _, rest = path.as_posix().partition(":/")
    return f"{scheme}://{'/' if scheme in ('file', 'local') else ''}{rest}"


def write_url(path: Path, content: bytes) -> str:
    """Write a file at a URL, whole or not at all; returns the URL.

    Raises:
        RequestError: fsspec does not know the URL's scheme, or lacks a package for it.
        SdonnxError: the file can't be written.
    """
    filesystem, key = _open(path)
    try:
        filesystem.makedirs(key.rpartition("/")[0] or "/", exist_ok=True)
        if url_of(path).partition(":")[0].lower() in _WHOLE:
            filesystem.pipe_file(key, content)
        else:
            temporary = f"{key}.{secrets.token_hex(4)}.part"
            filesystem.pipe_file(temporary, content)
            filesystem.mv(temporary, key)
    except Exception as error:
        raise sdonnx.SdonnxError(f"{url_of(path)} can't be written: {_one_line(error)}") from None
    return url_of(path)


def check_url(path: Path) -> None:
    """Check that fsspec knows a URL; raises as `write_url` does."""
    _open(path)


def exists_at(path: Path) -> bool:
    """Whether there is a file at a URL; raises as `write_url` does."""
    filesystem, key = _open(path)
    try:
        return bool(filesystem.isfile(key))
    except Exception as error:
        raise sdonnx.SdonnxError(f"{url_of(path)} can't be read: {_one_line(error)}") from None


def _open(path: Path) -> tuple[Any, str]:
    url = url_of(path)
    try:
        filesystem, key = cast("tuple[Any, str]", cast("Any", fsspec).core.url_to_fs(url))
    except ImportError as error:
        raise sdonnx.RequestError(f"{url}: {_one_line(error)}") from None
    except ValueError as error:
        raise sdonnx.RequestError(f"{url} is no URL for fsspec: {_one_line(error)}; give another -o") from None
    except Exception as error:
        raise sdonnx.SdonnxError(f"{url} can't be opened: {_one_line(error)}") from None
    return filesystem, key


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
