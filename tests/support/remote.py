"""What tests of ``sdonnx run --server`` share: the command, its files, and programs that are no servers."""

import json
import socket
import threading
from contextlib import contextmanager, suppress

from support.cli import run_cli

FAST = ["--size", "64x64", "--steps", "2"]

SLOW = {"prompt": "a cat", "num_inference_steps": 200}


def run(*arguments, cwd):
    return run_cli("run", *arguments, cwd=cwd)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))


def states(server):
    return [job.state.value for job in server.context.queue.jobs]


def same_files(first, second):
    assert names(first) == names(second)
    for name in names(first):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@contextmanager
def listening(answer):
    """Something that calls ``answer(connection)`` for every connection; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    answer(connection)

        threading.Thread(target=listen, daemon=True).start()
        yield listener.getsockname()[1]
        with suppress(OSError):  # macOS has none for sockets that listen
            listener.shutdown(socket.SHUT_RDWR)


def answering(data):
    """Something that answers every connection with these bytes; yields its port."""

    def answer(connection):
        connection.recv(1 << 16)
        connection.sendall(data)

    return listening(answer)


def http(status, body, more=""):
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{more}\r\n{body}".encode()
