"""Whether a request can be served, and what it leaves open filled in."""

import math
from dataclasses import replace
from typing import cast

from PIL.Image import Image

from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.images.preprocess import FITS, MAX_SIDE, UPSCALERS, check_image, suitable_size, to_mask
from sdonnx_runtime.packages.manifest import NEEDED, Defaults
from sdonnx_runtime.request import IMAGE_FIELDS, Control, Request, passes
from sdonnx_runtime.sampling.registry import MAX_CHURN, SAMPLERS
from sdonnx_runtime.sampling.schedule import MAX_SIGMA, SPACINGS, listed
from sdonnx_runtime.sampling.sigmas import SCHEDULES
from sdonnx_runtime.text.prompt_schedule import schedule_prompts
from sdonnx_runtime.text.prompt_syntax import SYNTAXES, sections
from sdonnx_runtime.text.weighting import WEIGHTINGS

MAX_SEED = 2**63 - 1
"""The largest seed that every tool that reads a picture's recipe can hold."""


MAX_GUIDANCE = 1000
"""Far beyond any use, and far below where the arithmetic overflows."""


def check_request(
    request: Request,
    *,
    multiple: int,
    defaults: Defaults,
    random_seed: int,
    beside: str | None = None,
    refined: bool = False,
    controls: int = 0,
) -> Request:
    """The request with everything filled in but the sampler of a package that suggests none.

    Args:
        request: as the user gave it.
        multiple: what width and height must be a multiple of.
        defaults: what the package suggests.
        random_seed: the seed where none is given.
        beside: what the package's U-Net is given beside the latents, a key of BESIDE.
        refined: whether there is a refiner.
        controls: how many ControlNets and T2I-Adapters there are.

    Raises:
        RequestError: a value is out of its range.
    """
    for name in ("prompt", "negative_prompt"):
        _text(name, getattr(request, name))
    request = _check_pictures(request, multiple, defaults, edits=beside == "picture")
    request = _check_beside(request, beside)
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
    request = _check_refiner(request, refined=refined)
    _check_sizes(request)
    _check_controls(request, controls)
    _check_interval("guidance_interval", request.guidance_interval, "noise level", MAX_SIGMA)
    _check_interval("guidance_steps", request.guidance_steps, "share", 1)
    _whole("reuse", request.reuse, 1, 1000)
    _flag("token_downsampling", request.token_downsampling)
    _check_variation(request)
    _check_prompts(request, edits=beside == "picture")
    return _check_hires(request, multiple)


def check_recipe(request: Request) -> None:
    """Finds out whether a request, without its pictures, is one that `check_request` has filled in.

    Raises:
        RequestError: it is not.
    """
    for name in ("width", "height", "num_inference_steps", "guidance_scale", "seed", "sampler"):
        if getattr(request, name) is None:
            raise RequestError(f"{name} is missing")
    asked = replace(request, strength=None, padding_mask_crop=None, image_guidance_scale=None, refiner_start=None)
    asked = replace(asked, control_guess=False)
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
    for name, low, most in (
        ("strength", 0, 1),
        ("eta", 0, 1),
        ("s_churn", 0, MAX_CHURN),
        ("s_noise", 0, MAX_CHURN),
        ("image_guidance_scale", -MAX_GUIDANCE, MAX_GUIDANCE),
        ("refiner_start", 0, 1),
    ):
        if getattr(request, name) is not None:
            _number(name, getattr(request, name), low, most)


def _check_prompts(request: Request, *, edits: bool) -> None:
    for name, value, known in (
        ("prompt_syntax", request.prompt_syntax, SYNTAXES),
        ("weighting", request.weighting, (*WEIGHTINGS,)),
    ):
        if value not in known:
            raise RequestError(f"{name} is {value!r}; choose {', '.join(known)}")
    if request.clip_skip is not None:
        _whole("clip_skip", request.clip_skip, 1, 100)
    said = schedule_prompts([request])
    if edits and len(said.weights) > 1:
        raise RequestError("the prompt has an AND, but the model edits pictures; give it one text")
    for rows in set(said.passes[0]):
        for text in (rows.negative, *rows.conditional):
            sections(text, request.prompt_syntax)


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


def _check_interval(name: str, interval: object, of: str, highest: float) -> None:
    if interval is None:
        return
    if not isinstance(interval, tuple) or len(cast("tuple[object, ...]", interval)) != 2:
        raise RequestError(f"{name} is {interval!r}; give two {of}s, the lower one first")
    low, high = cast("tuple[float, float]", interval)
    for value in (low, high):
        _number(f"{name}'s {of}", value, 0, highest)
    if low >= high:
        raise RequestError(f"{name} is {interval!r}; give the lower {of} first")


def _check_variation(request: Request) -> None:
    if request.variation is None:
        return
    if not isinstance(request.variation, tuple) or len(request.variation) != 2:  # pyright: ignore[reportUnnecessaryIsInstance, reportUnnecessaryComparison]
        raise RequestError(f"variation is {request.variation!r}; give a seed and a strength, such as (7, 0.2)")
    seed, strength = request.variation
    _whole("variation's seed", seed, 0, MAX_SEED - request.num_images + 1)
    _number("variation's strength", strength, 0, 1)


