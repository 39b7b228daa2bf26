"""Jobs, with their state and their events, which any thread may write and the event loop reads."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from itertools import chain
from typing import Any

import sdonnx
from sdonnx.server.images import encode_preview

_KEPT_STEPS = 100
"""Events of steps and previews that are kept of each job: those who read slowly miss older ones."""

REST = 0.1
"""Seconds after a batch of events in which steps don't wake a follower: each batch takes time from the job."""

_SMOOTHING = 0.2
"""The weight of the latest step in the seconds of a step, from which the time left is."""


class State(Enum):
    """What became of a job so far."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether the job has ended."""
        return self not in (State.QUEUED, State.RUNNING)


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A preview of a job, which is not made until somebody looks at it."""

    number: int
    """Of the step, from 1, counted over all images of the job."""
    step: sdonnx.Progress = field(repr=False)
    size: tuple[int, int]
    """Width and height in pixels of the image to be."""

    @cached_property
    def png(self) -> bytes:
        """As a PNG of this size."""
        return encode_preview(self.step.preview(), self.size)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a job."""

    number: int
    """From 1, in each job."""
    kind: str
    """``queued``, ``running``, ``loading``, ``loaded``, ``step``, ``preview``, ``decoding`` or a final state."""
    data: dict[str, Any]
    """For JSON."""
    preview: Preview | None = field(default=None, repr=False)
    """Of a ``preview`` that is one of the ``partial_images``."""


