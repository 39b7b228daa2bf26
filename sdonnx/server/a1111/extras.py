"""Images that are resized, and the text that images carry."""

import asyncio
import base64
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Any, cast

from PIL import Image
from sdonnx_runtime.outputs.provenance import read_xmp
from starlette.requests import Request
from starlette.responses import Response

import sdonnx
from sdonnx.server.a1111.controlnet import detect
from sdonnx.server.a1111.errors import AsciiJson, Unprocessable, error_object
from sdonnx.server.a1111.fields import Detect, Extras, PngInfo, parse_body, read_form
from sdonnx.server.a1111.listings import upscaler_names
from sdonnx.server.context import context_of
from sdonnx.server.errors import NotFound, ShuttingDown, TooLarge
from sdonnx.server.images import decode_image, encode_image
from sdonnx.server.infotext import parse_infotext, read_infotext
from sdonnx.server.jobs import State
from sdonnx.server.library import Library
from sdonnx.server.requests import wait_for
from sdonnx.server.settings import Settings
from sdonnx.server.upscaling import FILTERS, Upscaling, given_image

_MAX_TEXT = 100_000
"""Characters of an image's text that are parsed."""


async def extra_single_image(request: Request) -> Response:
    """``POST /extra-single-image``."""
    form = read_form(Extras, parse_body(await request.body()))
    (image,) = await _upscale(request, form, [form.image])
    return AsciiJson({"html_info": _describe(form), "image": image})


async def extra_batch_images(request: Request) -> Response:
    """``POST /extra-batch-images``."""
    form = read_form(Extras, parse_body(await request.body()))
    if not (entries := form.imageList or form.image_list):
        raise Unprocessable("there is no image; give imageList", fields={"imageList": "field required"})
    if len(entries) > (limit := context_of(request).settings.max_images):
        raise sdonnx.RequestError(f"{len(entries)} images are too many; give up to {limit}")
    named = [cast("dict[str, Any]", entry) if isinstance(entry, dict) else {} for entry in entries]
    images = await _upscale(request, form, [each.get("data") or each.get("image") for each in named])
    return AsciiJson({"html_info": _describe(form), "images": images})


async def png_info(request: Request) -> Response:
    """``POST /png-info``: the infotext of an image, its other texts, and the infotext's settings."""
    form, max_pixels = read_form(PngInfo, parse_body(await request.body())), _max_pixels(request)
    image = await asyncio.to_thread(decode_image, form.image.strip(), "image", max_pixels=max_pixels)
    text = (read_infotext(image) or "")[:_MAX_TEXT]
    others = {key: each for key, each in image.info.items() if isinstance(each, str) and key != "parameters"}
    return AsciiJson({"info": text, "items": others, "parameters": parse_infotext(text)})


async def interrogate(_: Request) -> Response:
    """``POST /interrogate``, which no model here can do."""
    return AsciiJson(error_object("NotImplementedError", "this server has no model that describes images"), 501)


async def detect_controls(request: Request) -> Response:
    """``POST /controlnet/detect``."""
    form = read_form(Detect, parse_body(await request.body()))
    return AsciiJson(await asyncio.to_thread(detect, form, context_of(request).settings))


async def _upscale(request: Request, form: Extras, encoded: Sequence[Any]) -> list[str]:
    """Upscale images, as a job if it takes a package; from base64 to PNG in base64."""
    context = context_of(request)
    upscaling = _read_upscaling(form, context.library)
    if upscaling is None or not upscaling.packages:
        return [await asyncio.to_thread(_resize, upscaling, each, context.settings.max_pixels) for each in encoded]
    job = await context.queue.upscale(await asyncio.to_thread(_with_images, upscaling, encoded, context.settings))
    await wait_for(request, job)
    if job.error is not None:
        raise job.error
    if job.state is State.CANCELLED and context.queue.is_closing:
        raise ShuttingDown("the server is shutting down; try again later")
    if job.state is State.CANCELLED:
        raise sdonnx.RequestError("the upscaling was interrupted; send the request again")
    return await asyncio.to_thread(lambda: [_to_base64(context.store.read(name)) for name in job.files])


def _read_upscaling(form: Extras, library: Library) -> Upscaling | None:
    """How a form's images are upscaled; None leaves them as they are."""
    if form.gfpgan_visibility or form.codeformer_visibility:
        raise sdonnx.RequestError("gfpgan_visibility and codeformer_visibility are not supported; give 0")
    share = min(form.extras_upscaler_2_visibility, 1.0)
    first = _find_upscaler(form.upscaler_1, library)
    second = _find_upscaler(form.upscaler_2, library) if share > 0 else None
    if first is None:
        return None
    return Upscaling(
        upscaler=first,
        second=None if second == first else second,
        share=share,
        scale=form.upscaling_resize,
        box=(form.upscaling_resize_w, form.upscaling_resize_h) if form.resize_mode == 1 else None,
        crop=form.upscaling_crop,
    )


def _find_upscaler(name: str, library: Library) -> str | None:
    """A key of FILTERS, or a package's served name; None for AUTOMATIC1111's ``None``."""
    if name.lower() in ("none", *FILTERS):
        return None if name.lower() == "none" else name.lower()
    try:
        return library.find_upscaler(name).name
    except NotFound:
        *others, last = upscaler_names(library)
        raise sdonnx.RequestError(f"there is no upscaler {name[:80]!r}; choose {', '.join(others)} or {last}") from None


def _with_images(upscaling: Upscaling, encoded: Sequence[Any], settings: Settings) -> Upscaling:
    images, pixels = list[Image.Image](), 0
    for each in encoded:
        images.append(_decode(each, settings.max_pixels))
        pixels += images[-1].width * images[-1].height
        if pixels > settings.max_queued_pixels:
            raise TooLarge(f"the images have more than {settings.max_queued_pixels} pixels together; send fewer")
    return replace(upscaling, images=tuple(images))


def _resize(upscaling: Upscaling | None, encoded: Any, max_pixels: int) -> str:
    """Upscale an image without a package."""
    image = upscaled = _decode(encoded, max_pixels)
    if upscaling is not None:
        upscaling.check(image, max_pixels)
        upscaled = upscaling.run(image)
    return _to_base64(encode_image(upscaled, "png", infotext=image.info.get("parameters"), xmp=read_xmp(image)))


def _decode(encoded: Any, max_pixels: int) -> Image.Image:
    if not isinstance(encoded, str):
        raise Unprocessable("an image is not a text; give it in base64")
    return given_image(decode_image(encoded, "image", max_pixels=max_pixels))


def _to_base64(png: bytes) -> str:
    return base64.b64encode(png).decode()


def _max_pixels(request: Request) -> int:
    return context_of(request).settings.max_pixels


def _describe(form: Extras) -> str:
    name = form.upscaler_1
    return f"<p>Upscaler: {name.capitalize() if name.lower() in ('none', *FILTERS) else escape(name)}</p>"
