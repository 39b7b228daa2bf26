"""Check requests: each field by its `FieldSpec`, then the rules between fields."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from PIL.Image import Image

from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.field_spec import FieldSpec
from sdonnx_runtime.images.preprocess import MAX_SIDE, UPSCALERS, check_image, suitable_size, to_mask
from sdonnx_runtime.packages.concat import CONCAT, ConcatConditioning
from sdonnx_runtime.packages.manifest import Defaults, Manifest
from sdonnx_runtime.request import CONTROL_FIELDS, FIELDS, IP_ADAPTER_FIELDS, MAX_SEED, Control, IPAdapter, Request
from sdonnx_runtime.sampling.schedule import parse_numbers


def check_names(names: Iterable[str]) -> None:
    """Check that a request has fields of these names, or raise RequestError."""
    unknown = [name for name in names if name not in FIELDS]
    if unknown:
        raise RequestError(f"a request has no '{unknown[0]}'; its fields are {', '.join(FIELDS)}")


def check_folder(name: str, folder: Path | None, contents: str) -> None:
    """Check that a folder of ``contents`` is one, if there is one; or raise RequestError."""
    if folder is not None and not folder.is_dir():
        raise RequestError(f"{name} {folder} is not a directory; give the folder of the {contents}")


def check_fields(request: Request) -> Request:
    """Check each field by its `FieldSpec`, or raise RequestError; returns it with tuples where it has lists."""
    for name, spec in FIELDS.items():
        if spec.kind is float and spec.many and getattr(request, name) is not None:
            request = replace(request, **{name: parse_numbers(name, getattr(request, name))})
        elif spec.kind is str and spec.many:
            request = replace(request, **{name: _parse_texts(name, getattr(request, name))})
        else:
            _check_value(name, getattr(request, name), spec)
    for field, specs in {"controls": CONTROL_FIELDS, "ip_adapters": IP_ADAPTER_FIELDS}.items():
        for index, item in enumerate(getattr(request, field)):
            for name, spec in specs.items():
                _check_value(f"{field}[{index}].{name}", getattr(item, name), spec)
    return request


def _check_value(name: str, value: object, spec: FieldSpec) -> None:
    if value is None and spec.optional:
        return
    if spec.kind is tuple:
        _check_tuple(name, value, spec)
    elif spec.kind in (Control, IPAdapter):
        if not isinstance(value, tuple) or any(type(each) is not spec.kind for each in cast("tuple[object]", value)):
            kind = spec.kind.__name__
            raise RequestError(f"{name} is {type(cast('object', value)).__name__}; give a tuple of {kind}")
    elif spec.kind is Image:
        check_image(name, value)
    elif spec.kind is bool:
        if not isinstance(value, bool):
            raise RequestError(f"{name} is {value!r}; give True or False")
    elif spec.kind is str:
        _check_text(name, value, spec.choices)
    else:
        _check_number(name, value, spec.kind, *spec.ranges[0])


def _check_text(name: str, value: object, choices: tuple[str, ...]) -> None:
    if choices and value not in choices:
        raise RequestError(f"{name} is {value!r}; choose {', '.join(choices)}")
    if not isinstance(value, str):
        raise RequestError(f"{name} is {value!r}; give a text")
    try:
        value.encode()
    except UnicodeEncodeError:  # bytes that were no UTF-8 on the command line, say
        raise RequestError(f"{name} is {value!r:.80}, which is not valid Unicode; give UTF-8") from None


def _parse_texts(name: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        raise RequestError(f"{name} is {value!r:.100}; give a list of texts")
    texts = tuple(cast("list[object]", value))
    for index, text in enumerate(texts):
        _check_text(f"{name}[{index}]", text, ())
    return texts


def _check_number(name: str, value: object, kind: type, low: float, high: float) -> None:
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    whole = kind is int
    if (whole and not isinstance(number, int)) or not low <= number <= high:
        raise RequestError(f"{name} is {value!r}; give a {'whole ' * whole}number from {low} to {high}")


def _check_tuple(name: str, value: object, spec: FieldSpec) -> None:
    items = cast("tuple[object, ...]", value) if isinstance(value, tuple) else ()
    if len(items) != len(spec.items):
        raise RequestError(f"{name} is {value!r}; give a tuple of {len(spec.items)} numbers")
    for index, (item, kind, limits) in enumerate(zip(items, spec.items, spec.ranges, strict=True)):
        _check_number(f"{name}[{index}]", item, kind, *limits)


def check_request(
    request: Request, manifest: Manifest, *, random_seed: int, has_refiner: bool, num_controls: int,
    num_ip_adapters: int = 0,
    upscaler: str | None = None,
) -> Request:  # fmt: skip
    """Check a request for a package and fill in every choice but a sampler that the package doesn't suggest.

    ``upscaler`` is the name of the pipeline's.

    Raises:
        RequestError: a value is out of its range, or fields contradict each other or the package.
    """
    defaults, multiple, kind = manifest.defaults, manifest.latents.downscale, manifest.conditions.concat
    concat = None if kind is None else CONCAT[kind]
    request = check_fields(request)
    request = _check_images(request, multiple, defaults, edits=concat is not None and concat.edits)
    request = _check_concat(request, concat)
    steps = request.sigmas if request.sigmas is not None else request.timesteps
    request = _fill(
        request,
        width=defaults.sides[0],
        height=defaults.sides[1],
        num_inference_steps=defaults.num_inference_steps if steps is None else len(steps),
        guidance_scale=defaults.guidance_scale,
        sampler=defaults.sampler,
        seed=random_seed,
        refiner_start=0.8 if has_refiner else None,
    )
    check_size("width", request.width, multiple)
    check_size("height", request.height, multiple)
    if request.refiner_start is not None and not has_refiner:
        raise RequestError("refiner_start requires a refiner; load one with --refiner (refiner=)")
    seeds = {"seed": request.seed, "variation[0]": 0 if request.variation is None else request.variation[0]}
    for name, seed in seeds.items():
        _check_number(name, seed, int, 0, MAX_SEED - request.num_images + 1)
    _check_spans("controls", request.controls, num_controls)
    _check_controls(request, num_controls)
    _check_spans("ip_adapters", request.ip_adapters, num_ip_adapters)
    for name in ("guidance_interval", "guidance_steps"):
        interval: tuple[float, float] | None = getattr(request, name)
        if interval is not None and interval[0] >= interval[1]:
            raise RequestError(f"{name} is {interval!r}; give the lower number first")
    return _check_hires(request, upscaler)


def _fill(request: Request, **choices: Any) -> Request:
    """Replace fields that are None."""
    return replace(request, **{name: each for name, each in choices.items() if getattr(request, name) is None})


def check_size(name: str, value: int | None, multiple: int) -> None:
    """Check that a side is a multiple of ``multiple`` and at most MAX_SIDE; raises RequestError."""
    _check_number(name, value, int, multiple, MAX_SIDE)
    if value is not None and value % multiple != 0:
        below = value // multiple * multiple
        raise RequestError(
            f"{name} {value} is not a multiple of {multiple}; the nearest are {below} and {below + multiple}"
        )


def _check_hires(request: Request, upscaler: str | None) -> Request:
    """Fill in the second pass's strength and upscaler, where there is one."""
    if request.hires_scale is None:
        for name in ("hires_strength", "hires_upscaler", "hires_steps"):
            if getattr(request, name) is not None:
                raise RequestError(f"{name} requires hires_scale; give an upscale factor, such as 2")
        return request
    if request.mask_image is not None:
        raise RequestError("hires_scale does not support mask_image; upscale the image before or after inpainting")
    if request.hires_steps is not None and (request.sigmas is not None or request.timesteps is not None):
        raise RequestError("hires_steps does not support sigmas or timesteps, which both passes use; leave it out")
    choices = UPSCALERS if upscaler is None else (*UPSCALERS, upscaler)
    if request.hires_upscaler is not None and request.hires_upscaler not in choices:
        other = "" if upscaler is not None else ", or load an upscaler with --hires-upscaler PACKAGE (upscaler=)"
        raise RequestError(f"hires_upscaler is {request.hires_upscaler!r:.200}; choose {', '.join(choices)}{other}")
    return _fill(request, hires_strength=0.55, hires_upscaler="latent" if upscaler is None else upscaler)


