"""Signals end the program with 128 plus their number and "stopped", in whichever moment they come."""

import os
import signal
import subprocess
import sys
import time

import pytest
from sdonnx_models import DEFAULT
from support.cli import start_cli

from sdonnx.cli import signals

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows sends them to the whole console")

WAIT = "print('loading', flush=True); import time; time.sleep(60)"
LOST = f"""
try:
    exec({WAIT!r})  # as dataclasses and namedtuples are made
except BaseException:
    raise ImportError("DLL load failed")  # as libraries do around their compiled parts
"""


def loading(arguments, tmp_path, library, source, hang_up=signal.SIG_DFL):
    """Start the command line with a library that takes a minute to load, and wait until it does.

    ``hang_up`` is what SIGHUP does at its start, whatever it does in the tests' own process.
    """
    (tmp_path / "libraries").mkdir()
    (tmp_path / "libraries" / f"{library}.py").write_text(source)
    paths = os.pathsep.join([str(tmp_path / "libraries"), os.environ.get("PYTHONPATH", "")])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": {**os.environ, "PYTHONPATH": paths}}
    (tmp_path / "work").mkdir()
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGHUP, hang_up)
    process = start_cli(*arguments, cwd=tmp_path / "work", start=subprocess.Popen, **pipes)
    assert process.stdout.readline() == "loading\n", process.communicate()
    return process


def end(process):
    try:
        return process.communicate(timeout=30)
    finally:
        process.kill()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("library", ["typer", "numpy"])
def test_while_libraries_load(library, name, tmp_path):
    number = getattr(signal, name)
    process = loading(["run", "a cat"], tmp_path, library, WAIT)
    process.send_signal(number)
    assert end(process) == ("", "stopped\n")
    assert process.returncode == 128 + number


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_while_onnx_runtime_loads(name, tmp_path):
    """The interrupt becomes another error there, and must neither be told as such nor let a batch go on."""
    (tmp_path / "lines.txt").write_text("a cat\na dog\n")
    arguments = ["run", "--batch-file", "../lines.txt", "-m", DEFAULT, "--steps", "1"]
    process = loading(arguments, tmp_path, "onnxruntime", LOST)
    process.send_signal(getattr(signal, name))
    assert end(process) == ("", "stopped\n")
    assert process.returncode == 128 + getattr(signal, name)
    assert os.listdir(tmp_path / "work") == []  # noqa: PTH208


def test_what_was_ignored_at_the_start_stays_so(tmp_path):
    """As nohup does, and a shell with Ctrl-C for what it runs in the background."""

    process = loading(["run", "a cat"], tmp_path, "typer", WAIT, hang_up=signal.SIG_IGN)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process) == ("", "stopped\n")
    assert process.returncode == 143


AT_THE_END = """
import sys, threading, time
from sdonnx.cli.signals import run_until_signal
threading.Thread(target=time.sleep, args=[60]).start()
run_until_signal(lambda: None, lambda: None)
print("loading", flush=True)
"""

IN_CLEAN_UP = """
import time
from sdonnx.cli.signals import run_until_signal
def run():
    print("loading", flush=True)
    time.sleep(60)
def clean_up():
    time.sleep(1)
    print("clean")
run_until_signal(run, clean_up)
"""


@pytest.mark.parametrize(("script", "printed"), [(AT_THE_END, ""), (IN_CLEAN_UP, "clean\n")])
def test_at_the_end(script, printed):
    """While threads are waited for, and again and again while files are deleted."""
    command = [sys.executable, "-c", script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "loading\n"
        for _ in range(5 if printed else 1):
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
        assert end(process) == (printed, "stopped\n")
    assert process.returncode == 130


IN_A_FINALIZER = """
import os, signal
from sdonnx.cli.signals import run_until_signal
class Array:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        print("freed")
def run():
    Array()
    print("ran")
run_until_signal(run, lambda: None)
"""


def test_where_python_ignores_exceptions():
    ran = subprocess.run([sys.executable, "-c", IN_A_FINALIZER], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("ran\n", "stopped\n")
    assert ran.returncode == 130


def test_signals_of_windows(monkeypatch):
    """There is no SIGHUP; Ctrl-Break is SIGBREAK."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, 21: signal.SIG_DFL}
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setattr(signal, "SIGBREAK", 21, raising=False)
    monkeypatch.setattr(signal, "getsignal", lambda number: handlers[number])
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    found = signals.Signals()
    found.interrupt()
    with pytest.raises(KeyboardInterrupt):
        handlers[21](21, None)
    assert found.received == 21
    handlers[signal.SIGINT](signal.SIGINT, None)  # soon after: clean-up goes on
    assert found.received == 21
    found.ignore()
    assert set(handlers.values()) == {signal.SIG_IGN}


WORKER = """
import time
from sdonnx.benchmark.worker import run_in_subprocess
def wait():
    print("started", flush=True)
    time.sleep(60)
if __name__ == "__main__":
    run_in_subprocess("nothing", wait)
"""


def test_a_worker_of_bench_ends_with_its_parent(tmp_path):
    (tmp_path / "script.py").write_text(WORKER)
    command = [sys.executable, tmp_path / "script.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "started\n"
        process.kill()
        assert end(process)[0] == "", "the end of what the worker prints"
