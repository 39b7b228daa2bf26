"""Many requests over several servers: each takes the next one when it is free."""

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import sdonnx
from sdonnx.client.connection import ServerError, UnavailableError, not_sdonnx
from sdonnx.client.server import MALFORMED, Event, Packages, Selection, Server

PATIENCE = 120.0
"""Seconds after which a server that can't be reached is given up."""

_DELAYS = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds between attempts to reach a server, the last one again and again."""

_MAX_LOSSES = 3
"""Attempts that a request may lose with their servers; the next one would be lost too."""

Prepare: TypeAlias = Callable[[], dict[str, Any]]
"""Makes the body of a request for ``POST /api/jobs``, or raises SdonnxError; called again for another attempt."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """Something that happened."""

    server: Server


@dataclass(frozen=True, kw_only=True)
class Advanced(Update):
    """A job's event."""

    event: Event


@dataclass(frozen=True, kw_only=True)
class Previewed(Update):
    """A preview."""

    png: bytes


@dataclass(frozen=True, kw_only=True)
class Lost(Update):
    """A server can't be reached, or is given up."""

    error: ServerError
    is_final: bool


@dataclass(frozen=True, kw_only=True)
class Finished(Update):
    """A request's images."""

    index: int
    """Which request."""
    answer: dict[str, Any]
    """The job, as the server describes it."""
    images: list[bytes]
    """PNG files."""


@dataclass(frozen=True, kw_only=True)
class Failed(Update):
    """A request is invalid, or its job failed."""

    index: int
    error: sdonnx.SdonnxError | MemoryError


@dataclass(frozen=True, kw_only=True)
class _Crashed(Update):
    """A thread met an error that nobody expected."""

    error: Exception


