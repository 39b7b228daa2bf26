"""What a server and its replicas tell each other: which job to run, and how it goes on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from sdonnx_runtime.arrays import Array
from sdonnx_runtime.request import CompleteRequest

import sdonnx
from sdonnx.server.generation import Generation, GenerationJob, forget_pixels
from sdonnx.server.jobs import Event, Job, Preview
from sdonnx.server.upscaling import Upscaling, UpscalingJob


@dataclass(frozen=True, kw_only=True)
class Order:
    """A job for a replica."""

    id: str
    work: Generation | Upscaling
    """A generation is without the pixels of its images, which ``request`` has."""
    request: CompleteRequest | None
    """Of a generation, with every choice made."""
    digests: Mapping[str, str]
    """SHA-256 of the packages that it takes, by their served names."""

    @classmethod
    def of(cls, job: Job, digests: Mapping[str, str]) -> "Order":
        """The order for a job of the server's queue."""
        if isinstance(job, GenerationJob):
            work = replace(job.generation, request=forget_pixels(job.generation.request))
            return cls(id=job.id, work=work, request=job.request, digests=digests)
        assert isinstance(job, UpscalingJob)  # noqa: S101 — for the type checker
        return cls(id=job.id, work=job.upscaling, request=None, digests=digests)

    def make_job(self, on_event: Callable[[Job, Event], None]) -> Job:
        """Make the job that the replica runs."""
        if isinstance(self.work, Upscaling):
            return UpscalingJob(self.id, self.work, on_event)
        assert self.request is not None  # noqa: S101 — for the type checker
        return GenerationJob(self.id, self.work, self.request, on_event)


@dataclass(frozen=True, kw_only=True)
class Latents:
    """What a job that failed has denoised."""

    latents: Array = field(repr=False)
    """(num_images, C, h, w)."""
    request: CompleteRequest
    compute: str
    """As of `Result`."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """How a job goes on at its replica."""

    kind: str
    """Of an `Event`."""
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Of the event."""
    request: CompleteRequest | None = None
    """With the prompts that were drawn there, and without pixels; None: as before."""
    preview: Preview | None = None
    """Of a ``step``."""
    result: sdonnx.Result | None = None
    """Of a generation that is ``done``, without images."""
    pngs: Mapping[int, bytes] = field(default_factory=dict[int, bytes], repr=False)
    """The images of a job that is ``done``, by their index; refused ones are left out."""
    error: sdonnx.SdonnxError | None = None
    """Of a job that ``failed``."""
    latents: Latents | None = None
    """Of a generation that ``failed`` after its steps."""
    is_unfit: bool = False
    """Whether it ``failed`` because the node's packages are not the server's, and another replica can run it."""


_NOTHING = np.zeros((1, 0, 0, 0), np.float32)


def portable(preview: Preview) -> Preview:
    """A preview with what makes its image, and nothing else."""
    step = replace(preview.step, latents=_NOTHING, denoised=preview.step.denoised, decoder=None)
    return Preview(number=preview.number, step=step, size=preview.size)


def follow(job: Job, update: Update) -> None:
    """Let a job of the server's queue go on as the one at its replica does, until that ends."""
    if update.request is not None and isinstance(job, GenerationJob):
        job.request = update.request
    data = update.data
    if update.kind in ("loading", "loaded"):
        job.load(data["component"] if update.kind == "loading" else None)
    elif update.kind == "decoding":
        job.note_decoding()
    elif update.kind == "step":
        step, preview = data["step"] - 1, update.preview
        keeps = preview is not None and isinstance(job, GenerationJob) and job.generation.is_partial(preview.step)
        job.note_step(
            image=data["image"],
            step=step,
            num_steps=data["num_steps"],
            seconds=data["seconds"],
            preview=preview,
            keeps_preview=keeps,
        )
