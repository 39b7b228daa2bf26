"""``/api/jobs``: queue a job, list them, follow one, look at its preview, cancel it."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from sdonnx_runtime.packages.upscaler_config import UpscalerConfig
from sdonnx_runtime.request import generation_parameters
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

import sdonnx
from sdonnx.server.context import Context, context_of
from sdonnx.server.errors import NotFound
from sdonnx.server.generation import GenerationJob
from sdonnx.server.images import decode_image
from sdonnx.server.jobs import Event, Job
from sdonnx.server.native.bodies import read_object, take
from sdonnx.server.native.generations import KEYS, parse_generation
from sdonnx.server.requests import EVENT_HEADERS
from sdonnx.server.upscaling import Upscaling, given_image

KEEP_ALIVE = 15.0
"""Seconds between comments in a quiet stream of events, for proxies that close idle connections."""

_CANCEL_SECONDS = 5.0
"""How long a DELETE waits for the job to end."""


async def create(request: Request) -> Response:
    """Queue a job: POST an object with `generations.KEYS`; 202 with the job, as `job_json` has it.

    Raises:
        RequestError, NotFound, QueueFull, ShuttingDown: as `parse_generation` and `JobQueue.submit` do.
    """
    context = context_of(request)
    data = await read_object(request, KEYS)
    generation = await asyncio.to_thread(parse_generation, data, context.library)
    job = await context.queue.submit(generation)
    return JSONResponse(job_json(job, context), 202, {"Location": f"/api/jobs/{job.id}"})


async def upscale(request: Request) -> Response:
    """Queue an upscaling: POST ``{"image", "upscaler", "scale"}``; 202 with the job, as `job_json` has it.

    The upscaler is a name of ``/api/models``, its own factor is the default ``scale``.

    Raises:
        RequestError, NotFound, QueueFull, ShuttingDown: as `JobQueue.upscale` does; or the image can't be decoded.
    """
    context = context_of(request)
    data = await read_object(request, ("image", "upscaler", "scale"))
    job = await context.queue.upscale(await asyncio.to_thread(_parse_upscaling, data, context))
    return JSONResponse(job_json(job, context), 202, {"Location": f"/api/jobs/{job.id}"})


def _parse_upscaling(data: Mapping[str, Any], context: Context) -> Upscaling:
    served = context.library.find_upscaler(take(data, "upscaler", str, ""))
    scale: object = data.get("scale", UpscalerConfig.read(served.package.root).scale)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise sdonnx.RequestError(f"scale is {scale!r:.100}; give a number")
    image = decode_image(take(data, "image", str, ""), "image", max_pixels=context.settings.max_pixels)
    return Upscaling(images=(given_image(image),), upscaler=served.name, scale=scale)


async def list_jobs(request: Request) -> Response:
    """List the jobs since the server's start, the newest first: ``{"jobs": [job…]}``."""
    context = context_of(request)
    return JSONResponse({"jobs": [job_json(job, context) for job in reversed(context.queue.jobs)]})


async def get(request: Request) -> Response:
    """Describe a job, with the ``result`` of a finished one; of one that is no longer known, what its images tell.

    Raises NotFound.
    """
    return JSONResponse(await _describe(request))


async def cancel(request: Request) -> Response:
    """Cancel a job that waits or runs, and reply with it as GET does, whatever its state. Raises NotFound."""
    context = context_of(request)
    with suppress(NotFound):
        job = context.queue.find(request.path_params["id"])
        context.queue.cancel(job)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(job.wait(), _CANCEL_SECONDS)
    return JSONResponse(await _describe(request))


async def preview(request: Request) -> Response:
    """Get the latest preview of a job as PNG. Raises NotFound."""
    context = context_of(request)
    latest = context.queue.find(request.path_params["id"]).preview
    if latest is None:
        raise NotFound("the job has no preview")
    png = await asyncio.to_thread(lambda: latest.png)
    return Response(png, media_type="image/png")


async def follow(request: Request) -> Response:
    """Stream the events of a job (text/event-stream), from the first, or from the one after ``Last-Event-ID``.

    The id of an event is its number, ``event`` its kind, ``data`` JSON. ``?after=N`` is the same for clients that can't
    set headers. The stream ends after ``done``, ``failed`` or ``cancelled``.

    Raises:
        NotFound: there is no such job.
        RequestError: the number is none.
    """
    context = context_of(request)
    last = request.headers.get("last-event-id") or request.query_params.get("after") or "0"
    if not (last.isascii() and last.isdecimal() and len(last) < 16):
        raise sdonnx.RequestError("Last-Event-ID (or after) is not the number of an event; leave it out for all")
    job = context.queue.find(request.path_params["id"])
    if request.method == "HEAD":  # whose body nobody would read
        return Response(media_type="text/event-stream", headers=EVENT_HEADERS)
    return StreamingResponse(_stream(job, int(last)), media_type="text/event-stream", headers=EVENT_HEADERS)


