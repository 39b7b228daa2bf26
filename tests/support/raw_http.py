"""Requests and responses as bytes, for what no HTTP client would send."""

import socket
import time
from contextlib import suppress


def exchange(server, *parts, pause=0.0, end_writing=False):
    """Send bytes over a new connection and read until the server closes it."""
    with socket.create_connection(server.address, timeout=10) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        if end_writing:
            with suppress(OSError):  # the server may have closed it
                connection.shutdown(socket.SHUT_WR)
        received = b""
        with suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                received += chunk
    return received


def request(method="GET", path="/health", *, host="localhost", body=b"", **headers):
    lines = [f"{method} {path} HTTP/1.1", *([f"Host: {host}"] if host is not None else []), "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def status(response):
    return int(response.split(b" ", 2)[1]) if response else None


def headers_of(response):
    lines = response.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
    return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
