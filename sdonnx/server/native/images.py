"""``/api/images``: the finished images on disk."""

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import sdonnx
from sdonnx.server.context import context_of
from sdonnx.server.feed import Message
from sdonnx.server.images import FORMATS, MEDIA_TYPES, StoredImage, convert_png, read_image
from sdonnx.server.native.recipes import read_recipe

_MOST = 500
"""Images on a page."""

_SIDES = 16, 2048
"""Pixels of a thumbnail's longer side."""


async def list_images(request: Request) -> Response:
    """List images, the newest first: ``{"images": [image…], "next": name or null}``.

    An image is as `image_json` has it, with its ``prompt`` (or null).

    ``?count=`` is how many (50, at most 500); ``?before=NAME`` goes on behind an image, for which ``next`` is made.

    Raises:
        RequestError: the count is no number in this range.
    """
    context = context_of(request)
    count, before = _number(request.query_params, "count", 50, 1, _MOST), request.query_params.get("before")
    images = await asyncio.to_thread(context.store.latest, count + 1, before=before)
    page = images[:count]
    following = page[-1].name if len(images) > count else None
    prompts = await asyncio.to_thread(lambda: [context.store.prompt(each.name) for each in page])
    listed = [{**image_json(each), "prompt": prompt} for each, prompt in zip(page, prompts, strict=True)]
    return JSONResponse({"images": listed, "next": following})


async def get(request: Request) -> Response:
    """Get an image: the PNG file, or ``?format=jpeg`` or ``webp`` with ``&quality=`` (0 to 100; 90).

    ``?side=`` (16 to 2048) makes it smaller: its longer side has at most so many pixels. All carry AUTOMATIC1111's
    parameters, in PNG's text or EXIF's UserComment.

    Raises:
        NotFound: there is no such image.
        RequestError: there is no such format, or quality or side are out of range.
    """
    context = context_of(request)
    form = request.query_params.get("format", "png")
    if form not in FORMATS:
        raise sdonnx.RequestError(f"format is '{form[:100]}'; choose {', '.join(FORMATS)}")
    quality = _number(request.query_params, "quality", 90, 0, 100)
    side = _number(request.query_params, "side", 320, *_SIDES) if "side" in request.query_params else None
    data = await asyncio.to_thread(context.store.read, request.path_params["name"])
    data = await asyncio.to_thread(convert_png, data, form, quality=quality, side=side)
    headers = {"Cache-Control": "private, max-age=31536000, immutable"}
    return Response(data, media_type=MEDIA_TYPES[form], headers=headers)


async def info(request: Request) -> Response:
    """Get an image's parameters, as POST ``/api/info`` does, with the keys of `image_json`. Raises NotFound."""
    context = context_of(request)
    name = request.path_params["name"]
    data = await asyncio.to_thread(context.store.read, name)
    found = context.store.find(name)
    image = await asyncio.to_thread(read_image, data, name, max_pixels=context.settings.max_pixels)
    recipe = await asyncio.to_thread(read_recipe, image, context.library)
    return JSONResponse({**image_json(found), **recipe})


async def delete(request: Request) -> Response:
    """Delete an image: 204 without a body. Raises NotFound."""
    context = context_of(request)
    name = request.path_params["name"]
    await asyncio.to_thread(context.store.delete, name)
    context.queue.feed.tell(Message(kind="deleted", data={"name": name}))
    return Response(status_code=204)


def image_json(image: StoredImage) -> dict[str, Any]:
    """Describe an image: ``name``, ``url``, ``job``, ``index`` in the job, ``created`` (ISO 8601, local time)."""
    day, clock = image.created.split("-")
    created = f"{day[:4]}-{day[4:6]}-{day[6:]}T{clock[:2]}:{clock[2:4]}:{clock[4:]}"
    url = f"/api/images/{image.name}"
    return {"name": image.name, "url": url, "job": image.job, "index": image.index, "created": created}


def _number(query: Mapping[str, str], key: str, default: int, low: int, high: int) -> int:
    text = query.get(key, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
        raise sdonnx.RequestError(f"{key} is '{text[:100]}'; give a whole number from {low} to {high}")
    return int(text)