def _check_beside(request: Request, beside: str | None) -> Request:
    """With the guidance by a picture filled in, of a model that is given one."""
    for name in NEEDED.get(str(beside), ()):
        if getattr(request, name) is None:
            raise RequestError(f"the model is given a {name} beside the latents, and there is none; give one")
    if request.depth_image is not None and beside != "depth":
        raise RequestError("depth_image is given, but the model takes none; leave it out, or take a depth model")
    if request.image_guidance_scale is not None and beside != "picture":
        raise RequestError("image_guidance_scale is given, but the model edits no picture; leave it out")
    if beside is not None and request.hires_scale is not None:
        raise RequestError("hires_scale is given with a model that sees a picture beside the latents; leave it out")
    if beside != "picture":
        return request
    if request.image_guidance_scale is None:
        request = replace(request, image_guidance_scale=1.5)
    _number("image_guidance_scale", request.image_guidance_scale, -MAX_GUIDANCE, MAX_GUIDANCE)
    return request


def _check_refiner(request: Request, *, refined: bool) -> Request:
    """With the refiner's start filled in, where there is one."""
    if not refined:
        if request.refiner_start is not None:
            raise RequestError("refiner_start is given without a refiner; load one beside the package")
        return request
    if request.refiner_start is None:
        request = replace(request, refiner_start=0.8)
    _number("refiner_start", request.refiner_start, 0, 1)
    return request


def _check_controls(request: Request, count: int) -> None:
    controls = request.controls
    if type(controls) is not tuple or not all(type(each) is Control for each in cast("tuple[object, ...]", controls)):
        raise RequestError(f"controls is {type(controls).__name__}; give a tuple of Control")
    if len(request.controls) != count:
        raise RequestError(
            f"there are {len(request.controls)} controls in the request and {count} loaded; give one for each"
        )
    for index, control in enumerate(request.controls):
        name, image = f"controls[{index}]", cast("object", control.image)
        if not isinstance(image, Image):
            raise RequestError(
                f"{name}.image is {type(image).__name__}; give a picture of PIL, such as Image.open gives"
            )
        check_image(f"{name}.image", image)
        _number(f"{name}.scale", control.scale, -10, 10)
        _number(f"{name}.start", control.start, 0, 1)
        _number(f"{name}.end", control.end, 0, 1)
        if control.start >= control.end:
            raise RequestError(f"{name} starts at {control.start:g} and ends at {control.end:g}; give an end after it")
        if request.padding_mask_crop is not None and request.image is not None and image.size != request.image.size:
            raise RequestError(f"{name}.image has another size than the image, of which it must show the same part")
    _flag("control_guess", request.control_guess)
    if request.control_guess and count == 0:
        raise RequestError("control_guess is given without a ControlNet; load one beside the package")


def _check_sizes(request: Request) -> None:
    """SDXL's."""
    for name, low in (("original_size", 1), ("target_size", 1), ("crop_top_left", 0)):
        pair: object = getattr(request, name)
        if pair is None:
            continue
        if not isinstance(pair, tuple) or len(cast("tuple[object, ...]", pair)) != 2:
            raise RequestError(f"{name} is {pair!r}; give two whole numbers")
        for side in cast("tuple[object, object]", pair):
            _whole(f"{name}'s side", side, low, MAX_SIDE)
    for name in ("aesthetic_score", "negative_aesthetic_score"):
        _number(name, getattr(request, name), 0, 10)


def _check_pictures(request: Request, multiple: int, defaults: Defaults, *, edits: bool = False) -> Request:
    """With strength and, where there is a picture, width and height filled in.

    A model that ``edits`` pictures begins with noise all the same, so that there is no strength.
    """
    image, mask = request.image, request.mask_image
    if request.fit not in FITS:
        raise RequestError(f"fit is {request.fit!r}; choose {', '.join(FITS)}")
    _flag("paste", request.paste)
    _whole("mask_blur", request.mask_blur, 0, 1024)
    for name in IMAGE_FIELDS:
        picture: object = getattr(request, name)
        if picture is not None and not isinstance(picture, Image):
            raise RequestError(f"{name} is {type(picture).__name__}; give a picture of PIL, such as Image.open gives")
        if picture is not None:
            check_image(name, picture)
    if image is None:
        for name in ("strength", "mask_image", "padding_mask_crop"):
            if getattr(request, name) is not None:
                raise RequestError(f"{name} is given without an image; give the picture that it is about")
        return request
    if (request.width is None) != (request.height is None):
        raise RequestError("width and height are given or left out together where there is an image")
    if mask is not None:
        _check_mask(mask, image)
    if edits:
        if request.strength is not None or mask is not None:
            raise RequestError("the model edits the whole picture and begins with noise; leave out strength and mask")
    else:
        request = replace(request, strength=_strength(request))
    _check_region(request)
    if request.width is None and request.padding_mask_crop is None:
        width, height = suitable_size(image, area=defaults.size**2, multiple=multiple)
        request = replace(request, width=width, height=height)
    return request


def _strength(request: Request) -> float:
    usual = 0.75 if request.mask_image is None else 1.0
    strength = usual if request.strength is None else request.strength
    _number("strength", strength, 0, 1)
    return strength


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
    if to_mask(mask).getbbox() is None:
        raise RequestError("the mask has nothing to repaint; paint white what is to be made anew")


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise RequestError(f"{name} is {value!r}; give a text")
    try:
        value.encode()
    except UnicodeEncodeError:  # bytes that were no UTF-8 on the command line, say
        raise RequestError(f"{name} is {value!r:.80}, which is no Unicode text; give one, as UTF-8") from None


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}; give True or False")


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
