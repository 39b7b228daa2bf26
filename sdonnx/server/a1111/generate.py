"""``txt2img`` and ``img2img``: the job of a request, and its reply."""

import asyncio
import base64
import json
import time
from dataclasses import asdict, replace
from typing import Any

from sdonnx_runtime.images.grid import make_grid
from sdonnx_runtime.images.preprocess import open_image
from sdonnx_runtime.outputs.metadata import A1111_SCHEDULES, infotext
from sdonnx_runtime.outputs.provenance import read_xmp
from sdonnx_runtime.request import CompleteRequest
from sdonnx_runtime.sampling.registry import A1111_NAMES
from starlette.requests import Request
from starlette.responses import Response

import sdonnx
from sdonnx.server.a1111.errors import AsciiJson, with_their_name
from sdonnx.server.a1111.fields import Generate, ImageToImage, TextToImage, parse_body, read_form
from sdonnx.server.a1111.options import FORMATS, current_options, set_options
from sdonnx.server.a1111.prepare import Prepared, prepare
from sdonnx.server.context import context_of
from sdonnx.server.errors import ShuttingDown, http_status
from sdonnx.server.generation import Generation, GenerationJob
from sdonnx.server.images import convert_png, encode_image
from sdonnx.server.jobs import State
from sdonnx.server.library import ServedPackage
from sdonnx.server.queue import JobQueue
from sdonnx.server.requests import wait_for

NOTE = "X-Sdonnx-Note"
"""The header that says what was lowered for a distilled model."""


async def txt2img(request: Request) -> Response:
    """``POST /txt2img``."""
    return await _generate(request, TextToImage)


async def img2img(request: Request) -> Response:
    """``POST /img2img``."""
    return await _generate(request, ImageToImage)


async def _generate(request: Request, kind: type[Generate]) -> Response:
    queue = context_of(request).queue
    form, options = await _read_form(request, kind), current_options(request)
    prepared = await asyncio.to_thread(prepare, queue.library, options, form)
    if isinstance(form, ImageToImage) and not form.include_init_images:
        form = replace(form, init_images=None, mask=None)
    if not form.override_settings_restore_afterwards:
        set_options(request, options.changed(form.override_settings, queue.library)[0])
    job = await _submit(queue, prepared.generation, form.force_task_id or None)
    await wait_for(request, job)
    if job.error is not None:
        raise job.error
    if job.state is State.CANCELLED and queue.is_closing:
        raise ShuttingDown("the server is shutting down; try again later")
    headers = {NOTE: "; ".join(prepared.notes)} if prepared.notes else None
    return await asyncio.to_thread(lambda: AsciiJson(_reply(queue, prepared, form, job), headers=headers))


async def _read_form(request: Request, kind: type[Generate]) -> Generate:
    """Read the fields, without a copy of the body for as long as the job waits."""
    body = b"".join([chunk async for chunk in request.stream()])
    return read_form(kind, await asyncio.to_thread(parse_body, body))


async def _submit(queue: JobQueue, generation: Generation, job_id: str | None) -> GenerationJob:
    """Queue a job; packages that don't fit each other are the client's choice."""
    try:
        return await queue.submit(generation, job_id)
    except sdonnx.SdonnxError as error:
        if type(error) is not sdonnx.RequestError and http_status(error) != 500:
            raise
        raise sdonnx.RequestError(with_their_name(str(error))) from None


def _reply(queue: JobQueue, prepared: Prepared, form: Generate, job: GenerationJob) -> dict[str, Any]:
    """The images, none of a job that was interrupted; the fields of the request; and what was generated."""
    result, file_format = job.result, FORMATS[prepared.options.samples_format]
    texts = [] if result is None else [infotext(result, index) for index in job.kept]
    files = [queue.store.read(name) for name in job.files]
    images = [convert_png(png, file_format) for png in files]
    info = _info(prepared, form, job, texts)
    if form.save_images and prepared.options.return_grid and len(files) > 1:
        try:
            opened = [open_image(png) for png in files]
            grid = make_grid(opened, max_pixels=queue.library.settings.max_pixels)
        except sdonnx.RequestError as error:
            info["comments"] = "\n".join([*filter(None, [info["comments"]]), str(error)])
        else:
            images.insert(0, encode_image(grid, file_format, infotext=texts[0], xmp=read_xmp(opened[0])))
            info |= {"infotexts": [texts[0], *texts], "index_of_first_image": 1}
    encoded = [base64.b64encode(each).decode() for each in images if form.send_images]
    return {"images": encoded, "parameters": form.values, "info": json.dumps(info)}


def _info(prepared: Prepared, form: Generate, job: GenerationJob, texts: list[str]) -> dict[str, Any]:
    """What was generated, with AUTOMATIC1111's names."""
    request, package = job.request, prepared.package
    kept = job.kept
    count, seeds = len(kept), [request.seeds[index] for index in kept]
    variation, strength = (-1, 0.0) if request.variation is None else request.variation
    subseeds = [-1] * count if request.variation is None else [variation + index for index in kept]
    share = request.strength if request.hires_scale is None else request.hires_strength
    drawn = [request.prompts[index] for index in kept]
    prompts, negatives = [each.prompt for each in drawn], [each.negative_prompt for each in drawn]
    safety = () if job.result is None else job.result.safety
    comments = [*prepared.comments, *(["interrupted"] if job.state is State.CANCELLED else [])]
    comments += [f"image {index} {each}" for index, each in enumerate(safety, 1) if each.flagged]
    return {
        "prompt": prompts[0],
        "all_prompts": prompts,
        "negative_prompt": negatives[0],
        "all_negative_prompts": negatives,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": subseeds[0],
        "all_subseeds": subseeds,
        "subseed_strength": strength,
        "width": request.width,
        "height": request.height,
        "sampler_name": A1111_NAMES.get(request.sampler, request.sampler),
        "cfg_scale": request.guidance_scale,
        "steps": request.num_inference_steps,
        "batch_size": form.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        **_model_info(package, prepared.options.vae),
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": share,
        "extra_generation_params": _extra_parameters(request),
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": form.styles,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.created)),
        "clip_skip": request.clip_skip or 1,
        "is_using_inpainting_conditioning": package.package.manifest.conditions.concat == "inpainting",
        "version": "sdonnx",
        "comments": "\n".join(comments),
        **({"safety": [asdict(each) for each in safety]} if safety else {}),
    }


def _model_info(served: ServedPackage, vae: str | None) -> dict[str, Any]:
    names = {"sd_model_name": served.name, "sd_model_hash": served.digest[:10]}
    return {**names, "sd_vae_name": vae, "sd_vae_hash": None}


def _extra_parameters(request: CompleteRequest) -> dict[str, Any]:
    """Settings of an infotext that have no name of their own."""
    schedule = None if request.schedule is None else A1111_SCHEDULES[request.schedule]
    named = {
        "Schedule type": schedule or "Automatic",
        "Hires upscale": request.hires_scale,
        "Hires steps": request.hires_steps if request.hires_scale is not None else None,
        "Hires upscaler": request.hires_upscaler,
        "Tiling": True if request.tiling == "xy" else request.tiling,
    }
    return {name: each for name, each in named.items() if each is not None}
