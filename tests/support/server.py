"""Servers for real clients: in this process, or ``sdonnx serve`` as one of its own."""

import os
import re
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sdonnx_models import DEFAULT, bundled
from starlette.applications import Starlette

from sdonnx.server.app import create_app
from sdonnx.server.context import Context
from sdonnx.server.running import LocalRunner
from sdonnx.server.serving import JobServer
from sdonnx.server.settings import Settings
from support.cli import start_cli


@dataclass(frozen=True, kw_only=True)
class RunningServer:
    """A server that answers."""

    url: str
    """Such as ``http://127.0.0.1:40123``."""
    app: Starlette

    @property
    def context(self) -> Context:
        return self.app.state.context

    @property
    def address(self):
        """For `socket.create_connection`."""
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def wait_until_idle(self):
        """Wait until no job runs or waits."""
        queue = self.context.queue
        wait_until(lambda: queue.current is None and not queue.waiting)


@contextmanager
def running_server(make_runner=LocalRunner, **settings):
    """Run a server of these `Settings` on a free port; pictogram, kept open, and a temporary output by default."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        defaults = {"packages": (bundled()[DEFAULT],), "output": Path(folder) / "images", "port": port}
        defaults |= {"threads": 1, "memory": "max"}
        app = create_app(Settings(**{**defaults, **settings}), make_runner)
        server = JobServer(app)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive())
            assert server.started, "the server did not start"
            yield RunningServer(url=f"http://127.0.0.1:{port}", app=app)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the server did not end"


class ServerProcess:
    """A started ``sdonnx serve``, once it answers."""

    def __init__(self, process):
        self.process, self.printed = process, ""
        self._lines = threading.Thread(target=self._read, daemon=True)
        self._lines.start()
        wait_until(lambda: "answers at" in self.printed or process.poll() is not None)
        assert process.poll() is None, self.printed
        self.url = re.search(r"answers at (\S+)", self.printed)[1]

    def _read(self):
        for line in self.process.stderr:
            self.printed += line

    def end(self, number):
        """Send a signal; returns the exit code and the seconds until it ended."""
        self.process.send_signal(number)
        began = time.monotonic()
        code = self.process.wait(30)
        self._lines.join()
        return code, time.monotonic() - began


@contextmanager
def server_process(*arguments, cwd=None, **environment):
    """Start ``sdonnx serve`` on a free port, and kill it at the end."""
    process = start_cli(
        "serve", "--port", 0, *arguments, cwd=cwd, start=subprocess.Popen, stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "500", **environment},
    )  # fmt: skip
    try:
        yield ServerProcess(process)
    finally:
        process.kill()
        process.wait()


def wait_until(condition, seconds=30):
    """Wait until a condition holds, for at most so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