class Job:
    """Something that is queued, runs, or has ended."""

    kind = "job"
    """What it does, for clients."""

    def __init__(
        self, job_id: str, *, model: str, num_images: int, size: tuple[int, int],
        on_event: "Callable[[Job, Event], None] | None" = None,
    ) -> None:  # fmt: skip
        self.id = job_id
        self.model = model
        """The served name of what makes the images."""
        self.num_images = num_images
        self.size = size
        """Width and height of the images that it is to make, in pixels."""
        self.given_pixels = 0
        """Pixels of the images that it was given, as long as it has them."""
        self.state = State.QUEUED
        self.created = time.time()
        """Seconds since 1970, as ``started`` and ``ended``."""
        self.started: float | None = None
        self.ended: float | None = None
        self.image = 0
        """Which of its images is being denoised, from 0."""
        self.step = 0
        """Steps of this image that are done."""
        self.num_steps = 0
        """Steps of each image; 0 before the first."""
        self.seconds_per_step: float | None = None
        self.loading: str | None = None
        """The component that is being loaded."""
        self.is_decoding = False
        self.preview: Preview | None = None
        self.files: tuple[str, ...] = ()
        """Names of the finished images in the `ImageStore`."""
        self.error: sdonnx.SdonnxError | None = None
        self._on_event = on_event
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._steps: deque[Event] = deque(maxlen=_KEPT_STEPS)
        self._published = 0
        self._followers: dict[asyncio.Event, bool] = {}
        """What wakes each, and whether steps wake it too."""
        self._loop = asyncio.get_running_loop()
        self._stop: Callable[[], None] | None = None
        self._is_cancelled = False

    @property
    def progress(self) -> float:
        """The share of the steps that is done, 0 to 1."""
        if self.state is State.DONE:
            return 1.0
        total = self.num_steps * self.num_images
        return (self.image * self.num_steps + self.step) / total if total else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds until its steps are done; None while unknown."""
        if self.seconds_per_step is None or self.num_steps == 0:
            return None
        left = self.num_steps * self.num_images * (1 - self.progress)
        return self.seconds_per_step * left

    def cancel(self) -> None:
        """Stop it within the current step, or before it starts; from any thread, any number of times."""
        with self._lock:
            self._is_cancelled = True
            stop = self._stop
        if stop is not None:
            stop()

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody cancelled it, though it may not have stopped yet."""
        return self._is_cancelled

    def attach(self, stop: Callable[[], None]) -> None:
        """Let `cancel` stop what runs now, with a call from any thread."""
        with self._lock:
            self._stop = stop
            is_cancelled = self._is_cancelled
        if is_cancelled:
            stop()

    def detach(self) -> None:
        """Forget what runs, with all that it holds."""
        with self._lock:
            self._stop = None

    def publish(self, kind: str, **data: Any) -> None:
        """Add an event, and wake those who follow the job."""
        self._add(kind, data)
        self._wake(is_step=False)

    def _add(self, kind: str, data: dict[str, Any], preview: Preview | None = None) -> None:
        """Add an event; of the many of steps and previews the latest are kept."""
        with self._lock:
            self._published += 1
            event = Event(number=self._published, kind=kind, data=data, preview=preview)
            (self._steps if kind in FREQUENT else self._events).append(event)
        if self._on_event is not None:
            self._on_event(self, event)

    def _wake(self, *, is_step: bool) -> None:
        with self._lock:
            woken = [each for each, with_steps in self._followers.items() if with_steps or not is_step]
        if woken:
            with suppress(RuntimeError):  # the loop has ended, and with it all who follow
                self._loop.call_soon_threadsafe(_set_all, woken)

    def begin(self) -> None:
        """Note that the worker took it."""
        self.started = time.time()
        self.publish("running", model=self.model)

    def load(self, component: str | None) -> None:
        """Note which component is being loaded; None: it is."""
        before, self.loading = self.loading, component
        if component is None:
            self.publish("loaded", component=before)
        else:
            self.publish("loading", component=component)

    def note_step(
        self, *, image: int, step: int, num_steps: int, seconds: float,
        preview: Preview | None = None, keeps_preview: bool = False,
    ) -> None:  # fmt: skip
        """Note a step of an image that is done, both from 0, and the seconds that it took."""
        self.image, self.step, self.num_steps = image, step + 1, num_steps
        before = self.seconds_per_step
        self.seconds_per_step = seconds if before is None else before + _SMOOTHING * (seconds - before)
        data = {
            "image": image,
            "num_images": self.num_images,
            "step": step + 1,
            "num_steps": num_steps,
            "seconds": round(seconds, 4),
            "eta": self.eta,
            "progress": self.progress,
        }
        self.preview = self.preview if preview is None else preview
        self._add("step", data)
        if preview is not None:
            self._add("preview", {"number": preview.number}, preview if keeps_preview else None)
        self._wake(is_step=True)

    def note_decoding(self) -> None:
        """Note that its steps are done."""
        self.is_decoding = True
        self.publish("decoding")

    def restart(self) -> None:
        """Note that it is run again, from its first step."""
        self.detach()
        self.image = self.step = 0
        self.loading, self.is_decoding, self.preview = None, False, None

    def end(self, state: State, **data: Any) -> None:
        """Enter a final state."""
        self.detach()
        self.given_pixels = 0
        self.ended, self.state = time.time(), state
        self.publish(state.value, **data)

    def forget_previews(self) -> None:
        """Drop the preview and the events of the steps: it ended a while ago."""
        with self._lock:
            self.preview = None
            self._steps.clear()

    async def batches(self, after: int = 0, *, quiet: float | None = None) -> AsyncIterator[list[Event]]:
        """Follow the job's events, also those that have been, from the one after this number to the last.

        Steps come several at once if they are fast, other events without delay. After so many ``quiet`` seconds comes
        an empty batch.
        """
        changed = asyncio.Event()
        try:
            while True:
                changed.clear()
                with self._lock:
                    batch = [each for each in chain(self._events, self._steps) if each.number > after]
                    self._followers[changed] = not batch
                if batch:
                    batch.sort(key=lambda event: event.number)
                    after = batch[-1].number
                    yield batch
                    if batch[-1].kind in _FINAL:
                        return
                    await wait_at_most(changed, REST)
                elif not await wait_at_most(changed, quiet):
                    yield []
        finally:
            with self._lock:
                self._followers.pop(changed, None)

    async def events(self) -> AsyncIterator[Event]:
        """Follow the job's events one by one, as `batches` does."""
        async for batch in self.batches():
            for event in batch:
                yield event

    async def wait(self) -> None:
        """Wait until it has ended."""
        changed = asyncio.Event()
        with self._lock:
            self._followers[changed] = False
        try:
            while not self.state.is_final:
                await changed.wait()
                changed.clear()
        finally:
            with self._lock:
                del self._followers[changed]


def _set_all(events: Iterable[asyncio.Event]) -> None:
    for event in events:
        event.set()


async def wait_at_most(event: asyncio.Event, timeout: float | None) -> bool:
    """Wait for an event, at most so many seconds."""
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(event.wait(), timeout)
    return event.is_set()


_FINAL = {state.value for state in State if state.is_final}

FREQUENT = ("step", "preview")
"""Kinds of events that come with each step."""
