"""Output in any encoding, and to streams that are full, closed, or that nobody reads; names that control a terminal."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cached_cell_len
from support.cli import run_cli, start_cli

from sdonnx.cli import console
from sdonnx.cli.streams import escape_controls, ignore_impossible_sizes, one_line

on_linux = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
ONE_STEP = ["run", "a cat", "--steps", "1", "--seed", "1", "-o", "c.png"]


@pytest.fixture
def full():
    with open("/dev/full", "w") as stream:  # noqa: PTH123
        yield stream


@pytest.fixture
def unread():
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "cp437", "utf-8"])
def test_what_an_encoding_lacks_is_escaped(encoding, package, tmp_path):
    name = "模型 é"
    shutil.copytree(package, tmp_path / name)
    described = run_cli("info", name, cwd=tmp_path, encoding=encoding)
    assert described.returncode == 0, described.stderr
    assert name.encode(encoding, "backslashreplace").decode(encoding) in described.stdout
    refused = run_cli("info", "猫", cwd=tmp_path, encoding=encoding)
    assert refused.returncode == 1
    assert "猫".encode(encoding, "backslashreplace").decode(encoding) in refused.stderr
    helped = run_cli("run", "--help", encoding=encoding)
    assert helped.returncode == 0
    assert ("S,S,…" if encoding in ("utf-8", "cp1252") else "S,S,...") in helped.stdout


@on_linux
@pytest.mark.parametrize(
    ("command", "code"), [(["info", "pictogram"], 1), (["models", "--json"], 1), (["run", "--help"], 1)]
)
def test_a_full_stdout_is_an_error(command, code, full):
    ran = start_cli(*command, start=subprocess.run, stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert ran.returncode == code
    assert ran.stderr == "error: stdout can't be written (No space left on device); write it to another place\n"


@on_linux
def test_a_closed_stdout_is_an_error_where_something_is_to_be_written(tmp_path):
    ran = start_cli(*ONE_STEP, cwd=tmp_path, preexec_fn=lambda: os.close(1))
    assert ran.returncode == 0  # its lines are on stderr
    ran = start_cli(*ONE_STEP, "--json", cwd=tmp_path, preexec_fn=lambda: os.close(1))
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith("error: stdout can't be written (Bad file descriptor)")


@on_linux
def test_a_reader_that_left_is_no_message(unread):
    ran = start_cli("samplers", stdout=unread, stderr=subprocess.PIPE, capture_output=False)
    assert (ran.returncode, ran.stderr) == (1, "")


@on_linux
@pytest.mark.parametrize("closed", [False, True])
def test_messages_that_can_not_be_written_stop_nothing(closed, full, tmp_path):
    options = {"preexec_fn": lambda: os.close(2)} if closed else {}
    streams = {"stdout": subprocess.PIPE, "stderr": None if closed else full, "capture_output": False}
    ran = start_cli(*ONE_STEP, "--json", cwd=tmp_path, **streams, **options)
    assert ran.returncode == 0
    assert [(each["path"], each["seed"]) for each in json.loads(ran.stdout)["images"]] == [("c.png", 1)]
    ran = start_cli("info", "nowhere", **streams, **options)
    assert (ran.returncode, ran.stdout) == (1, "")


@on_linux
def test_utf_8_in_the_c_locale(tmp_path):
    """The prompt's bytes are UTF-8, whatever the locale says; bytes that are not are refused."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ran = start_cli(*ONE_STEP, "--negative", "Gemüse 猫", "--json", cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["request"]["negative_prompt"] == "Gemüse 猫"
    command = [sys.executable, "-m", "sdonnx", "run", b"\xff", "-o", "c.png"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "not valid Unicode" in ran.stderr
    (tmp_path / "b.jsonl").write_text('{"prompt": "a cat", "image": "猫.png"}', encoding="utf-8")
    ran = start_cli("run", "--batch-file", "b.jsonl", cwd=tmp_path, env=environment)
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr


@on_linux
def test_a_package_whose_name_is_not_unicode(package, tmp_path):
    """ONNX Runtime takes paths in UTF-8 only."""
    name = os.fsdecode(b"p\xff")
    shutil.copytree(package, tmp_path / name)
    ran = run_cli("run", "a cat", "-m", name, cwd=tmp_path)
    assert ran.returncode == 1
    assert "is not valid Unicode" in ran.stderr
    assert ran.stderr.strip().endswith("rename it")


def test_names_do_not_control_the_terminal(package, tmp_path):
    name = "a\x1b[31m\rb\nerror: c\u202e"
    shutil.copytree(package, tmp_path / name)
    for ran in (run_cli("info", name, cwd=tmp_path), run_cli("info", f"{name}/no", cwd=tmp_path)):
        shown = ran.stdout + ran.stderr
        assert "\\x1b[31m" in shown
        assert not any(each in shown for each in ("\x1b", "\r", "\u202e", "\nerror: c"))


def test_lines_of_a_log_are_not_wrapped_and_not_remembered(capsys, monkeypatch):
    monkeypatch.setattr(console, "err", type(console.err)(stderr=True, width=40))
    remembered, text = cached_cell_len.cache_info().currsize, "job 1b2c done after 1.3 s\x1b[31m " + "x" * 100
    console.LogHandler().emit(logging.LogRecord("sdonnx", logging.WARNING, "", 0, text, (), None))
    assert capsys.readouterr().err == f"WARNING  {escape_controls(text)}\n"
    assert cached_cell_len.cache_info().currsize == remembered


def test_sizes_that_no_terminal_has():
    sizes = {"COLUMNS": ["0", "", "9", "\u00b2", "-5", "99999999", "80x24"], "LINES": ["0", "\u00b2"]}
    for name, odd in sizes.items():
        for size in odd:
            environment = {name: size, "PATH": "/bin"}
            ignore_impossible_sizes(environment)
            assert environment == {"PATH": "/bin"}, size
    kept = {"COLUMNS": "20", "LINES": "9999"}
    ignore_impossible_sizes(kept)
    assert kept == {"COLUMNS": "20", "LINES": "9999"}
    ran = start_cli("samplers", env={**os.environ, "COLUMNS": "0", "LINES": "\u00b2"})
    assert (ran.returncode, "dpmpp_2m" in ran.stdout) == (0, True), ran.stderr


@on_linux
def test_a_working_directory_that_was_deleted(tmp_path):
    (tmp_path / "gone").mkdir()
    ran = start_cli(*ONE_STEP, cwd=tmp_path / "gone", preexec_fn=lambda: os.rmdir(tmp_path / "gone"))  # noqa: PTH106
    assert ran.returncode == 1
    assert "error: the working directory can't be used: No such file or directory" in ran.stderr


def test_escapes_are_those_of_python():
    text = "".join(map(chr, range(0x100))) + "\u200d\u202e\u2066"  # a zero-width joiner is part of emoji
    shown = escape_controls(text)
    harmless = "\t\n\xa0\xad\u200d"
    assert shown == "".join(each if each.isprintable() or each in harmless else ascii(each)[1:-1] for each in text)
    assert one_line("a\nb") == "a\\nb"


def test_the_version():
    from importlib.metadata import version

    assert run_cli("--version").stdout == f"sdonnx {version('sdonnx')}\n"