async def _stream(job: Job, after: int) -> AsyncIterator[str]:
    async for batch in job.batches(after, quiet=KEEP_ALIVE):
        yield "".join(_event_text(job, event) for event in batch) or ": keep-alive\n\n"


def _event_text(job: Job, event: Event) -> str:
    data = {**event.data, "url": preview_url(job, event.data["number"])} if event.kind == "preview" else event.data
    return f"id: {event.number}\nevent: {event.kind}\ndata: {json.dumps(data)}\n\n"


def preview_url(job: Job, number: int) -> str:
    """The path of a job's preview, a new one for each step."""
    return f"/api/jobs/{job.id}/preview?number={number}"


async def _describe(request: Request) -> dict[str, Any]:
    context = context_of(request)
    job_id: str = request.path_params["id"]
    with suppress(NotFound):
        job = context.queue.find(job_id)
        result = job.result if isinstance(job, GenerationJob) else None
        return {**job_json(job, context), "result": None if result is None else _result_json(result)}
    stored = await asyncio.to_thread(context.store.of_job, job_id)
    if not stored:
        raise NotFound("there is no such job")
    return {"id": job_id, "state": "done", "images": image_links([each.name for each in stored])}


def image_links(names: Sequence[str]) -> list[dict[str, str]]:
    """The images of a job: ``[{"name", "url"}…]``."""
    return [{"name": name, "url": f"/api/images/{name}"} for name in names]


def _result_json(result: sdonnx.Result) -> dict[str, Any]:
    """Describe what generated the images: ``timings``, and the names of the packages, as `sdonnx.Result` has them."""
    names = {"model": result.model, "compute": result.compute, "vae": result.vae, "refiner": result.refiner}
    names |= {"controls": result.controls, "ip_adapters": result.ip_adapters}
    return {**names, "timings": asdict(result.timings)}


def job_json(job: Job, context: Context) -> dict[str, Any]:
    """Describe a job.

    Its keys: ``id``, ``state`` (queued, running, done, failed, cancelled), ``model``, ``position`` (1 is the next job;
    null if it does not wait), ``created``, ``started``, ``ended`` (seconds since 1970 or null), ``progress`` (0 to 1),
    ``eta`` (seconds or null), ``seconds_per_step``, ``image`` (from 0), ``num_images``, ``step`` (done ones),
    ``num_steps``, ``loading`` (the component that is being loaded, or null), ``decoding``, ``preview`` (a URL or null),
    ``images`` (as `image_links`), ``seeds``, ``prompts`` (``[{"prompt", "negative_prompt"}…]``, of each image, as they
    are drawn), ``safety`` (of each image that is made, also of refused ones: ``checker``, ``score``, ``flagged``,
    ``mode``; empty where safety is off), ``error`` (text or null), ``kind`` (generation or upscaling), ``request``
    (every field of `Request` but its images, with every choice made; of an upscaling its ``width`` and ``height``).
    """
    waiting = context.queue.waiting
    return {
        "id": job.id,
        "state": job.state.value,
        "kind": job.kind,
        "model": job.model,
        "position": waiting.index(job) + 1 if job in waiting else None,
        "created": job.created,
        "started": job.started,
        "ended": job.ended,
        "progress": job.progress,
        "eta": job.eta,
        "seconds_per_step": job.seconds_per_step,
        "image": job.image,
        "num_images": job.num_images,
        "step": job.step,
        "num_steps": job.num_steps,
        "loading": job.loading,
        "decoding": job.is_decoding and not job.state.is_final,
        "preview": None if job.preview is None else preview_url(job, job.preview.number),
        "images": image_links(job.files),
        "seeds": job.request.seeds if isinstance(job, GenerationJob) else [],
        "prompts": [asdict(each) for each in job.request.prompts] if isinstance(job, GenerationJob) else [],
        "safety": [asdict(each) for each in _safety(job)],
        "error": None if job.error is None else str(job.error),
        "request": _request_json(job),
    }


def _safety(job: Job) -> Sequence[sdonnx.Safety]:
    return job.result.safety if isinstance(job, GenerationJob) and job.result is not None else ()


def _request_json(job: Job) -> dict[str, Any]:
    if isinstance(job, GenerationJob):
        return generation_parameters(job.request)
    return {"width": job.size[0], "height": job.size[1]}
