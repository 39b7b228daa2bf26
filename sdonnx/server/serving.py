"""The process of a server: its sockets, uvicorn, and how both end."""

import asyncio
import errno
import socket
import threading
from asyncio import TimerHandle, Transport
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, cast

import h11
import python_multipart  # noqa: F401 # pyright: ignore[reportUnusedImport] — starlette wants it when a form comes
import uvicorn
from sdonnx_runtime.execution.process_memory import set_malloc_thresholds
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

import sdonnx
from sdonnx.server.app import create_app
from sdonnx.server.running import LocalRunner, MakeRunner
from sdonnx.server.settings import Settings

if TYPE_CHECKING:
    from sdonnx.server.context import Context

HEADER_TIMEOUT = 20.0
"""Seconds in which a request's headers have to come, and a connection's first request."""

_KEEP_ALIVE = 60
_SHUTDOWN_TIMEOUT = 10
_MAX_CONNECTIONS = 400
"""More get 503; most systems give a process 1,024 files."""


def serve(
    settings: Settings,
    on_start: Callable[[str], None],
    on_end: Callable[[], None],
    make_runner: MakeRunner = LocalRunner,
) -> None:
    """Serve until a KeyboardInterrupt; the jobs that run or wait are cancelled then, and finished images are on disk.

    Args:
        settings: the settings.
        on_start: is called with the server's URL once it answers.
        on_end: is called before it waits for the jobs' end.
        make_runner: makes what runs the jobs.

    Raises:
        RequestError: a setting is invalid.
        SdonnxError: the port can't be used, a package can't be opened, or the output directory can't be used.
    """
    set_malloc_thresholds(one_heap=True)  # before threads have heaps of their own, which fragment
    with ExitStack() as stack:
        listeners = [stack.enter_context(each) for each in listen(settings.host, settings.port)]
        server = JobServer(create_app(settings, make_runner))
        ended = _start_thread(lambda: server.run(listeners))
        try:
            while not server.started and not ended.wait(0.01):
                pass
            if server.started:
                on_start(url_of(settings.host, listeners[0].getsockname()[1]))
            _wait(ended)
        finally:
            on_end()
            server.stop()
            _wait(ended)
    raise sdonnx.SdonnxError("the server ended; its log has the reason")


def listen(host: str, port: int) -> list[socket.socket]:
    """Open a socket for each address of a host; port 0 is a free one.

    Raises:
        RequestError: the host is not one of this machine's.
        SdonnxError: the port is in use, or not allowed to this user.
    """
    listeners, missing = list[socket.socket](), None
    try:
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            try:
                listeners.append(socket.create_server((address[0], port), family=family, backlog=256))
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                missing = error  # such as localhost's ::1 in a container without IPv6
            else:
                port = listeners[0].getsockname()[1]
        if missing is not None and not listeners:
            raise missing
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise _listen_error(error, host, port) from None
    return listeners


def url_of(host: str, port: int) -> str:
    """The URL of a server."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class JobServer(uvicorn.Server):
    """uvicorn, which ends the jobs before the connections whose clients wait for them."""

    def __init__(self, app: Starlette) -> None:
        self._context = cast("Context", app.state.context)
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=_SHUTDOWN_TIMEOUT,
        )
        super().__init__(config)

    def stop(self) -> None:
        """Cancel the jobs now, and end soon; from any thread."""
        self._context.queue.shut_down()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the jobs, then the connections; requests that come meanwhile are told that the server shuts down."""
        await asyncio.to_thread(self._context.queue.close)
        await super().shutdown(sockets)


class _Protocol(H11Protocol):
    """A connection that ends when a request's headers don't come in time, and sends at once.

    asyncio sets TCP_NODELAY only where a socket names its protocol, which those of `socket.create_server` don't: each
    response would take 40 ms more.
    """

    _timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        connection: socket.socket = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._limit_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._limit_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def _limit_headers(self) -> None:
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_TIMEOUT, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _start_thread(run: Callable[[], None]) -> threading.Event:
    """Run in a thread, since uvicorn in the main thread takes over its signals; the event tells its end.

    A `Thread.join` that a signal interrupts takes the thread for ended in Python 3.10 to 3.12.
    """
    ended = threading.Event()

    def run_to_end() -> None:
        try:
            run()
        finally:
            ended.set()

    threading.Thread(target=run_to_end, name="sdonnx server", daemon=True).start()
    return ended


def _wait(ended: threading.Event) -> None:
    while not ended.wait(0.5):  # on Windows, a signal's handler waits for the end of this time
        pass


_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""The errors of an address that this machine does not have."""


def _listen_error(error: OSError, host: str, port: int) -> sdonnx.SdonnxError:
    if isinstance(error, socket.gaierror) or error.errno in _ABSENT:
        return sdonnx.RequestError(f"{host} is not an address of this machine; give another --host")
    reasons = {errno.EADDRINUSE: "is in use", errno.EACCES: "is not allowed to this user"}
    reason = reasons.get(error.errno or 0, f"can't be used ({error.strerror})")
    return sdonnx.SdonnxError(f"port {port} {reason}; give another --port")
