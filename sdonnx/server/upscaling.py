"""Upscaling of images: by a filter, or by an upscaler package as a job."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from PIL import Image
from sdonnx_runtime.execution.devices.computing import coarsest
from sdonnx_runtime.execution.session import Cancelled
from sdonnx_runtime.images.preprocess import to_rgb
from sdonnx_runtime.outputs.metadata import encode_upscaled
from sdonnx_runtime.outputs.provenance import XMP_KEY, read_xmp

import sdonnx
from sdonnx.server.errors import TooLarge
from sdonnx.server.infotext import read_infotext
from sdonnx.server.jobs import Event, Job, State

FILTERS: Mapping[str, Image.Resampling] = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}
"""Upscalers that are no packages: Pillow's filters."""

RunPackage = Callable[[str, Image.Image, float], Image.Image]
"""Upscales with a package: its served name, the image, and the factor."""


@dataclass(frozen=True, kw_only=True)
class Upscaling:
    """Images, and how they are upscaled."""

    images: tuple[Image.Image, ...] = field(default=(), repr=False)
    """As `given_image` makes them."""
    upscaler: str
    """A key of FILTERS, or an upscaler package's served name."""
    second: str | None = None
    """Another upscaler, whose result is blended over the first one's."""
    share: float = 0.0
    """What the second one counts, 0 to 1."""
    scale: float = 2.0
    """Factor by which each side is enlarged, unless there is a ``box``."""
    box: tuple[int, int] | None = None
    """Width and height that the image is enlarged to cover."""
    crop: bool = True
    """Whether what is outside of the box is cut off, on both sides alike."""

    @property
    def packages(self) -> tuple[str, ...]:
        """The served names of the packages that it takes."""
        return tuple(each for each in (self.upscaler, self.second) if each is not None and each not in FILTERS)

    def factor(self, image: Image.Image) -> float:
        """The factor by which an image is enlarged."""
        return self.scale if self.box is None else max(self.box[0] / image.width, self.box[1] / image.height)

    def size(self, image: Image.Image) -> tuple[int, int]:
        """The width and height to which an image is enlarged, before it is cropped."""
        return max(1, round(image.width * self.factor(image))), max(1, round(image.height * self.factor(image)))

    def final_size(self, image: Image.Image) -> tuple[int, int]:
        """The width and height that an image becomes."""
        return self.box if self.box is not None and self.crop else self.size(image)

    def check(self, image: Image.Image, max_pixels: int) -> None:
        """Check that an image becomes one of at most so many pixels.

        Raises:
            RequestError: the box has no pixels.
            TooLarge: the image would have more, or none.
        """
        if self.box is not None and min(self.box) < 1:
            raise sdonnx.RequestError(
                f"{self.box[0]}x{self.box[1]} has no pixels; give a width and a height of 1 or more"
            )
        factor = self.factor(image)
        if not 0 < factor * max(image.size) <= max_pixels or factor**2 * image.width * image.height > max_pixels:
            raise TooLarge(f"the image would have more than {max_pixels} pixels, or none; choose another size")

    def run(self, image: Image.Image, run_package: RunPackage | None = None) -> Image.Image:
        """Upscale one of the images; ``run_package`` is for those that take a package."""
        upscaled = self._enlarge(self.upscaler, image, run_package)
        if self.second is None:
            return upscaled
        return Image.blend(upscaled, self._enlarge(self.second, image, run_package), self.share)

    def _enlarge(self, upscaler: str, image: Image.Image, run_package: RunPackage | None) -> Image.Image:
        size = self.size(image)
        if run_package is None or upscaler in FILTERS:
            upscaled = image.resize(size, FILTERS[upscaler])
        else:
            upscaled = run_package(upscaler, image, self.factor(image))
        if upscaled.size != size:
            upscaled = upscaled.resize(size, Image.Resampling.LANCZOS)
        if self.box is None or not self.crop:
            return upscaled
        left, top = (upscaled.width - self.box[0]) // 2, (upscaled.height - self.box[1]) // 2
        return upscaled.crop((left, top, left + self.box[0], top + self.box[1]))


def given_image(image: Image.Image) -> Image.Image:
    """Convert a client's image to RGB, unless it is RGBA, with no texts but sdonnx', AUTOMATIC1111's and XMP."""
    texts = {"parameters": read_infotext(image), "sdonnx": image.info.get("sdonnx"), XMP_KEY: read_xmp(image)}
    given = image if image.mode in ("RGB", "RGBA") else to_rgb(image)
    given.info = {key: text for key, text in texts.items() if isinstance(text, str)}
    return given


class UpscalingJob(Job):
    """An upscaling by packages that is queued, runs, or has ended."""

    kind = "upscaling"

    def __init__(self, job_id: str, upscaling: Upscaling, on_event: Callable[[Job, Event], None] | None = None) -> None:
        images, size = upscaling.images, upscaling.final_size(upscaling.images[0])
        super().__init__(job_id, model=upscaling.packages[0], num_images=len(images), size=size, on_event=on_event)
        self.upscaling = upscaling
        self._computed = set[str]()
        self.given_pixels = sum(each.width * each.height for each in images)

    def run(self, open_upscaler: Callable[[str], sdonnx.Upscaler]) -> list[bytes] | None:
        """Upscale the images to PNG files; None if it was cancelled meanwhile."""
        pngs, model = list[bytes](), open_upscaler(self.model).package.name
        try:
            for index, image in enumerate(self.upscaling.images):
                upscaled = self.upscaling.run(image, partial(self._upscale, open_upscaler, index))
                factor, compute = self.upscaling.factor(image), coarsest(self._computed)
                pngs.append(encode_upscaled(upscaled, image, scale=factor, model=model, compute=compute))
        except Cancelled:
            return None
        finally:
            self.detach()
        return pngs

    def _upscale(
        self, open_upscaler: Callable[[str], sdonnx.Upscaler], index: int, name: str, image: Image.Image, factor: float
    ) -> Image.Image:
        """Upscale an image with one of the packages, of which each takes as many steps."""
        packages, before = self.upscaling.packages, time.perf_counter()

        def note_tile(done: int, total: int) -> None:
            nonlocal before
            if self.is_cancelled:
                raise Cancelled("the job was cancelled")
            seconds, before = time.perf_counter() - before, time.perf_counter()
            step, num_steps = packages.index(name) * total + done - 1, len(packages) * total
            self.note_step(image=index, step=step, num_steps=num_steps, seconds=seconds)

        upscaler = open_upscaler(name)
        self.attach(upscaler.cancel)
        upscaled = upscaler.upscale(image, scale=factor, on_tile=note_tile)
        self._computed.add(upscaler.compute)
        return upscaled

    def finish(self, files: Sequence[str]) -> None:
        """Note that its images are on disk."""
        self.files = tuple(files)
        self.end(State.DONE, images=list(files), seeds=[])

    def end(self, state: State, **data: Any) -> None:
        """Enter a final state; the images that it was given are forgotten."""
        self.upscaling = replace(self.upscaling, images=())
        super().end(state, **data)
