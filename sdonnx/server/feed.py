"""What all jobs do, told to every page that is open: who reads slowly misses steps, and nothing else."""

import asyncio
import threading
from collections.abc import AsyncIterator, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from sdonnx.server.jobs import FREQUENT, REST, Event, Job, wait_at_most

_MOST = 1000
"""Messages that wait for a follower; more end its stream, and the next one begins with the queue as it is then."""

_WITHIN_A_JOB = (*FREQUENT, "loading", "loaded", "decoding")
_REPLACED = (*_WITHIN_A_JOB, "jobs")
"""Kinds of which a newer message replaces one of the same job that still waits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Message:
    """What happened."""

    kind: str
    """Of an `Event` that says how a job goes on or ended; or ``jobs``, if another job runs or waits; or ``deleted``."""
    job: Job | None = None
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Of the event; of ``deleted`` the image's ``name``."""


class Feed:
    """Tells its followers what all jobs do."""

    def __init__(self) -> None:
        self._followers: tuple[Follower, ...] = ()
        self._is_closed = False

    @contextmanager
    def follow(self) -> Generator["Follower", None, None]:
        """Follow from now on, in the event loop; the first message is ``jobs``."""
        follower = Follower()
        follower.put(_JOBS)
        self._followers = (*self._followers, follower)
        try:
            if self._is_closed:
                follower.end()
            yield follower
        finally:
            self._followers = tuple(each for each in self._followers if each is not follower)

    def note(self, job: Job, event: Event) -> None:
        """Tell an event of a job; from any thread."""
        if event.kind not in ("queued", "running"):
            self.tell(Message(kind=event.kind, job=job, data=event.data))
        if event.kind not in _WITHIN_A_JOB:
            self.tell(_JOBS)

    def tell(self, message: Message) -> None:
        """Tell a message; from any thread."""
        for follower in self._followers:
            follower.put(message)

    def close(self) -> None:
        """End all streams once they have told what waits; from any thread."""
        self._is_closed = True
        for follower in self._followers:
            follower.end()


class Follower:
    """The messages that wait for one client."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._messages: dict[object, Message] = {}
        self._is_over = False
        self._changed, self._urgent = asyncio.Event(), asyncio.Event()

    def put(self, message: Message) -> None:
        """Add a message, in place of the one that it replaces; from any thread."""
        key = (message.kind, message.job) if message.kind in _REPLACED else message
        with self._lock:
            if self._is_over:
                return
            is_first, is_urgent = not self._messages, message.kind not in FREQUENT
            self._messages.pop(key, None)
            self._messages[key] = message
            is_full = len(self._messages) > _MOST
        if is_full:
            self.end()
        elif is_first or is_urgent:
            self._wake(is_urgent=is_urgent)

    def end(self) -> None:
        """Let the batches end after the next one; from any thread."""
        self._is_over = True
        self._wake(is_urgent=True)

    async def batches(self, quiet: float) -> AsyncIterator[list[Message]]:
        """Iterate over what happens: steps a few times a second, all else at once; empty after ``quiet`` seconds."""
        while True:
            await wait_at_most(self._urgent, REST)
            await wait_at_most(self._changed, quiet)
            with self._lock:
                found, is_over = list(self._messages.values()), self._is_over
                self._messages.clear()
                self._changed.clear()
                self._urgent.clear()
            yield found
            if is_over:
                return

    def _wake(self, *, is_urgent: bool) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._set, is_urgent)

    def _set(self, is_urgent: bool) -> None:
        self._changed.set()
        if is_urgent:
            self._urgent.set()


_JOBS = Message(kind="jobs")
