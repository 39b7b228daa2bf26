"""``/api/info``: the parameters that an image carries, as fields of `Request`."""

import asyncio
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, cast

from PIL import Image
from sdonnx_runtime.files.json_file import parse_json
from sdonnx_runtime.images.preprocess import UPSCALERS
from sdonnx_runtime.request import FIELDS, IMAGE_FIELDS, PACKAGE_FIELDS
from sdonnx_runtime.validation import check_fields
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import sdonnx
from sdonnx.server.context import context_of
from sdonnx.server.errors import NotFound
from sdonnx.server.images import decode_image, read_image
from sdonnx.server.infotext import infotext_fields, parse_infotext, read_infotext
from sdonnx.server.library import Library, ServedPackage
from sdonnx.server.native.bodies import read_object, take

_DEFAULTS = {
    each.name: each.default for each in dataclasses.fields(sdonnx.Request) if each.default is not dataclasses.MISSING
}
_NOT_FIELDS = (*IMAGE_FIELDS, *PACKAGE_FIELDS)


async def info(request: Request) -> Response:
    """Read the parameters of an image: POST the file itself, or ``{"image": base64}`` as application/json.

    ``{"infotext": text}`` reads AUTOMATIC1111's text alone; ``width`` and ``height`` are null then.

    The reply has ``width`` and ``height`` of the image, ``source`` (sdonnx, a1111, or null where there are no
    parameters), ``fields`` (of `Request`, ready for a job; those with their default are left out), ``model`` and
    ``vae`` (by their served names; null if they are not served), ``controls`` and ``ip_adapters`` (as in the PNG's
    JSON, without images) and ``infotext`` (AUTOMATIC1111's text or null).

    Raises:
        RequestError: it is not a PNG, JPEG or WebP.
    """
    context = context_of(request)
    max_pixels = context.settings.max_pixels
    if request.headers.get("content-type", "").startswith("application/json"):
        data = await read_object(request, ("image", "infotext"))
        if "infotext" in data:
            text = take(data, "infotext", str, "")
            return JSONResponse(await asyncio.to_thread(_describe, text, None, None, context.library))
        image = await asyncio.to_thread(decode_image, take(data, "image", str, ""), "image", max_pixels=max_pixels)
    else:
        image = await asyncio.to_thread(read_image, await request.body(), "the image", max_pixels=max_pixels)
    return JSONResponse(await asyncio.to_thread(read_recipe, image, context.library))


def read_recipe(image: Image.Image, library: Library) -> dict[str, Any]:
    """Read the parameters of an image, as `info` replies."""
    return _describe(read_infotext(image), _read_own(image.info.get("sdonnx")), image.size, library)


def _describe(
    text: str | None, recipe: dict[str, Any] | None, size: tuple[int, int] | None, library: Library
) -> dict[str, Any]:
    family = library.default.package.manifest.family
    if recipe is None and text is not None:
        settings = parse_infotext(text)
        named = {"model": settings.get("Model"), "vae": settings.get("VAE")}
        fields = _valid(infotext_fields(text, family=family))
        recipe = {"source": "a1111", "fields": fields, **named, **_no_packages()}
    empty: dict[str, Any] = {"source": None, "fields": {}, "model": None, "vae": None, **_no_packages()}
    found: dict[str, Any] = recipe or empty
    found |= {"model": _served_name(found["model"], library.models), "vae": _served_name(found["vae"], library.vaes)}
    found["fields"] = _with_served_upscaler(found["fields"], library)
    width, height = size or (None, None)
    return {"width": width, "height": height, **found, "infotext": text}


def _with_served_upscaler(fields: dict[str, Any], library: Library) -> dict[str, Any]:
    """The fields with the served name of the upscaler, or without it if it is not served."""
    name = fields.get("hires_upscaler")
    if name is None or name in UPSCALERS:
        return fields
    try:
        return {**fields, "hires_upscaler": library.find_upscaler(name).name}
    except NotFound:
        return {key: each for key, each in fields.items() if key != "hires_upscaler"}


def _served_name(name: str | None, packages: Iterable[ServedPackage]) -> str | None:
    """The name by which a package is served that parameters name after its checkpoint, or as it is served."""
    return next((each.name for each in packages if name in (each.package.name, each.name)), None)


def _read_own(text: object) -> dict[str, Any] | None:
    """Read the JSON of `sdonnx.save_png`; None if it is something else."""
    try:
        data = parse_json(text.encode(), finite=True) if isinstance(text, str) else None
    except ValueError:
        return None
    if not isinstance(data, dict):
        return None
    values = cast("dict[str, Any]", data)
    prompt = values.get("prompt")
    if isinstance(prompt, str):
        values = {**values, "prompt": " ".join([prompt, *_lora_tags(values.get("loras"))])}
    packages = {name: values.get(name) for name in PACKAGE_FIELDS}
    return {
        "source": "sdonnx",
        "fields": _valid(values),
        "model": values.get("model") if isinstance(values.get("model"), str) else None,
        "vae": values.get("vae") if isinstance(values.get("vae"), str) else None,
        **{name: cast("list[Any]", each) if isinstance(each, list) else [] for name, each in packages.items()},
    }


def _no_packages() -> dict[str, list[Any]]:
    return {name: [] for name in PACKAGE_FIELDS}


def _lora_tags(loras: object) -> list[str]:
    """Tags for a prompt of the LoRAs that were set for all prompts."""
    items = cast("list[object]", loras) if isinstance(loras, list) else []
    named = [cast("dict[str, Any]", each) for each in items if isinstance(each, dict)]
    return [f"<lora:{each.get('name')}:{each.get('scale')}>" for each in named]


def _valid(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Request` among values of an untrusted file that are valid, without those with their default."""
    valid = dict[str, Any]()
    for name, value in values.items():
        if name not in FIELDS or name in _NOT_FIELDS:
            continue
        field: Any = tuple(cast("list[Any]", value)) if isinstance(value, list) else value
        if name in _DEFAULTS and field == _DEFAULTS[name]:
            continue
        fields: dict[str, Any] = {"prompt": "", name: field}
        try:
            check_fields(sdonnx.Request(**fields))
        except sdonnx.RequestError:
            continue
        valid[name] = value
    return valid
