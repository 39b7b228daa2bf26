"""JSON to a `Generation`: the keys are those of `Request`, by `FIELDS`, with images in base64."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

from PIL.Image import Image
from sdonnx_runtime.field_spec import FieldSpec
from sdonnx_runtime.images.canny import canny
from sdonnx_runtime.images.preprocess import UPSCALERS
from sdonnx_runtime.request import CONTROL_FIELDS, FIELDS, IP_ADAPTER_FIELDS

import sdonnx
from sdonnx.server.generation import Generation
from sdonnx.server.images import decode_image
from sdonnx.server.library import Library, Selection
from sdonnx.server.native.bodies import check_keys, take

KEYS = (*FIELDS, "model", "vae", "preview_every")
"""The keys of a job."""

CONTROL_KEYS = ("package", "preprocessor", *CONTROL_FIELDS)
"""The keys of one of its ``controls``."""

IP_ADAPTER_KEYS = ("package", *IP_ADAPTER_FIELDS)
"""The keys of one of its ``ip_adapters``."""

PREPROCESSORS: Mapping[str, Callable[[Image], Image]] = {"none": lambda image: image, "canny": canny}
"""What makes a conditioning image of an image."""


def parse_generation(data: Mapping[str, Any], library: Library) -> Generation:
    """Make the generation of an object with KEYS; `Pipeline.resolve` checks the values of its request.

    Raises:
        RequestError: an image can't be decoded, or a key or a type is wrong.
        NotFound: a package is not served.
    """
    max_pixels = library.settings.max_pixels
    controls = _take_packages(data, "controls", CONTROL_KEYS, library)
    adapters = _take_packages(data, "ip_adapters", IP_ADAPTER_KEYS, library)
    selection = _select(data, controls, adapters, library)
    fields: dict[str, Any] = {"prompt": ""}
    fields |= {name: _parse_value(name, FIELDS[name], data[name], max_pixels) for name in data if name in FIELDS}
    if selection.upscaler is not None:
        fields["hires_upscaler"] = library.find_upscaler(selection.upscaler).package.name
    fields["controls"] = tuple(_parse_control(each, index, max_pixels) for index, each in enumerate(controls))
    fields["ip_adapters"] = tuple(_parse_ip_adapter(each, index, max_pixels) for index, each in enumerate(adapters))
    preview_every = take(data, "preview_every", int, 1)
    if preview_every < 0:
        raise sdonnx.RequestError(f"preview_every is {preview_every}; give a number of steps, or 0 for no previews")
    return Generation(request=sdonnx.Request(**fields), selection=selection, preview_every=preview_every)


def _take_packages(data: Mapping[str, Any], name: str, keys: tuple[str, ...], library: Library) -> list[dict[str, Any]]:
    """Take a list of objects that name a package each."""
    given = take(data, name, list, [])
    if len(given) > (most := library.settings.max_controls):
        raise sdonnx.RequestError(f"{len(given)} {name} are too many; give up to {most}")
    return [check_keys(each, f"{name}[{index}]", keys) for index, each in enumerate(given)]


def _select(
    data: Mapping[str, Any], controls: list[dict[str, Any]], adapters: list[dict[str, Any]], library: Library
) -> Selection:
    model, vae = take(data, "model", str, library.default.name), take(data, "vae", str, "")
    packages, others = ([take(each, "package", str, "") for each in given] for given in (controls, adapters))
    upscaler = take(data, "hires_upscaler", str, "latent")
    return Selection(
        model=library.find(model).name,
        vae=library.find(vae, library.vaes).name if vae else None,
        controls=tuple(library.find(each, library.controls).name for each in packages),
        ip_adapters=tuple(library.find(each, library.ip_adapters).name for each in others),
        upscaler=None if upscaler in UPSCALERS else library.find_upscaler(upscaler).name,
    )


def _parse_control(data: Mapping[str, Any], index: int, max_pixels: int) -> sdonnx.Control:
    fields = _parse_fields(data, f"controls[{index}]", CONTROL_FIELDS, max_pixels)
    name = take(data, "preprocessor", str, "none")
    if name not in PREPROCESSORS:
        raise sdonnx.RequestError(f"preprocessor is '{name[:100]}'; choose {', '.join(PREPROCESSORS)}")
    return replace(sdonnx.Control(**fields), image=PREPROCESSORS[name](fields["image"]))


def _parse_ip_adapter(data: Mapping[str, Any], index: int, max_pixels: int) -> sdonnx.IPAdapter:
    return sdonnx.IPAdapter(**_parse_fields(data, f"ip_adapters[{index}]", IP_ADAPTER_FIELDS, max_pixels))


def _parse_fields(
    data: Mapping[str, Any], name: str, specs: Mapping[str, FieldSpec], max_pixels: int
) -> dict[str, Any]:
    """The fields of a control or an IP-Adapter, by ``specs``; ``name`` is its own in errors."""
    if "image" not in data:
        raise sdonnx.RequestError(f"{name} has no image; give {specs['image'].help.rstrip('.').lower()} in base64")
    return {each: _parse_value(f"{name}.{each}", specs[each], data[each], max_pixels) for each in data if each in specs}


def _parse_value(name: str, spec: FieldSpec, value: Any, max_pixels: int) -> Any:
    """Convert a JSON value to the type of a field, where they differ."""
    if spec.kind is Image:
        if not isinstance(value, str):
            raise sdonnx.RequestError(f"{name} is not an image; give a PNG, JPEG or WebP in base64")
        return decode_image(value, name, max_pixels=max_pixels)
    if spec.many or spec.items:
        if not isinstance(value, list):
            raise sdonnx.RequestError(f"{name} is {value!r:.100}; give a list")
        return tuple(cast("list[Any]", value))
    return value
