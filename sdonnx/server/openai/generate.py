"""Generations, edits and variations: all are one job, and the wait for it."""

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import sdonnx
from sdonnx.server.context import context_of
from sdonnx.server.generation import Generation
from sdonnx.server.library import Selection
from sdonnx.server.openai.fields import ImageParameters, naming, parse_body, read_parameters
from sdonnx.server.openai.models import find_model
from sdonnx.server.openai.replies import images_reply
from sdonnx.server.openai.streaming import ImageStream
from sdonnx.server.openai.uploads import read_upload
from sdonnx.server.requests import wait_for


async def generate_images(request: Request) -> Response:
    """POST /v1/images/generations."""
    parameters = read_parameters(parse_body(await request.body()))
    return await _generate(request, parameters, {}, event="image_generation")


async def edit_images(request: Request) -> Response:
    """POST /v1/images/edits: inpainting with a mask, else image to image at strength 0.75.

    A package that edits by instruction (InstructPix2Pix) takes the prompt as one.
    """
    upload = await read_upload(request, context_of(request).settings)
    return await _generate(request, read_parameters(upload.texts), upload.images, event="image_edit")


async def vary_images(request: Request) -> Response:
    """POST /v1/images/variations: image to image without a prompt at strength 0.75."""
    upload = await read_upload(request, context_of(request).settings)
    parameters = read_parameters(upload.texts, needs_prompt=False)
    return await _generate(request, parameters, {"image": upload.images["image"]}, event="image_edit")


async def _generate(
    request: Request, parameters: ImageParameters, images: Mapping[str, Any], *, event: str
) -> Response:
    context = context_of(request)
    model = find_model(context.library, parameters.model)
    with naming():
        speed: Mapping[str, Any] = model.fast if parameters.quality == "low" else {}
        generation = Generation(
            request=sdonnx.Request(**parameters.fields, **images, **speed),
            selection=Selection(model=model.name),
            partial_images=parameters.partial_images,
        )
        job = await context.queue.submit(generation)
    if parameters.stream:
        return ImageStream(context, job, parameters, event)
    await wait_for(request, job)
    return JSONResponse(await asyncio.to_thread(images_reply, request, job, parameters))