class Pool:
    """Servers that generate together."""

    def __init__(self, servers: Sequence[Server], selection: Selection, *, previews: bool = False) -> None:
        self.servers, self.selection, self.previews = servers, selection, previews
        self._checked = set[Server]()
        """Servers that have been there since they were last looked for."""
        self.packages = self._connect()
        """What all servers have of the selection."""
        self._condition = threading.Condition()
        self._waiting: deque[tuple[int, Prepare]] = deque()
        self._running: dict[Server, str] = {}
        self._losses = Counter[int]()
        self._updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        self._over = threading.Event()

    def _connect(self) -> Packages:
        """Look for the packages on every server; those that are not there may come later, if one is."""
        found: dict[Server, Packages] = {}
        absent: UnavailableError | None = None
        for server in self.servers:
            try:
                found[server] = server.find_packages(self.selection)
            except UnavailableError as error:
                absent = error
        if absent is not None and not found:
            raise absent
        self._checked.update(found)
        (first, packages), *others = found.items()
        for server, other in others:
            _check_same(first, packages, server, other)
        return packages

    def run(self, requests: Sequence[Prepare]) -> Generator[Update, None, None]:
        """Generate the requests' images, the first ones first; closing the generator cancels the jobs that run.

        Raises:
            ServerError: no server is left.
        """
        self._waiting.extend(enumerate(requests))
        threads = [
            threading.Thread(target=self._work, args=(server,), name=str(server), daemon=True)
            for server in self.servers
        ]
        open_requests, open_servers = len(requests), len(threads)
        try:
            for thread in threads:
                thread.start()
            while open_requests:
                update = self._next_update()
                if isinstance(update, _Crashed):
                    raise update.error
                open_requests -= isinstance(update, (Finished, Failed))
                yield update
                if isinstance(update, Lost) and update.is_final:
                    open_servers -= 1
                    if not open_servers:
                        raise ServerError(f"no server is left; {update.error}")
        finally:
            self._stop(threads)

    def _next_update(self) -> Update:
        while True:
            try:
                return self._updates.get(timeout=0.5)  # forever could not be interrupted on Windows
            except queue.Empty:
                continue

    def _stop(self, threads: Sequence[threading.Thread]) -> None:
        """Cancel what runs, and wait a little for the threads."""
        with self._condition:
            self._over.set()
            running = dict(self._running)
            self._condition.notify_all()
        cancelling = [
            threading.Thread(target=server.cancel, args=(job,), daemon=True) for server, job in running.items()
        ]
        for thread in cancelling:
            thread.start()
        until = time.monotonic() + (5 if running else 0.5)
        for thread in (*cancelling, *threads):
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self, server: Server) -> None:
        """Take requests as long as there are any; wait longer and longer for a server that is not there."""
        failures, lost_at = 0, None
        try:
            while not self._over.is_set():
                try:
                    if server not in self._checked:
                        self._check(server)
                    lost_at = None
                    self._generate_next(server)
                    failures = 0
                except UnavailableError as error:
                    self._checked.discard(server)
                    lost_at = time.monotonic() if lost_at is None else lost_at
                    if time.monotonic() - lost_at > PATIENCE:
                        raise ServerError(f"{error} (given up after {PATIENCE:.0f} s)") from None
                    if not failures and error.kind != "full":
                        self._updates.put(Lost(server=server, error=error, is_final=False))
                    delay = _DELAYS[min(failures, len(_DELAYS) - 1)]
                    failures += 1
                    self._over.wait(delay if error.retry_after is None else min(error.retry_after, _DELAYS[-1]))
        except ServerError as error:
            self._updates.put(Lost(server=server, error=error, is_final=True))
        except Exception as error:  # the thread that reads the updates raises it
            self._updates.put(_Crashed(server=server, error=error))

    def _check(self, server: Server) -> None:
        """Check that a server is there again, with the same packages, and cancel what it may still generate."""
        try:
            _check_same(self.servers[0], self.packages, server, server.find_packages(self.selection))
        except ServerError:
            raise
        except sdonnx.SdonnxError as error:
            raise UnavailableError(str(error), "broken") from None
        with self._condition:
            job = self._running.pop(server, None)
        if job is not None:
            server.cancel(job)
        self._checked.add(server)

    def _generate_next(self, server: Server) -> None:
        """Take a request and generate its images; what a server can't finish, another one may."""
        taken = self._take()
        if taken is None:
            return
        index, prepare = taken
        try:
            update = self._generate(server, index, prepare)
        except ServerError as error:
            self._losses[index] += isinstance(error, UnavailableError) and error.kind == "broken"
            if self._losses[index] < _MAX_LOSSES:
                self._give_back(taken)
            else:
                reason = sdonnx.SdonnxError(f"{_MAX_LOSSES} attempts were lost with their servers; {error}")
                self._updates.put(Failed(server=server, index=index, error=reason))
            raise
        except (sdonnx.SdonnxError, MemoryError) as error:
            update = Failed(server=server, index=index, error=error)
        with self._condition:
            self._running.pop(server, None)
        self._updates.put(update)

    def _take(self) -> tuple[int, Prepare] | None:
        """The next request, once there is one; None at the end."""
        with self._condition:
            while not self._waiting and not self._over.is_set():
                self._condition.wait()
            return None if self._over.is_set() else self._waiting.popleft()

    def _give_back(self, taken: tuple[int, Prepare]) -> None:
        with self._condition:
            self._waiting.appendleft(taken)
            self._condition.notify()

    def _generate(self, server: Server, index: int, prepare: Prepare) -> Finished:
        """Generate the images of a request."""
        body = {**prepare(), "model": self.packages.model, "preview_every": int(self.previews)}
        if self.selection.vae is not None:
            body["vae"] = self.selection.vae
        try:
            answer = self._run_job(server, body)
            images = [server.image(each["name"]) for each in answer["images"]]
        except sdonnx.SdonnxError:
            raise
        except MALFORMED:
            raise not_sdonnx(server.address) from None
        return Finished(server=server, index=index, answer=answer, images=images)

    def _run_job(self, server: Server, body: dict[str, Any]) -> dict[str, Any]:
        """Queue a job and follow it to its end; returns what the server tells of it."""
        job = server.submit(body)
        with self._condition:
            self._running[server] = job
        if self._over.is_set():
            server.cancel(job)
        for event in server.follow(job):
            self._updates.put(Advanced(server=server, event=event))
            if event.kind == "preview" and self.previews:
                with suppress(sdonnx.RequestError):
                    self._updates.put(Previewed(server=server, png=server.preview(job)))
        answer = server.job(job)
        if answer["state"] == "failed":
            raise sdonnx.SdonnxError(str(answer["error"]))
        if answer["state"] != "done":
            raise UnavailableError(f"{server} cancelled the job", "broken")
        return answer


def _check_same(first: Server, packages: Packages, second: Server, others: Packages) -> None:
    """Check that two servers have the same packages; raises ServerError."""
    if packages.titles != others.titles:
        has, have = (", ".join(each.titles) for each in (packages, others))
        raise ServerError(f"{first} has {has}, {second} {have}; serve the same packages, and name the model with -m")
