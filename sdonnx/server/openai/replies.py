"""What clients get: the images of a job in base64, or as URLs."""

import asyncio
import base64
import re
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sdonnx.server.context import Context, context_of
from sdonnx.server.errors import NotFound, ShuttingDown
from sdonnx.server.generation import GenerationJob
from sdonnx.server.images import FORMATS, MEDIA_TYPES, convert_png
from sdonnx.server.jobs import Job, State
from sdonnx.server.openai.errors import ApiError
from sdonnx.server.openai.fields import ImageParameters

_FILE = re.compile(rf"(?P<stem>\d{{8}}-\d{{6}}-[0-9a-f]{{16}}-\d+)\.(?P<form>{'|'.join(FORMATS)})", re.ASCII)
"""A file of a job whose id the server chose, which nobody can guess."""

_FILE_HEADERS = {"Cache-Control": "private, max-age=3600", "Cross-Origin-Resource-Policy": "cross-origin"}
"""A chat app's page may show the image."""

_PLAIN = {"auto": "high", "standard": "high", "hd": "high"}
"""Qualities of requests by their names in replies; what is not low is all of the package's quality."""


def check_done(context: Context, job: Job) -> None:
    """Check that an ended job has images.

    Raises:
        SdonnxError: it failed.
        ApiError: somebody cancelled it.
        ShuttingDown: the server's end did.
    """
    if job.error is not None:
        raise job.error
    if job.state is not State.DONE and context.queue.is_closing:
        raise ShuttingDown("the server is shutting down; try again later")
    if job.state is not State.DONE:
        raise ApiError("the job was cancelled; send the request again", code="cancelled", status=409)


def images_reply(request: Request, job: GenerationJob, parameters: ImageParameters) -> dict[str, Any]:
    """The reply to a request whose job has ended; raises as `check_done` does."""
    context = context_of(request)
    check_done(context, job)
    if parameters.response_format == "url":
        data = [{"url": _url(request, name, parameters)} for name in job.files]
    else:
        data = [{"b64_json": to_base64(read_file(context, name, parameters))} for name in job.files]
    if job.request.drawn:  # the prompt has choices
        for image, index in zip(data, job.kept, strict=True):
            image["revised_prompt"] = job.request.drawn[index].prompt
    data = [{**image, **described} for image, described in zip(data, describe_safety(job), strict=True)]
    return {"created": int(job.ended or job.created), "data": data, **describe(job, parameters)}


def describe(job: GenerationJob, parameters: ImageParameters) -> dict[str, Any]:
    """What replies and events say of all images of a job."""
    return {
        "background": "opaque",
        "output_format": parameters.output_format,
        "quality": _PLAIN.get(parameters.quality, parameters.quality),
        "size": f"{job.request.width}x{job.request.height}",
    }


def describe_safety(job: GenerationJob) -> list[dict[str, Any]]:
    """What replies and events say of each image: ``safety``, where it is on."""
    result = job.result
    if result is None or not result.safety:
        return [{} for _ in job.files]
    return [{"safety": asdict(each)} for each in result.safety if not each.is_refused]


def read_file(context: Context, name: str, parameters: ImageParameters) -> bytes:
    """Read a finished image in the format that was asked for; raises NotFound."""
    return convert_png(context.store.read(name), parameters.output_format, quality=parameters.output_compression)


def to_base64(data: bytes) -> str:
    """Encode in base64."""
    return base64.b64encode(data).decode("ascii")


async def get_file(request: Request) -> Response:
    """GET /v1/images/files/NAME: an image whose URL was given to a client.

    It needs no token, as OpenAI's URLs don't: browsers and chat apps fetch it without one. The 64 random bits of the
    job's id stand for it, so images of jobs whose id a client chose are not here.
    """
    match = _FILE.fullmatch(request.path_params["name"])
    quality = request.query_params.get("quality", "100")
    if match is None or re.fullmatch("[0-9]{1,2}|100", quality) is None:
        raise NotFound("there is no such image")
    context = context_of(request)
    png = await asyncio.to_thread(context.store.read, f"{match['stem']}.png")
    data = await asyncio.to_thread(convert_png, png, match["form"], quality=int(quality))
    return Response(data, media_type=MEDIA_TYPES[match["form"]], headers=_FILE_HEADERS)


def _url(request: Request, name: str, parameters: ImageParameters) -> str:
    """The URL of a file, with the host by which the client knows the server."""
    file = f"{name.removesuffix('.png')}.{parameters.output_format}"
    url = request.url_for("image_file", name=file)
    if parameters.output_format == "png":
        return str(url)
    return str(url.include_query_params(quality=parameters.output_compression))
