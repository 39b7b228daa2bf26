"""What a generation is asked for and what it gives back."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from PIL.Image import Image

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.manifest import Defaults
from sdonnx_runtime.pictures import FITS, MAX_SIDE, UPSCALERS, check_picture, mask_of, suitable_size
from sdonnx_runtime.samplers import MAX_CHURN, SAMPLERS
from sdonnx_runtime.schedule import SPACINGS, listed
from sdonnx_runtime.sigmas import SCHEDULES

T = TypeVar("T")

MAX_SEED = 2**63 - 1
"""The largest seed that every tool that reads a picture's recipe can hold."""

MAX_GUIDANCE = 1000
"""Far beyond any use, and far below where the arithmetic overflows."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A generation request; None stands for what the package suggests (and a random seed)."""

    prompt: str
    """What to draw."""
    negative_prompt: str = ""
    """What to keep away from; without effect at ``guidance_scale`` 1."""
    width: int | None = None
    """Pixels, a multiple of the package's `Latents.downscale` (8 for Stable Diffusion).

    With an ``image`` None is what `suitable_size` makes of its size."""
    height: int | None = None
    """Pixels, a multiple as ``width``; given or left out together with ``width`` where there is an ``image``."""
    num_inference_steps: int | None = None
    """Denoising steps, 1 to the model's 1000."""
    guidance_scale: float | None = None
    """Classifier-free guidance, arXiv:2207.12598, -1000 to 1000; 1 is none and halves the work."""
    seed: int | None = None
    """0 to 2**63 - 1; image i of several is made with ``seed + i``, unless there is a ``variation``."""
    variation: tuple[int, float] | None = None
    """(seed, strength): all noise goes from ``seed``'s towards this one's by a share from 0 to 1.

    At 1 the picture is that of the variation's seed. Image i of several goes towards that of the variation's
    seed + i."""
    num_images: int = 1
    """Images to make, one after another."""
    sampler: str | None = None
    """A sampler: a key of SAMPLERS, a diffusers class, or AUTOMATIC1111's name, which may end in a schedule's."""
    schedule: str | None = None
    """How noise levels are laid: a name of SCHEDULES; None is as the package's scheduler config says."""
    spacing: str | None = None
    """How timesteps are spaced: leading, linspace or trailing; None is as the package's scheduler config says."""
    sigmas: tuple[float, ...] | None = None
    """The noise level of each step, decreasing, up to 1e6; instead of ``num_inference_steps`` and the two above."""
    timesteps: tuple[float, ...] | None = None
    """The timestep of each step, decreasing; instead of ``num_inference_steps`` and the two above."""
    eta: float | None = None
    """0 to 1: how much noise comes in with each step, for samplers that have a choice; None is the sampler's own."""
    s_churn: float | None = None
    """0 to 1000: how much noise comes in over all of euler's steps, arXiv:2206.00364, algorithm 2."""
    s_noise: float | None = None
    """0 to 1000: what the noise that comes in is multiplied by."""
    guidance_rescale: float = 0.0
    """0 to 1: how much of the spread that guidance adds is taken back, arXiv:2305.08891, section 3.4."""
    image: Image | None = field(default=None, repr=False)
    """A picture to start from; transparent parts lie on white."""
    strength: float | None = None
    """0 to 1, with an ``image``: the share of the steps that is taken, from as much noise. 0 only encodes and decodes.

    None is 0.75, or 1 with a mask."""
    fit: str = "crop"
    """How an ``image`` of other proportions is brought to the size: one of FITS."""
    mask_image: Image | None = field(default=None, repr=False)
    """White where the ``image`` is painted anew, of its size; transparent parts are kept."""
    mask_blur: int = 4
    """Pixels over which what is pasted fades out towards the mask's edge, inwards."""
    paste: bool = True
    """Whether pixels that the mask keeps are the ``image``'s own, bit by bit, and not what the VAE makes of them.

    If so, latent cells are made anew that the mask touches; if not, those whose first pixel it has, as in diffusers."""
    padding_mask_crop: int | None = None
    """Pixels: works only in the mask and so many around it, at width and height, and puts that into the ``image``.

    Width and height are then the model's where they are left out. None works in the whole ``image``."""
    hires_scale: float | None = None
    """1 to 8: makes the picture, enlarges it so many times, and goes over it once more at that size as img2img does."""
    hires_strength: float | None = None
    """0 to 1: the second pass' ``strength``; None is 0.55."""
    hires_steps: int | None = None
    """The steps that ``hires_strength`` is a share of; None is ``num_inference_steps``."""
    hires_upscaler: str | None = None
    """One of UPSCALERS: latent interpolates the latents bilinearly; lanczos decodes, enlarges the pixels, and encodes.

    None is latent."""


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
    """(num_images, C, height / `Latents.downscale`, width / `Latents.downscale`), as the sampler left them."""
    request: Request
    """The request with every choice made."""
    model: str
    """Name of the package."""
    timings: Timings


