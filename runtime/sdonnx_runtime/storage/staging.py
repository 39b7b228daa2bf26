"""Staging directories: what is written is made whole in one, next to its target, and then renamed.

A process holds a lock on each of its staging directories, so that others know which belong to dead processes::

    .sdonnx-1f0c…8a.tmp/
        sdonnx.lock     locked while its process lives; holds the name of the target if that is a directory
        new/            what is being written
        old/            what it replaces, while that is deleted
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import unicodedata
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sdonnx_runtime.storage.renaming import exchange, rename_to_free, replace, retry_while_in_use

try:
    import fcntl
except ImportError:
    fcntl = None

try:
    import msvcrt
except ImportError:
    msvcrt = None

_LOCK, _NEW, _OLD = "sdonnx.lock", "new", "old"
_NAME = re.compile(r"\.sdonnx-[0-9a-f]{16}\.tmp")
_LOCKED_BYTE = 1 << 30
"""Windows keeps others from reading a locked byte, so it is one behind the content."""
_ATTEMPTS = 100


class InUseError(OSError):
    """Another process is writing the same directory."""


@contextmanager
def open_staging(parent: Path, *, target: str = "") -> Generator[Path, None, None]:
    """Make a staging directory in ``parent``, yield its folder for what is new, and delete it at the end.

    Args:
        parent: an existing directory.
        target: the name in ``parent`` of a directory that only one process at a time may write; empty if several may.

    Raises:
        InUseError: another process is writing ``target``.
        OSError: the directory can't be made.
    """
    staging, lock = _make_staging(parent, target)
    try:
        (staging / _NEW).mkdir()
        yield staging / _NEW
    finally:
        with lock:
            _delete(staging, lock, target)
        _remaining.pop(staging, None)


def replace_directory(new: Path, target: Path) -> None:
    """Rename a directory in the folder that `open_staging` yielded to ``target``, which may be a directory already.

    Where the system can't exchange two names, this takes two renames; if the process is killed between them,
    `remove_stale` does the second.

    Raises:
        FileExistsError: ``target`` was absent, and something else made it meanwhile.
        OSError: a rename failed; ``target`` is as before.
    """
    if not os.path.lexists(target):
        rename_to_free(new, target)
    elif not exchange(new, target):
        old = new.parent.with_name(_OLD) / new.name
        old.parent.mkdir()
        try:
            replace(target, old)
            replace(new, target)
        except BaseException:
            if not os.path.lexists(target):
                replace(old, target)
            raise


def remove_stale(parent: Path) -> None:
    """Delete the staging directories in ``parent`` whose processes are dead, and finish a replacement that they began.

    Nothing else is touched: a staging directory has its form of name, and is empty or holds a lock file.
    """
    with suppress(OSError):
        for name in os.listdir(parent):  # noqa: PTH208 — Path.iterdir makes a Path of each file of a large directory
            if _NAME.fullmatch(name):
                _remove_if_stale(parent / name)


def delete_remaining() -> None:
    """Delete the staging directories that an interrupted `open_staging` of this process made and could not delete."""
    for staging, lock in list(_remaining.items()):
        if lock is not None:
            lock.close()
        _remove_if_stale(staging)


_remaining: dict[Path, IO[bytes] | None] = {}
"""The staging directories that this process makes, has or deletes, with their lock files."""


def _make_staging(parent: Path, target: str) -> tuple[Path, IO[bytes]]:
    """Make and lock a staging directory; tried again if another process took it for one of a dead process."""
    for _ in range(_ATTEMPTS):
        staging = parent / f".sdonnx-{_key(target) if target else secrets.token_hex(8)}.tmp"
        _remaining[staging] = None
        try:
            staging.mkdir()
        except FileExistsError:
            del _remaining[staging]
            if not _remove_if_stale(staging):
                _check_owner(staging)
                raise InUseError("another export is writing it") from None
            continue
        with suppress(FileNotFoundError):
            _remaining[staging] = lock = (staging / _LOCK).open("xb+")
            if lock_file(lock) is not False and (staging / _LOCK).exists():
                lock.write(os.fsencode(target))
                lock.flush()
                return staging, lock
            lock.close()
    raise InUseError("other processes keep deleting temporary directories there")


def _check_owner(staging: Path) -> None:
    """Raise PermissionError if it can't be known whether a staging directory is in use."""
    if staging.exists() and not os.access(staging, os.W_OK):
        reason = f"the export of another user is writing it, or was killed and left {staging.name}"
        raise PermissionError(errno.EACCES, reason)


def _key(target: str) -> str:
    """Return the same hexadecimal key for names that are equal on a file system that ignores case."""
    return hashlib.sha256(os.fsencode(unicodedata.normalize("NFC", target).casefold())).hexdigest()[:16]


def _remove_if_stale(staging: Path) -> bool:
    """Delete a staging directory unless it is a living process' or not sdonnx' own; whether it is gone."""
    with suppress(OSError):
        staging.rmdir()  # its process was killed before it made the lock file
    try:
        if not staging.is_symlink() and _is_own(staging) and stat.S_ISREG((staging / _LOCK).lstat().st_mode):
            with (staging / _LOCK).open("rb+") as lock:
                if lock_file(lock):
                    _delete(staging, lock, os.fsdecode(lock.read(1024)))
    except OSError:
        pass
    return not os.path.lexists(staging)


def _is_own(staging: Path) -> bool:
    """Whether a directory is this user's; of another user's, in a shared folder, nothing is believed."""
    return os.name == "nt" or staging.lstat().st_uid == os.geteuid()


def _delete(staging: Path, lock: IO[bytes], target: str) -> None:
    """Delete a staging directory, the lock file last: without it, nothing proves what the rest is."""
    if target and not _finish_replacement(staging, target):
        return
    for folder in (_NEW, _OLD):
        _delete_tree(staging / folder)
    if not any((staging / folder).exists() for folder in (_NEW, _OLD)):
        lock.close()  # Windows deletes no open file
        with suppress(OSError):
            retry_while_in_use((staging / _LOCK).unlink)
            staging.rmdir()


def _delete_tree(folder: Path) -> None:
    """Delete a folder, also what is read-only in it; links are not followed."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.is_symlink():
        return
    for root, folders, files in os.walk(folder):  # nothing, unless that failed
        for path in (Path(root, name) for name in (*folders, *(files if os.name == "nt" else ()))):
            if not path.is_symlink():
                with suppress(OSError):
                    path.chmod(stat.S_IRWXU)
    shutil.rmtree(folder, ignore_errors=True)


def _finish_replacement(staging: Path, target: str) -> bool:
    """Do the second rename of `replace_directory` if only the first was done; False if that is impossible now."""
    place, new, old = staging.parent / target, staging / _NEW / target, staging / _OLD / target
    if place.name != target or not old.is_dir() or os.path.lexists(place):
        return True
    try:
        replace(new if new.is_dir() else old, place)
    except OSError:
        return False
    return True


def lock_file(stream: IO[bytes]) -> bool | None:
    """Lock a file that is open for writing until it is closed or its process ends.

    Returns:
        False if another process has the lock, None if the file system has no locks.
    """
    try:
        if fcntl is not None:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            stream.seek(_LOCKED_BYTE)
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
            stream.seek(0)
        else:
            return None
    except OSError as error:
        return False if error.errno in _LOCKED_BY_ANOTHER else None
    return True


_LOCKED_BY_ANOTHER = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
