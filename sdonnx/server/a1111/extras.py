"""Images that are resized, and the text that images carry."""

import asyncio
import base64
from collections.abc import Mapping
from typing import Any, cast

from PIL import Image
from sdonnx_runtime.images.preprocess import to_rgb
from starlette.requests import Request
from starlette.responses import Response

import sdonnx
from sdonnx.server.a1111.controlnet import detect
from sdonnx.server.a1111.errors import AsciiJson, Unprocessable, error_object
from sdonnx.server.a1111.fields import Detect, Extras, PngInfo, parse_body, read_form
from sdonnx.server.context import context_of
from sdonnx.server.errors import TooLarge
from sdonnx.server.images import decode_image, encode_image
from sdonnx.server.infotext import parse_infotext, read_infotext

_FILTERS: Mapping[str, Image.Resampling | None] = {
    "none": None,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
"""Pillow's filters of the upscalers; None leaves the image as it is."""

_MAX_TEXT = 100_000
"""Characters of an image's text that are parsed."""


async def extra_single_image(request: Request) -> Response:
    """``POST /extra-single-image``."""
    form, max_pixels = read_form(Extras, parse_body(await request.body())), _max_pixels(request)
    image = await asyncio.to_thread(_upscale, form, form.image, max_pixels)
    return AsciiJson({"html_info": _describe(form), "image": image})


async def extra_batch_images(request: Request) -> Response:
    """``POST /extra-batch-images``."""
    form, max_pixels = read_form(Extras, parse_body(await request.body())), _max_pixels(request)
    if not (entries := form.imageList or form.image_list):
        raise Unprocessable("there is no image; give imageList", fields={"imageList": "field required"})
    if len(entries) > (limit := context_of(request).settings.max_images):
        raise sdonnx.RequestError(f"{len(entries)} images are too many; give up to {limit}")
    images: list[str] = []
    for entry in entries:
        named = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
        images.append(await asyncio.to_thread(_upscale, form, named.get("data") or named.get("image"), max_pixels))
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


def _max_pixels(request: Request) -> int:
    return context_of(request).settings.max_pixels


def _upscale(form: Extras, encoded: Any, max_pixels: int) -> str:
    if form.gfpgan_visibility or form.codeformer_visibility:
        raise sdonnx.RequestError("gfpgan_visibility and codeformer_visibility are not supported; give 0")
    if not isinstance(encoded, str):
        raise Unprocessable("an image is not a text; give it in base64")
    image = decode_image(encoded, "image", max_pixels=max_pixels)
    text, pixels = read_infotext(image), image if image.mode in ("RGB", "RGBA") else to_rgb(image)
    upscaled = _resize(form, form.upscaler_1, pixels, max_pixels)
    if form.extras_upscaler_2_visibility > 0 and upscaled is not pixels:
        other = _resize(form, form.upscaler_2, pixels, max_pixels)
        share = min(form.extras_upscaler_2_visibility, 1.0)
        upscaled = upscaled if other is pixels else Image.blend(upscaled, other, share)
    return base64.b64encode(encode_image(upscaled, "png", infotext=text)).decode()


def _resize(form: Extras, upscaler: str, image: Image.Image, max_pixels: int) -> Image.Image:
    """Resize an image as the form says; the same image if its upscaler is ``None``."""
    if upscaler.lower() not in _FILTERS:
        raise sdonnx.RequestError(f"there is no upscaler {upscaler[:80]!r}; choose None, Lanczos or Nearest")
    resampling = _FILTERS[upscaler.lower()]
    if resampling is None:
        return image
    box = (form.upscaling_resize_w, form.upscaling_resize_h) if form.resize_mode == 1 else None
    if box is not None and min(box) < 1:
        raise sdonnx.RequestError(f"{box[0]}x{box[1]} has no pixels; give a width and a height of 1 or more")
    scale = form.upscaling_resize if box is None else max(box[0] / image.width, box[1] / image.height)
    if not 0 < scale * max(image.size) <= max_pixels or scale**2 * image.width * image.height > max_pixels:
        raise TooLarge(f"the image would have more than {max_pixels} pixels, or none; choose another size")
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    upscaled = image.resize(size, resampling)
    if box is None or not form.upscaling_crop:
        return upscaled
    left, top = (upscaled.width - box[0]) // 2, (upscaled.height - box[1]) // 2
    return upscaled.crop((left, top, left + box[0], top + box[1]))


def _describe(form: Extras) -> str:
    return f"<p>Upscaler: {form.upscaler_1.capitalize()}</p>"
