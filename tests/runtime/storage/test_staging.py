"""Staging directories: what killed processes leave is deleted, and nothing else; one process writes a directory."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from sdonnx_runtime.storage import renaming, staging
from sdonnx_runtime.storage.staging import (
    InUseError,
    delete_remaining,
    open_staging,
    remove_stale,
    replace_directory,
)
from support.users import run_without_privileges, shared_directory

posix = pytest.mark.skipif(sys.platform == "win32", reason="these are POSIX' permissions")

STALE = ".sdonnx-0123456789abcdef.tmp"


def tree(directory):
    """The files in a directory with their contents; an empty directory's is None."""
    paths = sorted(directory.rglob("*"))
    leaves = [path for path in paths if path.is_symlink() or path.is_file() or not any(path.iterdir())]
    return {path.relative_to(directory).as_posix(): path.read_text() if path.is_file() else None for path in leaves}


def write(directory, files):
    for name, text in files.items():
        path = directory / name
        (path if text is None else path.parent).mkdir(parents=True, exist_ok=True)
        if text is not None:
            path.write_text(text)


@pytest.fixture
def without_exchange(monkeypatch):
    """A system whose renames have no flags, such as Windows."""
    monkeypatch.setattr(renaming, "_CALLS", {})


class FakeMsvcrt:
    """msvcrt's locks: of bytes, by open file, gone when that is closed."""

    LK_NBLCK = 2

    def __init__(self):
        self.held = {}

    def locking(self, descriptor, mode, count):
        assert (mode, count) == (self.LK_NBLCK, 1)
        file = os.fstat(descriptor)
        key = (file.st_ino, os.lseek(descriptor, 0, os.SEEK_CUR))
        holder = self.held.setdefault(key, descriptor)
        if holder != descriptor:
            raise PermissionError(errno.EACCES, "Permission denied")


