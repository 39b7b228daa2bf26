"""The bounded queue of jobs, and the one thread that generates."""

import asyncio
import logging
import math
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import sdonnx
from sdonnx.server.errors import NotFound, QueueFull, ShuttingDown
from sdonnx.server.feed import Feed
from sdonnx.server.generation import Generation, GenerationJob, count_pixels
from sdonnx.server.images import ImageStore, is_job_id
from sdonnx.server.jobs import Job, Preview, State
from sdonnx.server.library import Library
from sdonnx.server.planning import Planner
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
    """Jobs in the order in which they came; one thread owns the pipelines and runs them one after another."""

    def __init__(self, library: Library, store: ImageStore) -> None:
        self.library, self.store, self.planner = library, store, Planner(library)
        self.feed = Feed()
        """Tells what the jobs do."""
        self.current: Job | None = None
        """The job that runs."""
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._condition = threading.Condition()
        self._closing = False
        self._worker = threading.Thread(target=self._work, name="sdonnx worker", daemon=True)

    def start(self) -> None:
        """Start the worker."""
        self._worker.start()

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
    def is_closing(self) -> bool:
        """Whether it takes no more jobs, and cancels those that it has."""
        return self._closing

    @property
    def seconds_until_room(self) -> int:
        """After how many seconds a client that was refused should ask again: once the running job has ended."""
        running = self.current
        seconds = 1 if running is None or running.eta is None else math.ceil(running.eta)
        return min(max(seconds, 1), _LONGEST_RETRY)

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
        """Cancel the job that runs, if there is one."""
        if (job := self.current) is not None:
            job.cancel()

    def shut_down(self) -> None:
        """Take no more jobs, and cancel what waits and what runs; returns at once, from any thread."""
        with self._condition:
            self._closing = True
            waiting = list(self._waiting)
            self._condition.notify()
        for job in waiting:
            self.cancel(job)
        self.interrupt()

    def close(self, timeout: float = 60) -> None:
        """Shut down, and wait until the worker has ended; finished images are on disk."""
        self.shut_down()
        if self._worker.is_alive():
            self._worker.join(timeout)
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
        while True:
            with self._condition:
                while not self._waiting and not self._closing:
                    if not self._condition.wait(_IDLE_SECONDS):
                        self.library.close()
                        self.planner.note_idle()
                if self._closing:
                    break
                self.current = job = self._waiting.popleft()
                job.state = State.RUNNING
            try:
                self._run(job)
            except Exception as error:  # the worker has to outlive every job
                if not isinstance(error, (sdonnx.SdonnxError, MemoryError)):
                    logger.exception("a job failed")
                job.error = self.library.public(_as_sdonnx_error(error))
                job.files = tuple(each.name for each in self.store.of_job(job.id))
                job.end(State.FAILED, error=str(job.error))
            finally:
                self.current = None
                self.planner.note_idle()
            self._log(job)
        self.library.close()

    def _log(self, job: Job) -> None:
        seconds = (job.ended or 0) - (job.started or 0)
        what = f"{job.model}, {job.num_images} x {job.size[0]}x{job.size[1]}"
        shows_prompt = self.library.settings.log_prompts
        prompt = f": {job.request.prompt!r}" if isinstance(job, GenerationJob) and shows_prompt else ""
        logger.info("job %s %s after %.1f s (%s)%s", job.id, job.state.value, seconds, what, prompt)

    def _run(self, job: Job) -> None:
        job.begin()
        if job.is_cancelled:
            job.end(State.CANCELLED, step=0)
        elif isinstance(job, UpscalingJob):
            self._upscale(job)
        elif isinstance(job, GenerationJob):
            self._generate(job)

    def _upscale(self, job: UpscalingJob) -> None:
        pngs = job.run(self.library.upscaler)
        if pngs is None:
            job.end(State.CANCELLED, step=job.step)
        else:
            job.finish(self.store.save_pngs(job.id, pngs))

    def _generate(self, job: GenerationJob) -> None:
        pipeline = self.library.open(job.generation.selection)
        resolved = pipeline.resolve(job.request)
        job.request = resolved.request  # whose prompts are drawn again, from files that may have changed
        stream = pipeline.stream(resolved)
        stream.on_opening(job.load)
        job.attach(stream.close)
        try:
            _follow(job, stream)
            result = _result(stream)
            if result is None:
                job.end(State.CANCELLED, step=job.step)
            else:
                _check_refusals(result)
                job.finish(result, self.store.save(job.id, result))
        except sdonnx.SafetyError:  # without the latents
            raise
        except (sdonnx.SdonnxError, MemoryError) as error:
            described = _as_sdonnx_error(error)
            raise type(described)(f"{described}{self._save_latents(job, stream)}") from None
        finally:
            stream.close()

    def _save_latents(self, job: GenerationJob, stream: sdonnx.Stream) -> str:
        """Save what a failed job has denoised; the end of its error."""
        if stream.latents is None:
            return ""
        try:
            model = self.library.find(job.generation.selection.model).package.name
            name = self.store.save_latents(job.id, stream.latents, stream.latents_request, model)
        except sdonnx.SdonnxError as error:
            return f"; could not save latents either: {error}"
        safety = self.library.settings.safety
        option = "" if safety == "off" else f" --safety {safety}"
        return f"; latents saved beside the images; resume with: sdonnx decode {name}{option}"


def _follow(job: GenerationJob, stream: sdonnx.Stream) -> None:
    """Generate, and note each step."""
    generation, every = job.generation, job.generation.preview_every
    for number, step in enumerate(stream, 1):
        is_due = generation.is_partial(step) or (every > 0 and number % every == 0)
        has_preview = is_due and step.projection is not None
        job.advance(step, Preview(number=number, step=step, size=job.size) if has_preview else None)


def _result(stream: sdonnx.Stream) -> sdonnx.Result | None:
    """The images of a stream that has ended; None if it was cancelled before it had them."""
    try:
        return stream.result
    except sdonnx.RequestError:
        return None


def _check_refusals(result: sdonnx.Result) -> None:
    """Raise SafetyError if every image is refused."""
    if len(result.refused) == len(result.images):
        scores = ", ".join(f"{each.score:.2f}" for each in result.safety)
        what = "the image is" if len(result.images) == 1 else f"all {len(result.images)} images are"
        raise sdonnx.SafetyError(f"{what} refused: {result.safety[0].checker} gives a score of {scores}")


def _as_sdonnx_error(error: Exception) -> sdonnx.SdonnxError:
    if isinstance(error, sdonnx.SdonnxError):
        return error
    if isinstance(error, MemoryError):
        return sdonnx.DeviceError("out of memory; choose a smaller size")
    return sdonnx.SdonnxError("the generation failed for an unknown reason; the server's log has it")


def _new_id() -> str:
    return secrets.token_hex(8)


def _id_is_taken(job_id: str) -> sdonnx.RequestError:
    return sdonnx.RequestError(f"there is a job '{job_id}' already; give it another id")
