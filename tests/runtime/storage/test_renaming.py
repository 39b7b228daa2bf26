"""Renames as Linux, macOS and Windows do them, with their functions in place of this machine's."""

import ctypes
import errno
import sys
from pathlib import Path

import pytest
from sdonnx_runtime.storage import renaming


class FakeLibrary:
    """A C library with one function that exchanges or renames, or fails with an error."""

    def __init__(self, name, error=0):
        setattr(self, name, self.call)
        self.error, self.calls = error, []

    def call(self, *arguments):
        self.calls.append(tuple(argument.value for argument in arguments))
        ctypes.set_errno(self.error)
        return -1 if self.error else 0


CALLS = {
    "linux": ("renameat2", (-100, b"a", -100, b"b")),  # AT_FDCWD
    "darwin": ("renamex_np", (b"a", b"b")),
}
FLAGS = {"linux": {"exchange": 2, "no replace": 1}, "darwin": {"exchange": 2, "no replace": 4}}
"""RENAME_EXCHANGE and RENAME_NOREPLACE of linux/fs.h; RENAME_SWAP and RENAME_EXCL of Apple's sys/stdio.h."""


@pytest.mark.parametrize("platform", CALLS)
def test_the_systems_own_calls(platform, monkeypatch):
    name, arguments = CALLS[platform]
    library = FakeLibrary(name)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    assert renaming.exchange(Path("a"), Path("b"))
    renaming.rename_to_free(Path("a"), Path("b"))
    flags = FLAGS[platform]
    assert library.calls == [(*arguments, flags["exchange"]), (*arguments, flags["no replace"])]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.ENOTSUP])
@pytest.mark.parametrize("platform", CALLS)
def test_file_systems_without_them(platform, code, monkeypatch):
    """FAT, NFS and old kernels."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: FakeLibrary(CALLS[platform][0], code))
    assert not renaming.exchange(Path("a"), Path("b"))


def test_other_errors_are_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: FakeLibrary("renameat2", errno.EEXIST))
    with pytest.raises(FileExistsError):
        renaming.rename_to_free(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: FakeLibrary("renameat2", errno.EROFS))
    with pytest.raises(OSError, match="Read-only file system"):
        renaming.exchange(tmp_path / "a", tmp_path / "b")


def test_windows_renames_to_a_free_name_by_itself(tmp_path, monkeypatch):
    """Its rename never replaces, and a file that was just written can be open in a virus scanner."""
    real, refused = Path.rename, []

    def rename(self, target):
        if target.exists():
            raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists")
        if not refused:
            error = PermissionError(errno.EACCES, "The process cannot access the file")
            error.winerror = 32
            refused.append(error)
            raise error
        return real(self, target)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(Path, "rename", rename)
    for name in "ab":
        (tmp_path / name).write_text(name)
    renaming.rename_to_free(tmp_path / "a", tmp_path / "c")
    with pytest.raises(FileExistsError):
        renaming.rename_to_free(tmp_path / "b", tmp_path / "c")
    assert (tmp_path / "c").read_text() == "a"
    assert len(refused) == 1


def test_an_error_of_permission_elsewhere_is_final(tmp_path, monkeypatch):
    calls = []

    def replace(self, target):
        calls.append(target)
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(PermissionError):
        renaming.replace(tmp_path / "a", tmp_path / "b")
    assert len(calls) == 1