def recipe(request: Request) -> dict[str, Any]:
    """The request without its pictures, as JSON can hold it."""
    values = {item.name: getattr(request, item.name) for item in fields(request)}
    return {name: value for name, value in values.items() if name not in ("image", "mask_image")}


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
        _text(name, getattr(request, name))
    request = _check_pictures(request, multiple, defaults)
    for name in ("sigmas", "timesteps"):
        if getattr(request, name) is not None:
            request = replace(request, **{name: listed(name, getattr(request, name))})
    steps = request.sigmas if request.sigmas is not None else request.timesteps
    suggested = {
        "width": defaults.size,
        "height": defaults.size,
        "num_inference_steps": defaults.num_inference_steps if steps is None else len(steps),
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
    _number("guidance_scale", request.guidance_scale, -MAX_GUIDANCE, MAX_GUIDANCE)
    _number("guidance_rescale", request.guidance_rescale, 0, 1)
    _check_variation(request)
    return _check_hires(request, multiple)


def _check_hires(request: Request, multiple: int) -> Request:
    """With the second pass' choices made, where there is one; ``hires_steps`` where the first one's are counted."""
    chosen = {"hires_strength": 0.55, "hires_upscaler": "latent"}
    if request.hires_scale is None:
        for name in (*chosen, "hires_steps"):
            if getattr(request, name) is not None:
                raise RequestError(f"{name} is given without a hires_scale; give how many times larger, such as 2")
        return request
    if request.mask_image is not None:
        raise RequestError("hires_scale is given with a mask_image; enlarge the picture first, or afterwards")
    request = replace(request, **{name: value for name, value in chosen.items() if getattr(request, name) is None})
    _number("hires_scale", request.hires_scale, 1, 8)
    _number("hires_strength", request.hires_strength, 0, 1)
    if request.hires_upscaler not in UPSCALERS:
        raise RequestError(f"hires_upscaler is {request.hires_upscaler!r}; choose {' or '.join(UPSCALERS)}")
    if request.hires_steps is not None:
        _whole("hires_steps", request.hires_steps, 1, 1000)
        if request.sigmas is not None or request.timesteps is not None:
            raise RequestError("hires_steps is given with sigmas or timesteps, which both passes take; leave it out")
    second = passes(request, multiple)[1]
    _size("the second pass' width", second.width, multiple)
    _size("the second pass' height", second.height, multiple)
    return request


def passes(request: Request, multiple: int) -> list[Request]:
    """What a checked request does one after another: itself, and img2img of what that gave, where it has a second pass.

    The second pass' sides are the nearest multiples of ``multiple``.
    """
    if request.hires_scale is None:
        return [request]
    nothing = dict.fromkeys(("hires_scale", "hires_strength", "hires_steps", "hires_upscaler"))
    width, height = (
        round(given(side) * request.hires_scale / multiple) * multiple for side in (request.width, request.height)
    )
    steps = request.num_inference_steps if request.hires_steps is None else request.hires_steps
    second = {"width": width, "height": height, "strength": request.hires_strength, "num_inference_steps": steps}
    return [replace(request, **nothing), replace(request, **{**nothing, **second})]


def check_recipe(request: Request) -> None:
    """Finds out whether a request, without its pictures, is one that `check_request` has filled in.

    Raises:
        RequestError: it is not.
    """
    for name in ("width", "height", "num_inference_steps", "guidance_scale", "seed", "sampler"):
        if getattr(request, name) is None:
            raise RequestError(f"{name} is missing")
    asked = replace(request, strength=None, padding_mask_crop=None)
    check_request(asked, multiple=1, defaults=Defaults(size=1), random_seed=0)
    for name, value, known in (
        ("sampler", request.sampler, (*SAMPLERS,)),
        ("schedule", request.schedule, (None, *SCHEDULES)),
        ("spacing", request.spacing, (None, *SPACINGS)),
    ):
        if value not in known:
            raise RequestError(f"there is no {name} {value!r}")
    if request.padding_mask_crop is not None:
        _whole("padding_mask_crop", request.padding_mask_crop, 0, MAX_SIDE)
    for name, most in (("strength", 1), ("eta", 1), ("s_churn", MAX_CHURN), ("s_noise", MAX_CHURN)):
        if getattr(request, name) is not None:
            _number(name, getattr(request, name), 0, most)


def _check_variation(request: Request) -> None:
    if request.variation is None:
        return
    if not isinstance(request.variation, tuple) or len(request.variation) != 2:  # pyright: ignore[reportUnnecessaryIsInstance, reportUnnecessaryComparison]
        raise RequestError(f"variation is {request.variation!r}; give a seed and a strength, such as (7, 0.2)")
    seed, strength = request.variation
    _whole("variation's seed", seed, 0, MAX_SEED - request.num_images + 1)
    _number("variation's strength", strength, 0, 1)


def _check_pictures(request: Request, multiple: int, defaults: Defaults) -> Request:
    """With strength and, where there is a picture, width and height filled in."""
    image, mask = request.image, request.mask_image
    if request.fit not in FITS:
        raise RequestError(f"fit is {request.fit!r}; choose {', '.join(FITS)}")
    if not isinstance(request.paste, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RequestError(f"paste is {request.paste!r}; give True or False")
    _whole("mask_blur", request.mask_blur, 0, 1024)
    if image is None:
        for name in ("strength", "mask_image", "padding_mask_crop"):
            if getattr(request, name) is not None:
                raise RequestError(f"{name} is given without an image; give the picture that it is about")
        return request
    for name, picture in {"image": image, "mask_image": mask}.items():
        if picture is not None and not isinstance(picture, Image):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RequestError(f"{name} is {type(picture).__name__}; give a picture of PIL, such as Image.open gives")
        if picture is not None:
            check_picture(name, picture)
    if (request.width is None) != (request.height is None):
        raise RequestError("width and height are given or left out together where there is an image")
    if mask is not None:
        _check_mask(mask, image)
    if request.strength is None:
        request = replace(request, strength=0.75 if mask is None else 1.0)
    _number("strength", request.strength, 0, 1)
    _check_region(request)
    if request.width is None and request.padding_mask_crop is None:
        width, height = suitable_size(image, area=defaults.size**2, multiple=multiple)
        request = replace(request, width=width, height=height)
    return request


def _check_region(request: Request) -> None:
    if request.padding_mask_crop is None:
        return
    _whole("padding_mask_crop", request.padding_mask_crop, 0, MAX_SIDE)
    if request.mask_image is None:
        raise RequestError("padding_mask_crop is given without a mask_image; give the mask that it goes around")
    if not request.paste:
        raise RequestError(
            "padding_mask_crop is given with paste off, but puts what it made into the picture; leave paste on"
        )


def _check_mask(mask: Image, image: Image) -> None:
    if mask.size != image.size:
        found, wanted = (f"{width}x{height}" for width, height in (mask.size, image.size))
        raise RequestError(f"the mask has {found} pixels and its picture {wanted}; give one of the picture's size")
    if mask_of(mask).getbbox() is None:
        raise RequestError("the mask has nothing to repaint; paint white what is to be made anew")


def seeds_of(request: Request) -> tuple[int, ...]:
    """The seed of each image of a checked request."""
    first, count = given(request.seed), request.num_images
    return (first,) * count if request.variation is not None else tuple(range(first, first + count))


def of_image(request: Request, index: int) -> Request:
    """The checked request that makes image ``index`` alone."""
    variation = request.variation
    return replace(
        request,
        seed=seeds_of(request)[index],
        num_images=1,
        variation=None if variation is None else (variation[0] + index, variation[1]),
    )


def given(value: T | None) -> T:
    """What `check_request` has filled in.

    Raises:
        RequestError: the request was not checked.
    """
    if value is None:
        raise RequestError("the request was not checked; make it with Pipeline.stream or Pipeline.generate")
    return value


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise RequestError(f"{name} is {value!r}; give a text")
    try:
        value.encode()
    except UnicodeEncodeError:  # bytes that were no UTF-8 on the command line, say
        raise RequestError(f"{name} is {value!r:.80}, which is no Unicode text; give one, as UTF-8") from None


def _whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}; give a whole number from {low} to {high}")


def _number(name: str, value: object, low: float, high: float) -> None:
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not low <= number <= high:
        raise RequestError(f"{name} is {value!r}; give a number from {low} to {high}")


def _size(name: str, value: object, multiple: int) -> None:
    _whole(name, value, multiple, MAX_SIDE)
    assert isinstance(value, int)  # noqa: S101 — for the type checker
    if value % multiple != 0:
        below = value // multiple * multiple
        raise RequestError(
            f"{name} {value} is not a multiple of {multiple}; the nearest are {below} and {below + multiple}"
        )