def _check_concat(request: Request, concat: ConcatConditioning | None) -> Request:
    """Fill in the image guidance scale of a model that edits images."""
    for name in () if concat is None or concat.repaints_all else concat.images:
        if getattr(request, name) is None:
            raise RequestError(f"this model requires {name}; none was given")
    for each in CONCAT.values():
        for name in each.own_fields:
            if getattr(request, name) is not None and each is not concat:
                raise RequestError(f"{name} is only supported by {each.kind} models; leave it out")
    if concat is not None and concat.edits and request.hires_scale is not None:
        raise RequestError(f"hires_scale is not supported by {concat.kind} models; leave it out")
    return _fill(request, image_guidance_scale=1.5) if concat is not None and concat.edits else request


def _check_spans(name: str, given: Sequence[Control | IPAdapter], count: int) -> None:
    """Check that there is one for each that is loaded, and that each starts before it ends."""
    if len(given) != count:
        raise RequestError(f"the request has {len(given)} {name}, and {count} are loaded; give one for each")
    for index, each in enumerate(given):
        if each.start >= each.end:
            span = f"starts at {each.start:g} and ends at {each.end:g}"
            raise RequestError(f"{name}[{index}] {span}; give an end after it")


def _check_controls(request: Request, count: int) -> None:
    cropped = None if request.padding_mask_crop is None else request.image
    for index, control in enumerate(request.controls):
        if cropped is not None and control.image.size != cropped.size:
            raise RequestError(
                f"controls[{index}].image has another size than image; padding_mask_crop crops both alike"
            )
    if request.control_guess and count == 0:
        raise RequestError("control_guess requires a ControlNet; load one with --control (controls=)")


