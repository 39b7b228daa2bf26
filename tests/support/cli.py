"""The command line: called in this process, or started as a process where that is what a test is about."""

import io
import logging
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest

from sdonnx.cli import app


def run_cli(*arguments, cwd=None, encoding="utf-8"):
    """Call ``sdonnx``'s entry point as its script does; a fifth of the time that a process of its own takes."""
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n") for _ in range(2))
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["sdonnx", *map(str, arguments)])
        patch.setattr(logging.root, "handlers", [])  # else pytest's replace the command line's
        patch.setattr(app, "run_until_signal", lambda run, clean_up: run())  # the signal handlers are pytest's
        if cwd is not None:
            patch.chdir(cwd)
        try:
            app.main()
        except SystemExit as end:
            code = end.code or 0
        printed = [stream.buffer.getvalue().decode(encoding) for stream in (stdout, stderr)]
    return subprocess.CompletedProcess(arguments, code, *printed)


def start_cli(*arguments, cwd=None, start=subprocess.run, **options):
    """Start ``python -m sdonnx``: for signals, limits of the process, and what it imports."""
    command = [sys.executable, "-m", "sdonnx", *map(str, arguments)]
    if start is subprocess.run:
        options = {"capture_output": True, **options}
    return start(command, cwd=cwd, text=True, encoding="utf-8", **options)


@contextmanager
def running_cli(*arguments, cwd):
    """A started ``python -m sdonnx`` with stderr as a pipe; killed where a test fails or is stopped before its end."""
    process = start_cli(*arguments, cwd=cwd, start=subprocess.Popen, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()


def limit_file_size(size):
    """A ``preexec_fn`` that makes writes past ``size`` bytes fail in the child, as a full disk does."""
    resource = pytest.importorskip("resource")

    def limit():
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a .pyc that is cut off would break the next process
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit
