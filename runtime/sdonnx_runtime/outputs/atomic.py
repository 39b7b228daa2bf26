"""Files that appear whole or not at all."""

import errno
import io
import os
import re
import stat
import sys
import unicodedata
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO

from sdonnx_runtime.errors import SdonnxError
from sdonnx_runtime.storage.renaming import is_in_use, rename_to_free, replace
from sdonnx_runtime.storage.staging import open_staging, remove_stale


def write_file(path: Path, write: Callable[[IO[bytes]], object], *, overwrite: bool = True) -> Path:
    """Write a file with ``write(stream)``, and return its path.

    A symbolic link stays, and the file that it names is written. A file that is replaced keeps its mode; its other
    hard links keep the old content. Pipes and devices are written as they are.

    Args:
        path: the file.
        write: is given a stream; if it raises, nothing is written.
        overwrite: replace the file if it exists; otherwise a number that makes its name free is appended.

    Raises:
        SdonnxError: the file can't be written.
    """
    with describe_errors(path):
        if is_stream(path):
            content = io.BytesIO()
            write(content)
            with _open_stream(path) as stream:
                stream.write(content.getbuffer())
            return path
        target = _follow_links(path) if overwrite else path
        with open_staging(target.parent) as folder:
            temporary = folder / target.name
            with temporary.open("wb") as stream:
                write(stream)
            if not overwrite:
                return _rename_to_first_free(temporary, path)
            _copy_mode(target, temporary)
            replace(temporary, target)
            return path


def check_writable(path: Path, *, overwrite: bool = True) -> None:
    """Check that `write_file` can write a file, and delete what killed processes left in its directory.

    Raises:
        SdonnxError: its directory is missing or read-only, its name is not possible there, or ``path`` is a directory
            or a read-only file.
    """
    with describe_errors(path):
        target = _follow_links(path) if overwrite else path
    if target.is_dir():
        raise SdonnxError(f"{path} is a directory; give the name of a file such as {path / 'image.png'}")
    if is_reserved(target.name):
        raise SdonnxError(f"{path} can't be written: Windows reserves the name {target.name}; choose another name")
    if overwrite and path.exists() and not os.access(path, os.W_OK):
        raise SdonnxError(f"{path} can't be written: it is read-only; choose another path")
    if is_stream(path):
        return
    if overwrite and path.exists() and not target.is_file():
        raise SdonnxError(f"{path} can't be written: it is not a file; choose another path")
    with describe_errors(path):
        remove_stale(target.parent)
        with open_staging(target.parent) as folder:
            (folder / target.name).touch()


def is_stream(path: Path) -> bool:
    """Whether a path is a pipe, a character device, or an open file such as ``/dev/stdout``."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or _file_descriptor(path) is not None


def is_reserved(name: str, *, windows: bool = os.name == "nt") -> bool:
    """Whether Windows takes a file's name for a device or a stream, or changes it."""
    return windows and (name != name.rstrip(". ") or ":" in name or _DEVICES.fullmatch(name) is not None)


_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)


def comparable(path: Path) -> str:
    """Return text that is equal for paths of the same file, also if the file does not exist."""
    text = os.path.realpath(path)
    return unicodedata.normalize("NFC", text).casefold() if sys.platform in ("darwin", "win32") else text


@contextmanager
def describe_errors(path: Path, error_type: type[SdonnxError] = SdonnxError) -> Generator[None, None, None]:
    """Turn an OSError into one that names ``path`` and the remedy."""
    try:
        yield
    except OSError as error:
        if is_in_use(error):
            reason, remedy = "it is in use by another program", "close that, or choose another path"
        else:
            reason, remedy = error.strerror or str(error), _REMEDIES.get(error.errno or 0, "choose another path")
        raise error_type(f"{path} can't be written: {reason}; {remedy}") from None


_FREE_SPACE = "free some space, or choose another path"
_REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: _FREE_SPACE,
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "make its directory first, or choose another path",
}


def _follow_links(path: Path) -> Path:
    """Return the file that a path names, which need not exist."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return target


def _rename_to_first_free(temporary: Path, path: Path) -> Path:
    """Rename to ``path``, or to its name with the first number that is free; others may do the same at once."""
    free, number = path, count(2)
    while True:
        try:
            rename_to_free(temporary, free)
        except FileExistsError:
            free = path.with_name(f"{path.stem}-{next(number)}{path.suffix}")
        else:
            return free


def _copy_mode(target: Path, temporary: Path) -> None:
    """Give a file the owner and the mode of the one that it replaces."""
    with suppress(OSError):
        old = target.stat()
        if hasattr(os, "chown"):
            with suppress(OSError):
                os.chown(temporary, old.st_uid, old.st_gid)
        temporary.chmod(stat.S_IMODE(old.st_mode))


def _open_stream(path: Path) -> IO[bytes]:
    """Open a pipe or device; of an open file such as ``/dev/stdout``, a copy of its descriptor, which has its place."""
    descriptor = _file_descriptor(path)
    return path.open("wb") if descriptor is None else os.fdopen(os.dup(descriptor), "wb")


def _file_descriptor(path: Path) -> int | None:
    """Return the number of an open file of this process from ``/dev/stdout``, ``/dev/fd/1`` or ``/proc/self/fd/1``."""
    while path.is_symlink() and not _is_descriptor_folder(path.parent):
        path = path.parent / path.readlink()
    return int(path.name) if path.name.isdecimal() and _is_descriptor_folder(path.parent) else None


def _is_descriptor_folder(folder: Path) -> bool:
    return os.path.realpath(folder) in ("/dev/fd", f"/proc/{os.getpid()}/fd")