def test_a_killed_process_leaves_what_the_next_one_deletes(tmp_path):
    script = f"""
import sys
from pathlib import Path
from sdonnx_runtime.storage.staging import open_staging
with open_staging(Path({str(tmp_path)!r}), target="out") as folder:
    (folder / "half").write_text("written")
    print("ready", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as process:
        process.stdout.readline()
        before = tree(tmp_path)
        remove_stale(tmp_path)
        assert tree(tmp_path) == before, "its process is alive"
        with pytest.raises(InUseError), open_staging(tmp_path, target="out"):
            pass
        assert tree(tmp_path) == before
        process.kill()
    assert tree(tmp_path) == before
    remove_stale(tmp_path)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    "files",
    [
        {STALE: None},
        {f"{STALE}/sdonnx.lock": ""},
        {f"{STALE}/sdonnx.lock": "out", f"{STALE}/new": None},
        {f"{STALE}/sdonnx.lock": "out", f"{STALE}/new/out/half": "", f"{STALE}/old": None},
        {f"{STALE}/sdonnx.lock": "out", f"{STALE}/old/out/a": "old", "out/a": "new"},
        {f"{STALE}/sdonnx.lock": "../../etc", f"{STALE}/old/out/a": "old"},
    ],
)
def test_wherever_a_process_was_killed(files, tmp_path):
    write(tmp_path, files)
    remove_stale(tmp_path)
    assert tree(tmp_path) == {name: text for name, text in files.items() if STALE not in name}


def test_what_only_looks_like_a_staging_directory_stays(tmp_path):
    write(
        tmp_path,
        {
            f"{STALE}/thesis.txt": "years of work",
            ".sdonnx-0123456789abcdeg.tmp/sdonnx.lock": "",
            ".sdonnx-0123456789abcdef.tmp.bak/sdonnx.lock": "",
            ".sdonnx-1123456789abcdef.tmp": "a file",
            "elsewhere/sdonnx.lock": "",
        },
    )
    (tmp_path / ".sdonnx-2123456789abcdef.tmp").symlink_to("elsewhere")
    write(tmp_path, {".sdonnx-3123456789abcdef.tmp/sdonnx.lock/no": "file"})
    before = tree(tmp_path)
    remove_stale(tmp_path)
    assert tree(tmp_path) == before


def test_links_in_a_staging_directory_are_not_followed(tmp_path):
    write(tmp_path, {"mine/a": "mine", f"{STALE}/sdonnx.lock": "", f"{STALE}/new": None})
    (tmp_path / STALE / "new" / "link").symlink_to(tmp_path / "mine")
    remove_stale(tmp_path)
    assert tree(tmp_path) == {"mine/a": "mine"}


@posix
def test_read_only_folders_are_deleted(tmp_path):
    """Those of an old package; what links in them name is not touched."""

    def replace():
        write(directory, {"out/unet/a": "old", "mine/a": "mine"})
        (directory / "out" / "unet" / "link").symlink_to(directory / "mine")
        (directory / "mine").chmod(0o555)
        (directory / "out" / "unet").chmod(0o555)
        replace_out(directory)
        assert tree(directory) == {"out/a": "new", "mine/a": "mine"}
        assert (directory / "mine").stat().st_mode & 0o777 == 0o555
        (directory / "mine").chmod(0o755)

    with shared_directory() as directory:
        assert run_without_privileges(replace)


@posix
def test_what_another_user_left_is_named():
    def open_it():
        with pytest.raises(PermissionError, match=f"another user is writing it, or was killed and left {name}"):
            open_staging(directory, target="out").__enter__()

    with shared_directory() as directory:
        with open_staging(directory, target="out") as folder:
            name = folder.parent.name
        write(directory, {f"{name}/sdonnx.lock": "out", f"{name}/new/out/a": "half"})
        for path in (directory / name / "sdonnx.lock", directory / name):
            path.chmod(0o555)
        assert run_without_privileges(open_it)
        (directory / name).chmod(0o755)


def test_a_replacement_that_was_stopped_between_its_renames_is_finished(tmp_path):
    write(tmp_path, {f"{STALE}/sdonnx.lock": "out", f"{STALE}/old/out/a": "old", f"{STALE}/new/out/a": "new"})
    remove_stale(tmp_path)
    assert tree(tmp_path) == {"out/a": "new"}


def test_it_is_not_finished_over_something_new(tmp_path):
    write(tmp_path, {f"{STALE}/sdonnx.lock": "out", f"{STALE}/old/out/a": "old", f"{STALE}/new/out/a": "new"})
    write(tmp_path, {"out/b": "mine"})
    remove_stale(tmp_path)
    assert tree(tmp_path) == {"out/b": "mine"}


def replace_out(tmp_path):
    with open_staging(tmp_path, target="out") as folder:
        write(folder, {"out/a": "new"})
        replace_directory(folder / "out", tmp_path / "out")


@pytest.mark.parametrize("old", [{}, {"out/a": "old", "out/more": "old"}])
def test_replacing_a_directory(old, tmp_path):
    write(tmp_path, old)
    replace_out(tmp_path)
    assert tree(tmp_path) == {"out/a": "new"}


@pytest.mark.parametrize("old", [{}, {"out/a": "old", "out/more": "old"}])
def test_replacing_a_directory_without_an_exchange(old, tmp_path, without_exchange):
    write(tmp_path, old)
    replace_out(tmp_path)
    assert tree(tmp_path) == {"out/a": "new"}


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="the others can't exchange")
def test_the_target_is_there_at_every_moment(tmp_path):
    write(tmp_path, {"out/a": "old"})
    seen, done = [], threading.Event()

    def watch():
        while not done.is_set():
            try:
                seen.append((tmp_path / "out" / "a").read_text())
            except OSError as error:
                seen.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(100):
        replace_out(tmp_path)
    done.set()
    watcher.join()
    assert set(seen) <= {"old", "new"}


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_rename_leaves_the_old_directory(failing, failure, tmp_path, without_exchange, monkeypatch):
    write(tmp_path, {"out/a": "old"})
    real, calls = renaming.replace, []

    def replace(source, target):
        calls.append(source)
        if len(calls) == failing:
            raise failure
        real(source, target)

    monkeypatch.setattr(staging, "replace", replace)
    with pytest.raises(type(failure)):
        replace_out(tmp_path)
    assert tree(tmp_path) == {"out/a": "old"}


@pytest.mark.parametrize("names", [("out", "out"), ("out", "OUT"), ("caf\u00e9", "cafe\u0301")])
def test_one_writer_of_a_directory(names, tmp_path):
    first, second = names
    with open_staging(tmp_path, target=first), pytest.raises(InUseError), open_staging(tmp_path, target=second):
        pass
    with open_staging(tmp_path, target=second):
        pass
    assert tree(tmp_path) == {}


def test_locks_of_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "fcntl", None)
    monkeypatch.setattr(staging, "msvcrt", FakeMsvcrt())
    with open_staging(tmp_path, target="out") as folder:
        remove_stale(tmp_path)
        assert folder.is_dir()
        with pytest.raises(InUseError), open_staging(tmp_path, target="out"):
            pass
    assert tree(tmp_path) == {}
    write(tmp_path, {f"{STALE}/sdonnx.lock": "out", f"{STALE}/old/out/a": "old", f"{STALE}/new/out/a": "new"})
    remove_stale(tmp_path)
    assert tree(tmp_path) == {"out/a": "new"}


def test_without_locks_nothing_is_taken_for_stale(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(staging, "fcntl", SimpleNamespace(flock=refuse, LOCK_EX=0, LOCK_NB=0))
    write(tmp_path, {f"{STALE}/sdonnx.lock": ""})
    with open_staging(tmp_path) as folder:
        write(folder, {"a": "new"})
        remove_stale(tmp_path)
        assert (folder / "a").is_file()
    assert tree(tmp_path) == {f"{STALE}/sdonnx.lock": ""}


def test_an_interrupted_start_is_deleted_at_the_end(tmp_path, monkeypatch):
    def interrupt(_stream):
        raise KeyboardInterrupt

    monkeypatch.setattr(staging, "lock_file", interrupt)
    with pytest.raises(KeyboardInterrupt), open_staging(tmp_path):
        pass
    assert tree(tmp_path) != {}
    monkeypatch.undo()
    delete_remaining()
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("system", ["flags", "links", "neither"])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_name_is_taken_by_one_of_many(kind, system, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if system != "flags":
        monkeypatch.setattr(renaming, "_CALLS", {})
    if system == "neither":
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    for number in range(8):
        write(tmp_path, {f"{number}" if kind == "file" else f"{number}/a": str(number)})
    outcomes, barrier = [], threading.Barrier(8)

    def take(number):
        barrier.wait()
        try:
            renaming.rename_to_free(tmp_path / str(number), tmp_path / "taken")
            outcomes.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=take, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = outcomes
    assert tree(tmp_path)["taken" if kind == "file" else "taken/a"] == str(winner)
    assert len(list(tmp_path.iterdir())) == 8