def _check_images(request: Request, multiple: int, defaults: Defaults, *, edits: bool) -> Request:
    """Fill in strength and, where there is an image, width and height."""
    image, mask = request.image, request.mask_image
    if image is None:
        for name in ("strength", "mask_image", "padding_mask_crop"):
            if getattr(request, name) is not None:
                raise RequestError(f"{name} requires image")
        return request
    if (request.width is None) != (request.height is None):
        raise RequestError("with image, width and height are both required, or neither")
    if mask is not None:
        _check_mask(mask, image)
    if not edits:
        request = _fill(request, strength=0.75 if mask is None else 1.0)
    elif request.strength is not None or mask is not None:
        raise RequestError("pix2pix models do not support strength and mask_image; leave them out")
    if request.padding_mask_crop is not None:
        if mask is None:
            raise RequestError("padding_mask_crop requires mask_image")
        if not request.paste:
            raise RequestError("padding_mask_crop requires paste; leave it on")
        if request.tiling is not None:
            raise RequestError("padding_mask_crop does not support tiling, since a crop does not tile; leave one out")
    elif request.width is None:
        width, height = suitable_size(image, area=defaults.area, multiple=multiple)
        request = replace(request, width=width, height=height)
    return request


def _check_mask(mask: Image, image: Image) -> None:
    if mask.size != image.size:
        size, expected = (f"{width}x{height}" for width, height in (mask.size, image.size))
        raise RequestError(f"mask_image has {size} pixels, image has {expected}; give a mask of the image's size")
    if to_mask(mask).getbbox() is None:
        raise RequestError("the mask is empty (no white pixels); paint white what is to be repainted")
