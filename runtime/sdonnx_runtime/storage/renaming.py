"""Renames that the standard library lacks: exchange two names, take a name only if it is free, wait for Windows."""

import ctypes
import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
"""Errors of a system or file system without such a rename."""

_IN_USE = (5, 32, 33)
"""Windows' error codes for a file that another program has open: access denied, sharing and lock violation."""

_PATIENCE, _PAUSE = 2.0, 0.05
"""Seconds to try again for: virus scanners and search indexes open new files for a moment. And between two tries."""


def exchange(first: Path, second: Path) -> bool:
    """Exchange two existing files or directories in one step; False where the system can't."""
    return _rename_with_flag("exchange", first, second)


def rename_to_free(source: Path, target: Path) -> None:
    """Rename a file or directory to a name that nothing has, also if other processes try the same.

    Raises:
        FileExistsError: the name is taken.
        OSError: the rename failed.
    """
    if sys.platform == "win32":
        retry_while_in_use(lambda: source.rename(target))  # which never replaces there
    elif not _rename_with_flag("no replace", source, target):
        _take_name(source, target)


def replace(source: Path, target: Path) -> None:
    """Rename a file or directory over what a file system lets it replace, as `os.replace`.

    Raises:
        OSError: the rename failed, on Windows for two seconds.
    """
    retry_while_in_use(lambda: source.replace(target))


def retry_while_in_use(action: Callable[[], object]) -> None:
    """Call ``action`` again for a while if Windows says that another program has the file open."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            action()
            return
        except PermissionError as error:
            if not is_in_use(error) or time.monotonic() > end:
                raise
        time.sleep(_PAUSE)


def is_in_use(error: OSError) -> bool:
    """Whether Windows refused because another program has the file open."""
    return getattr(error, "winerror", None) in _IN_USE


def _take_name(source: Path, target: Path) -> None:
    """Rename to a free name by a hard link, or in two steps for directories and where there are no links."""
    if not source.is_dir():
        try:
            target.hardlink_to(source)
        except FileExistsError:
            raise
        except OSError:
            target.touch(exist_ok=False)
        else:
            source.unlink()
            return
    else:
        target.mkdir()
    source.replace(target)


_AT_FDCWD = -100
_CALLS: dict[str, tuple[str, dict[str, int]]] = {
    "linux": ("renameat2", {"no replace": 1, "exchange": 2}),
    "darwin": ("renamex_np", {"exchange": 2, "no replace": 4}),
}
"""By platform, the C function and its flags; renameat2 takes a directory before each path."""


def _rename_with_flag(flag: str, source: Path, target: Path) -> bool:
    """Rename with a flag; False where the system or the file system doesn't have it."""
    name, flags = _CALLS.get(sys.platform, ("", {}))
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    if function is None:
        return False
    first, second = (ctypes.c_char_p(os.fsencode(path)) for path in (source, target))
    directory = (ctypes.c_int(_AT_FDCWD),) if name == "renameat2" else ()
    if function(*directory, first, *directory, second, ctypes.c_uint(flags[flag])) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
