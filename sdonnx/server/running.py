"""What runs the jobs of a queue: the pipelines of this process, unless another `Runner` does."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.request import CompleteRequest

import sdonnx
from sdonnx.server.generation import GenerationJob
from sdonnx.server.images import ImageStore
from sdonnx.server.jobs import Job, Preview, State
from sdonnx.server.library import Library
from sdonnx.server.upscaling import UpscalingJob


class Runner(Protocol):
    """Runs jobs, each in a thread of the queue's."""

    @property
    def slots(self) -> int:
        """Jobs that it takes at once."""
        ...

    def run(self, job: Job, begin: Callable[[], bool]) -> None:
        """Run a job to its end; what it raises is why the job failed.

        ``begin`` is called once it runs, until when it waits; it returns False if the job was cancelled meanwhile.
        """
        ...

    def rest(self) -> None:
        """Free the memory of what is kept for the next job; none runs."""
        ...


MakeRunner = Callable[[Library, ImageStore], Runner]


class PipelineRunner(ABC):
    """Runs one job at a time, with the pipelines that the library has open."""

    slots = 1

    def __init__(self, library: Library) -> None:
        self.library = library

    def run(self, job: Job, begin: Callable[[], bool]) -> None:
        """Run a job to its end."""
        if not begin():
            return
        if job.is_cancelled:
            job.end(State.CANCELLED, step=0)
        elif isinstance(job, UpscalingJob):
            self._upscale(job)
        elif isinstance(job, GenerationJob):
            self._generate(job)

    def rest(self) -> None:
        """Close the pipelines."""
        self.library.close()

    @abstractmethod
    def save_result(self, job: GenerationJob, result: sdonnx.Result) -> list[str]:
        """Save the images of a generation; returns their names."""

    @abstractmethod
    def save_pngs(self, job: UpscalingJob, pngs: Sequence[bytes]) -> list[str]:
        """Save upscaled images; returns their names."""

    @abstractmethod
    def save_latents(self, job: GenerationJob, latents: Array, request: CompleteRequest, compute: str) -> str:
        """Save what a failed job has denoised; returns the end of its error."""

    def _upscale(self, job: UpscalingJob) -> None:
        pngs = job.run(self.library.upscaler)
        if pngs is None:
            job.end(State.CANCELLED, step=job.step)
        else:
            job.finish(self.save_pngs(job, pngs))

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
                job.finish(result, self.save_result(job, result))
        except sdonnx.SafetyError:  # without the latents
            raise
        except (sdonnx.SdonnxError, MemoryError) as error:
            if stream.latents is None:
                raise
            described = as_sdonnx_error(error)
            saved = self.save_latents(job, stream.latents, stream.latents_request, stream.compute)
            raise type(described)(f"{described}{saved}") from None
        finally:
            stream.close()


class LocalRunner(PipelineRunner):
    """Runs one job at a time, and stores its images."""

    def __init__(self, library: Library, store: ImageStore) -> None:
        super().__init__(library)
        self._store = store

    def save_result(self, job: GenerationJob, result: sdonnx.Result) -> list[str]:
        """Save the images of a generation."""
        return self._store.save(job.id, result)

    def save_pngs(self, job: UpscalingJob, pngs: Sequence[bytes]) -> list[str]:
        """Save upscaled images."""
        return self._store.save_pngs(job.id, dict(enumerate(pngs)))

    def save_latents(self, job: GenerationJob, latents: Array, request: CompleteRequest, compute: str) -> str:
        """Save latents beside the images."""
        return save_latents(self.library, self._store, job, latents, request, compute)


def save_latents(
    library: Library, store: ImageStore, job: GenerationJob, latents: Array, request: CompleteRequest, compute: str
) -> str:
    """Save what a failed job has denoised; the end of its error."""
    try:
        model = library.find(job.generation.selection.model).package.name
        name = store.save_latents(job.id, latents, request, model, compute)
    except sdonnx.SdonnxError as error:
        return f"; could not save latents either: {error}"
    safety = library.settings.safety
    option = "" if safety == "off" else f" --safety {safety}"
    return f"; latents saved beside the images; resume with: sdonnx decode {name}{option}"


def as_sdonnx_error(error: Exception) -> sdonnx.SdonnxError:
    """The error of a job, as clients read it."""
    if isinstance(error, sdonnx.SdonnxError):
        return error
    if isinstance(error, MemoryError):
        return sdonnx.DeviceError("out of memory; choose a smaller size")
    return sdonnx.SdonnxError("the generation failed for an unknown reason; the server's log has it")


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
