"""Writing a file: whole or not at all, through links and into pipes, with its mode, under a name that is free."""

import errno
import os
import sys
import threading
from pathlib import Path

import pytest
from sdonnx_runtime.errors import SdonnxError
from sdonnx_runtime.outputs.atomic import check_writable, comparable, is_reserved, write_file
from sdonnx_runtime.storage import renaming

posix = pytest.mark.skipif(sys.platform == "win32", reason="these are POSIX' files")


def save(path, text="new", **options):
    check_writable(path, **options)
    return write_file(path, lambda stream: stream.write(text.encode()), **options)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def fail(stream):
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SdonnxError, match=r"a can't be written: No space left on device; free some space"):
        write_file(path, fail)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


@posix
@pytest.mark.parametrize("old", ["old", None])
def test_a_link_stays(old, tmp_path):
    """Also one to a file that isn't there yet, on another disk, in a directory that isn't writable."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "links").mkdir()
    link, target = tmp_path / "links" / "a", tmp_path / "disk" / "b"
    if old is not None:
        target.write_text(old)
    link.symlink_to("../disk/b")
    (tmp_path / "links" / "c").symlink_to("a")
    save(tmp_path / "links" / "c")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert names(tmp_path / "links") == ["a", "c"]
    assert names(tmp_path / "disk") == ["b"]


@posix
@pytest.mark.parametrize(("target", "reason"), [("no/such/b", "No such file"), ("a", "symbolic links")])
def test_a_link_to_nowhere_is_refused(target, reason, tmp_path):
    (tmp_path / "a").symlink_to(target)
    for write in (check_writable, lambda path: write_file(path, lambda stream: stream.write(b""))):
        with pytest.raises(SdonnxError, match=reason):
            write(tmp_path / "a")
    assert (tmp_path / "a").is_symlink()
    assert names(tmp_path) == ["a"]


@posix
@pytest.mark.parametrize("mode", [0o600, 0o664, 0o755])
def test_the_mode_of_a_file_stays(mode, tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    path.chmod(mode)
    save(path)
    assert path.stat().st_mode & 0o7777 == mode


@posix
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_new_file_has_the_mode_of_new_files(mask, tmp_path):
    before = os.umask(mask)
    try:
        save(tmp_path / "a")
        (tmp_path / "b").write_text("")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@posix
def test_other_hard_links_keep_the_old_content(tmp_path):
    """As in a backup of hard links, which writing into the file would change."""
    (tmp_path / "a").write_text("old")
    (tmp_path / "backup").hardlink_to(tmp_path / "a")
    save(tmp_path / "a")
    assert (tmp_path / "backup").read_text() == "old"


@posix
def test_a_pipe_gets_the_file(tmp_path):
    path, read = tmp_path / "pipe.png", []
    os.mkfifo(path)
    check_writable(path)  # neither waits for a reader nor is one told that this was all
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
    reader.start()
    save(path, "new" * 100_000)
    reader.join()
    assert read == [b"new" * 100_000]
    assert path.is_fifo()
    assert names(tmp_path) == ["pipe.png"]


@posix
def test_an_open_file_keeps_its_place(tmp_path):
    with (tmp_path / "log").open("wb") as stream:
        stream.write(b"before ")
        stream.flush()
        save(Path(f"/dev/fd/{stream.fileno()}"))
        stream.write(b" after")
    assert (tmp_path / "log").read_text() == "before new after"
    save(Path(os.devnull))
    assert Path(os.devnull).is_char_device()


def test_names_that_are_taken_get_a_number(tmp_path):
    (tmp_path / "a-2.png").write_text("mine")
    made = [save(tmp_path / "a.png", str(number), overwrite=False).name for number in range(4)]
    assert made == ["a.png", "a-3.png", "a-4.png", "a-5.png"]
    assert [(tmp_path / name).read_text() for name in made] == ["0", "1", "2", "3"]
    assert (tmp_path / "a-2.png").read_text() == "mine"


@posix
def test_a_name_of_a_broken_link_is_taken(tmp_path):
    (tmp_path / "a.png").symlink_to("nowhere")
    assert save(tmp_path / "a.png", overwrite=False).name == "a-2.png"
    assert not (tmp_path / "nowhere").exists()


def test_many_writers_of_one_name_lose_nothing(tmp_path):
    barrier = threading.Barrier(8)

    def write(number):
        barrier.wait()
        save(tmp_path / "a.png", str(number), overwrite=False)

    threads = [threading.Thread(target=write, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == list("01234567")
    assert set(names(tmp_path)) == {"a.png", *(f"a-{number}.png" for number in range(2, 9))}


def test_the_longest_name(tmp_path):
    longest = os.pathconf(tmp_path, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    name = "ä" * ((longest - 4) // 2) + ".png"
    save(tmp_path / name)
    assert names(tmp_path) == [name]
    with pytest.raises(SdonnxError, match="File name too long; choose a shorter name"):
        check_writable(tmp_path / f"longer-{name}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent/a.png", "make its directory first"),
        ("directory", "give the name of a file such as"),
        ("file/a.png", "Not a directory"),
    ],
)
def test_what_cannot_be_a_file_is_refused_before(name, message, tmp_path):
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(SdonnxError, match=message):
        check_writable(tmp_path / name)
    assert names(tmp_path) == ["directory", "file"]


def test_a_read_only_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("old")
    (tmp_path / "a.png").chmod(0o444)
    if sys.platform != "win32" and os.geteuid() == 0:  # who may write it nevertheless
        monkeypatch.setattr(os, "access", lambda path, mode: path.stat().st_mode & 0o222 != 0)
    with pytest.raises(SdonnxError, match="it is read-only"):
        check_writable(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, True) for name in ("CON", "nul.png", "aux.tar.gz", "Com1.png", "LPT³", "a.png ", "a.", "a:b.png")),
        *((name, True) for name in ("prn .png", "CONIN$")),
        *((name, False) for name in ("a.png", "console.png", "com.png", "com10.png", ".png", "my.nul", "nulls")),
    ],
)
def test_names_that_windows_reserves(name, expected):
    """As listed in Microsoft's "Naming Files, Paths, and Namespaces"."""
    assert is_reserved(name, windows=True) is expected
    assert not is_reserved(name, windows=False)


@pytest.mark.parametrize(("platform", "equal"), [("darwin", True), ("win32", True), ("linux", False)])
def test_names_that_differ_in_case(platform, equal, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    assert (comparable(tmp_path / "Caf\u00e9.png") == comparable(tmp_path / "cafe\u0301.PNG")) is equal


@pytest.mark.parametrize("winerror", [5, 32])
@pytest.mark.parametrize("times", [3, 1000])
def test_a_file_that_another_program_has_open_on_windows(times, winerror, tmp_path, monkeypatch):
    """Virus scanners have it for a moment; other programs for longer."""
    real, calls = Path.replace, []

    def replace(self, target):
        calls.append(target)
        if len(calls) <= times:
            error = PermissionError(errno.EACCES, "The process cannot access the file")
            error.winerror = winerror
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(renaming, "_PATIENCE", 0.3)
    (tmp_path / "a.png").write_text("old")
    if times == 3:
        save(tmp_path / "a.png")
        assert (tmp_path / "a.png").read_text() == "new"
    else:
        with pytest.raises(SdonnxError, match=r"a.png can't be written: it is in use by another program; close that"):
            save(tmp_path / "a.png")
        assert (tmp_path / "a.png").read_text() == "old"
    assert names(tmp_path) == ["a.png"]
