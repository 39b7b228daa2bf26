"""What a generation is asked for and what it gives back."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.manifest import Defaults

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

MAX_SEED = 2**63 - 1
"""The largest seed that every tool that reads a picture's recipe can hold."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A generation request; None stands for what the package suggests (and a random seed)."""

    prompt: str
    """What to draw."""
    negative_prompt: str = ""
    """What to keep away from; without effect at ``guidance_scale`` 1."""
    width: int | None = None
    """Pixels, a multiple of 8."""
    height: int | None = None
    """Pixels, a multiple of 8."""
    num_inference_steps: int | None = None
    """Denoising steps, 1 to the model's 1000."""
    guidance_scale: float | None = None
    """Classifier-free guidance, arXiv:2207.12598; 1 is none and halves the work."""
    seed: int | None = None
    """0 to 2**63 - 1; image i of several is made with ``seed + i``."""
    num_images: int = 1
    """Images to make, one after another."""
    sampler: str | None = None
    """A sampler: a key of SAMPLERS, a diffusers class, or AUTOMATIC1111's name, which may end in a schedule's."""
    schedule: str | None = None
    """How noise levels are laid: a key of RESPACED; None is as the package's scheduler config says."""


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Where the time went, in seconds."""

    load: Mapping[str, float] = field(default_factory=lambda: dict[str, float]())
    """Opening each component."""
    run: Mapping[str, float] = field(default_factory=lambda: dict[str, float]())
    """Running each component, over all its calls."""
    steps: tuple[float, ...] = ()
    """Each denoising step, image after image."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a generation made."""

    images: "tuple[Image, ...]"
    """RGB pictures."""
    seeds: tuple[int, ...]
    """The seed of each image."""
    latents: Array
    """(num_images, C, height / 8, width / 8), as the sampler left them."""
    request: Request
    """The request with every choice made."""
    model: str
    """Name of the package."""
    timings: Timings


def check_request(request: Request, *, multiple: int, defaults: Defaults, random_seed: int) -> Request:
    """The request with everything filled in but the sampler of a package that suggests none.

    Args:
        request: as the user gave it.
        multiple: what width and height must be a multiple of.
        defaults: what the package suggests.
        random_seed: the seed where none is given.

    Raises:
        RequestError: a value is out of its range.
    """
    for name in ("prompt", "negative_prompt"):
        if not isinstance(getattr(request, name), str):
            raise RequestError(f"{name} is {getattr(request, name)!r}; give a text")
    suggested = {
        "width": defaults.size,
        "height": defaults.size,
        "num_inference_steps": defaults.num_inference_steps,
        "guidance_scale": defaults.guidance_scale,
        "sampler": defaults.sampler,
        "seed": random_seed,
    }
    open_choices = {name: value for name, value in suggested.items() if getattr(request, name) is None}
    request = replace(request, **open_choices)
    _size("width", request.width, multiple)
    _size("height", request.height, multiple)
    _whole("num_inference_steps", request.num_inference_steps, 1, 1000)
    _whole("num_images", request.num_images, 1, 10_000)
    _whole("seed", request.seed, 0, MAX_SEED - request.num_images + 1)
    _finite("guidance_scale", request.guidance_scale)
    return request


def given(value: T | None) -> T:
    """What `check_request` has filled in.

    Raises:
        RequestError: the request was not checked.
    """
    if value is None:
        raise RequestError("the request was not checked; make it with Pipeline.stream or Pipeline.generate")
    return value


def _whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}; give a whole number from {low} to {high}")


def _finite(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise RequestError(f"{name} is {value!r}; give a finite number such as 7.5")


def _size(name: str, value: object, multiple: int) -> None:
    _whole(name, value, multiple, 16384)
    assert isinstance(value, int)  # noqa: S101 — for the type checker
    if value % multiple != 0:
        below = value // multiple * multiple
        raise RequestError(
            f"{name} {value} is not a multiple of {multiple}; the nearest are {below} and {below + multiple}"
        )
