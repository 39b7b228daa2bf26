"""Jobs that generate images."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from PIL import Image
from sdonnx_runtime.request import IMAGE_FIELDS, PACKAGE_FIELDS, CompleteRequest

import sdonnx
from sdonnx.server.jobs import Event, Job, Preview, State
from sdonnx.server.library import Selection

R = TypeVar("R", bound=sdonnx.Request)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a job generates."""

    request: sdonnx.Request
    selection: Selection
    preview_every: int = 1
    """Steps between previews; 0 makes none."""
    partial_images: int = 0
    """Previews of each image, at equal distances, that their events keep."""

    def is_partial(self, step: sdonnx.Progress) -> bool:
        """Whether the preview of this step is one of the ``partial_images``."""
        parts = self.partial_images + 1
        before, now = (each * parts // step.num_steps for each in (step.step, step.step + 1))
        return before < now < parts


class GenerationJob(Job):
    """A generation that is queued, runs, or has ended."""

    kind = "generation"

    def __init__(
        self, job_id: str, generation: Generation, resolved: CompleteRequest,
        on_event: Callable[[Job, Event], None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            job_id,
            model=generation.selection.model,
            num_images=resolved.num_images,
            size=(resolved.width, resolved.height),
            on_event=on_event,
        )
        self.generation = generation
        self.request = resolved
        """The request with every choice made, its seed included."""
        self.given_pixels = count_pixels(resolved)
        self.result: sdonnx.Result | None = None
        """Without images, which are files."""

    @property
    def kept(self) -> list[int]:
        """Which images are not refused, from 0; all before the safety checker has seen them."""
        refused = frozenset[int]() if self.result is None else self.result.refused
        return [index for index in range(self.num_images) if index not in refused]

    def advance(self, step: sdonnx.Progress, preview: Preview | None = None) -> None:
        """Note a denoising step that is done, and its preview."""
        self.note_step(
            image=step.image,
            step=step.step,
            num_steps=step.num_steps,
            seconds=step.seconds,
            preview=preview,
            keeps_preview=self.generation.is_partial(step),
        )
        if step.image + 1 == step.num_images and step.step + 1 == step.num_steps:
            self.note_decoding()

    def finish(self, result: sdonnx.Result, files: Sequence[str]) -> None:
        """Note that its images are on disk."""
        latents, request = result.latents[:0].copy(), forget_pixels(result.request)
        self.result, self.files = replace(result, images=(), latents=latents, request=request), tuple(files)
        seeds, safety = [result.seeds[index] for index in self.kept], [asdict(each) for each in result.safety]
        self.end(State.DONE, images=list(files), seeds=seeds, safety=safety)

    def end(self, state: State, **data: Any) -> None:
        """Enter a final state; the pixels that the request had are forgotten."""
        self.generation = replace(self.generation, request=forget_pixels(self.generation.request))
        self.request = forget_pixels(self.request)
        super().end(state, **data)


def count_pixels(request: sdonnx.Request) -> int:
    """Count the pixels of the images that a request has."""
    images = [getattr(request, name) for name in IMAGE_FIELDS]
    images += [each.image for name in PACKAGE_FIELDS for each in getattr(request, name)]
    return sum(each.width * each.height for each in images if each is not None)


_NO_PIXELS = Image.new("1", (1, 1))


def forget_pixels(request: R) -> R:
    """Replace the images of a request by one of a single pixel: it still says which it had."""
    images: dict[str, Any] = {name: _NO_PIXELS for name in IMAGE_FIELDS if getattr(request, name) is not None}
    images |= {
        name: tuple(replace(each, image=_NO_PIXELS) for each in getattr(request, name)) for name in PACKAGE_FIELDS
    }
    return replace(request, **images)
