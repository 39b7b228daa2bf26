"""The bounded queue of jobs, and the threads that let a runner run them."""

import asyncio
import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import sdonnx
from sdonnx.server.errors import NotFound, QueueFull, ShuttingDown
from sdonnx.server.feed import Feed
from sdonnx.server.generation import Generation, GenerationJob, count_pixels
from sdonnx.server.images import ImageStore, is_job_id
from sdonnx.server.jobs import Job, State
from sdonnx.server.library import Library
from sdonnx.server.planning import Planner
from sdonnx.server.running import Runner, as_sdonnx_error
from sdonnx.server.upscaling import Upscaling, UpscalingJob

logger = logging.getLogger(__name__)

_REMEMBERED, _WITH_PREVIEW = 200, 10
"""The latest ended jobs that are known, their images stay on disk; those of them that have a preview and all events."""

J = TypeVar("J", bound=Job)
T = TypeVar("T")

_IDLE_SECONDS = 300.0
"""After which the components that stay loaded for the next job are unloaded."""

_LONGEST_RETRY = 60
"""Seconds; OpenAI's clients don't wait for more than 120."""


class JobQueue:
    """Jobs in the order in which they came; a runner runs as many at once as it has slots, one without Ray."""

    def __init__(self, library: Library, store: ImageStore, runner: Runner) -> None:
        self.library, self.store, self.planner = library, store, Planner(library)
        self.feed = Feed()
        """Tells what the jobs do."""
        self._runner = runner
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._taken: set[Job] = set()
        """Those that a thread has, of which some still wait for their runner."""
        self._condition = threading.Condition()
        self._closing = False
        self._workers = [
            threading.Thread(target=self._work, name="sdonnx worker", daemon=True) for _ in range(runner.slots)
        ]

    def start(self) -> None:
        """Start the workers."""
        for worker in self._workers:
            worker.start()

    async def submit(self, generation: Generation, job_id: str | None = None) -> GenerationJob:
        """Check a generation, plan its memory, and queue it.

        Args:
            generation: what to generate.
            job_id: names the job; None makes a name.

        Raises:
            RequestError: the model does not support the request, there is a job of this name, or the memory that the
                server may use is too little; the message has the smallest that would do.
            QueueFull: too many jobs wait, or their images are too large.
            ShuttingDown: the server is about to end.
        """
        resolved = await self._check(lambda: self.planner.check(generation), count_pixels(generation.request), job_id)
        return self._append(GenerationJob(job_id or _new_id(), generation, resolved.request, self.feed.note))

    async def upscale(self, upscaling: Upscaling) -> UpscalingJob:
        """Check an upscaling, plan its memory, and queue it.

        Raises:
            RequestError: an upscaler is not served, or the memory that the server may use is too little.
            TooLarge: an image would have too many pixels.
            QueueFull, ShuttingDown: as `submit` does.
        """
        pixels = sum(each.width * each.height for each in upscaling.images)
        await self._check(lambda: self.planner.check_upscaling(upscaling), pixels)
        return self._append(UpscalingJob(_new_id(), upscaling, self.feed.note))

    async def _check(self, check: Callable[[], T], pixels: int, job_id: str | None = None) -> T:
        """Call a check of the planner where it belongs; before that, check that a job of so many pixels may wait."""
        self._check_room(pixels)
        if job_id is not None:
            await asyncio.to_thread(self._check_id, job_id)
        return await asyncio.get_running_loop().run_in_executor(self.planner.thread, check)

    def _append(self, job: J) -> J:
        """Let a job wait for its turn."""
        with self._condition:
            self._check_room(job.given_pixels)
            if job.id in self._jobs:
                raise _id_is_taken(job.id)
            self._forget_old()
            self._jobs[job.id] = job
            self._waiting.append(job)
            job.publish("queued", position=len(self._waiting))
            self._condition.notify()
        return job

    def find(self, job_id: str) -> Job:
        """Find a job by its id; raises NotFound."""
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFound("there is no such job")
        return job

    @property
    def jobs(self) -> Sequence[Job]:
        """All that are known, the oldest first."""
        return list(self._jobs.values())

    @property
    def waiting(self) -> Sequence[Job]:
        """Those that wait, the next one first."""
        return list(self._waiting)

    @property
    def running(self) -> Sequence[Job]:
        """Those that run, in the order in which they began."""
        return list(self._running)

    @property
    def current(self) -> Job | None:
        """The one that has been running for the longest time."""
        return next(iter(self.running), None)

    @property
    def is_closing(self) -> bool:
        """Whether it takes no more jobs, and cancels those that it has."""
        return self._closing

    @property
    def seconds_until_room(self) -> int:
        """After how many seconds a client that was refused should ask again: once a running job has ended."""
        etas = [job.eta for job in self.running if job.eta is not None]
        return min(max(math.ceil(min(etas, default=1)), 1), _LONGEST_RETRY)

    def cancel(self, job: Job) -> None:
        """Cancel a job; a running one stops within its current step."""
        with self._condition:
            if job in self._waiting:
                self._waiting.remove(job)
                job.cancel()
                job.end(State.CANCELLED)
                return
        if not job.state.is_final:
            job.cancel()

    def interrupt(self) -> None:
        """Cancel the job that has been running for the longest time, if there is one."""
        if (job := self.current) is not None:
            job.cancel()

    def shut_down(self) -> None:
        """Take no more jobs, and cancel what waits and what runs; returns at once, from any thread."""
        with self._condition:
            self._closing = True
            jobs = [*self._waiting, *self._running]
            self._condition.notify_all()
        for job in jobs:
            self.cancel(job)

    def close(self, timeout: float = 60) -> None:
        """Shut down, and wait until the workers have ended; finished images are on disk."""
        self.shut_down()
        deadline = time.monotonic() + timeout
        for worker in self._workers:
            if worker.is_alive():
                worker.join(max(0.0, deadline - time.monotonic()))
        self.feed.close()

    def _check_room(self, pixels: int) -> None:
        """Check that one more job may wait, which was given so many pixels."""
        settings = self.library.settings
        if self._closing:
            raise ShuttingDown("the server is shutting down; try again later")
        if len(self._waiting) >= settings.max_queued:
            raise QueueFull(f"{len(self._waiting)} jobs are waiting; try again later")
        waiting = sum(job.given_pixels for job in self._waiting)
        if pixels and waiting and pixels + waiting > settings.max_queued_pixels:
            most = settings.max_queued_pixels
            raise QueueFull(f"the images of the jobs that wait may have {most} pixels together; try again later")

    def _check_id(self, job_id: str) -> None:
        """Check the id that a client gave a job."""
        if not is_job_id(job_id):
            raise sdonnx.RequestError("the job's id is not valid; give up to 64 letters, digits and ()-_")
        if job_id in self._jobs or self.store.of_job(job_id):
            raise _id_is_taken(job_id)

    def _forget_old(self) -> None:
        ended = [job for job in self._jobs.values() if job.state.is_final]
        for job in ended[: -_REMEMBERED + 1]:
            del self._jobs[job.id]
        for job in ended[: -_WITH_PREVIEW + 1]:
            job.forget_previews()

    def _work(self) -> None:
        while (job := self._take()) is not None:
            try:
                self._runner.run(job, partial(self._begin, job))
            except Exception as error:  # the worker has to outlive every job
                self._fail(job, error)
            finally:
                self._release(job)
            if job.started is not None or job.error is not None:  # otherwise it was cancelled while it waited
                self._log(job)
        self._runner.rest()

    def _take(self) -> Job | None:
        """Wait for a job that no other thread has; None once the server ends."""
        with self._condition:
            while not self._closing:
                job = next((each for each in self._waiting if each not in self._taken), None)
                if job is not None:
                    self._taken.add(job)
                    return job
                if not self._condition.wait(_IDLE_SECONDS) and not self._running:
                    self._runner.rest()
                    self.planner.note_idle()
        return None

    def _begin(self, job: Job) -> bool:
        """Note that a job runs; whether it still wants to."""
        with self._condition:
            if job in self._running:  # it is run again
                return not job.is_cancelled
            if job not in self._waiting:
                return False
            self._waiting.remove(job)
            self._running.append(job)
            job.state = State.RUNNING
        job.begin()
        return True

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, (sdonnx.SdonnxError, MemoryError)):
            logger.error("a job failed", exc_info=error)
        with self._condition:
            if job in self._waiting:
                self._waiting.remove(job)
            elif job.state.is_final:
                return
        job.error = self.library.public(as_sdonnx_error(error))
        job.files = tuple(each.name for each in self.store.of_job(job.id))
        job.end(State.FAILED, error=str(job.error))

    def _release(self, job: Job) -> None:
        """Forget a job that has ended."""
        with self._condition:
            self._taken.discard(job)
            if job in self._running:
                self._running.remove(job)
            is_idle = not self._running
        if is_idle:
            self.planner.note_idle()

    def _log(self, job: Job) -> None:
        seconds = (job.ended or 0) - (job.started or job.created)
        what = f"{job.model}, {job.num_images} x {job.size[0]}x{job.size[1]}"
        shows_prompt = self.library.settings.log_prompts
        prompt = f": {job.request.prompt!r}" if isinstance(job, GenerationJob) and shows_prompt else ""
        logger.info("job %s %s after %.1f s (%s)%s", job.id, job.state.value, seconds, what, prompt)


def _new_id() -> str:
    return secrets.token_hex(8)


def _id_is_taken(job_id: str) -> sdonnx.RequestError:
    return sdonnx.RequestError(f"there is a job '{job_id}' already; give it another id")
