"""``/api/plan``: the memory and the seconds of a job, before it runs."""

import asyncio
import statistics
from typing import Any

from sdonnx_runtime.request import CompleteRequest, uses_guidance
from sdonnx_runtime.upscaling import COMPONENT
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sdonnx.server.context import context_of
from sdonnx.server.generation import Generation, GenerationJob
from sdonnx.server.jobs import State
from sdonnx.server.native.bodies import read_object
from sdonnx.server.native.generations import KEYS, parse_generation
from sdonnx.server.planning import Forecast
from sdonnx.server.queue import JobQueue


async def plan(request: Request) -> Response:
    """Predict what a job needs: POST the same object as for a job; nothing runs.

    The reply has ``width``, ``height`` (of the images), ``num_images``, ``num_steps`` (of each), ``memory`` (``peak``,
    ``smallest`` that would do, ``room`` that the server has, in bytes or null; ``fits``; ``components``, each with
    ``name`` and ``peak``), ``seconds`` (or null) and ``seconds_from``: ``measured`` from the latest job of the kind,
    ``estimated`` from the model's operations at the CPU's speed, where the CPU runs it, or null; ``estimated_seconds``
    is that estimate in any case, to compare requests by.

    Raises:
        RequestError, NotFound: as for a job, but not if the memory is too little.
    """
    context = context_of(request)
    data = await read_object(request, KEYS)
    generation = await asyncio.to_thread(parse_generation, data, context.library)
    loop, queue = asyncio.get_running_loop(), context.queue
    return JSONResponse(await loop.run_in_executor(queue.planner.thread, _plan, generation, queue))


def _plan(generation: Generation, queue: JobQueue) -> dict[str, Any]:
    forecast = queue.planner.forecast(generation)
    resolved = forecast.resolved
    largest = resolved.passes[-1]
    measured = _measured_seconds(generation, forecast, queue)
    estimated = _estimated_seconds(forecast, queue)
    seconds, source = (estimated, "estimated") if measured is None else (measured, "measured")
    if measured is None and forecast.device != "cpu":
        seconds = None
    return {
        "width": largest.width,
        "height": largest.height,
        "num_images": resolved.request.num_images,
        "num_steps": resolved.steps,
        "memory": {
            "peak": forecast.peak,
            "smallest": forecast.smallest,
            "room": forecast.room,
            "fits": forecast.fits,
            "components": [{"name": each.component, "peak": each.peak} for each in forecast.components],
        },
        "seconds": seconds,
        "estimated_seconds": estimated,
        "seconds_from": None if seconds is None else source,
    }


def _measured_seconds(generation: Generation, forecast: Forecast, queue: JobQueue) -> float | None:
    """Seconds by the latest job of the same model, sizes and cost of a step; None if there is none."""
    request = forecast.resolved.request
    for job in (each for each in reversed(queue.jobs) if isinstance(each, GenerationJob)):
        is_alike = job.generation.selection == generation.selection and _cost(job.request) == _cost(request)
        if is_alike and (times := _times(job)) is not None:
            per_step, others = times
            return others + per_step * forecast.resolved.steps * request.num_images
    return None


def _cost(request: CompleteRequest) -> tuple[object, ...]:
    """What the seconds of a step depend on."""
    sizes = request.width, request.height, request.hires_scale, request.hires_upscaler
    speed = request.cache_interval, request.token_downsampling, uses_guidance(request), request.sampler
    return (*sizes, *speed, request.image is None, request.padding_mask_crop)


def _times(job: GenerationJob) -> tuple[float, float] | None:
    """Seconds of a step of a finished job, and of everything else together."""
    if job.state is not State.DONE or job.result is None or job.started is None or job.ended is None:
        return None
    steps = job.result.timings.steps
    if not steps:
        return None
    per_step = statistics.median(steps)
    return per_step, max(0.0, job.ended - job.started - per_step * len(steps))


def _estimated_seconds(forecast: Forecast, queue: JobQueue) -> float | None:
    """Seconds by the components' operations and the speed of the CPU."""
    if not forecast.components:
        return None
    request, speed = forecast.resolved.request, queue.planner.macs_per_second()
    seconds = {each.component: each.macs / speed + each.overhead_seconds for each in forecast.components}
    steps = forecast.resolved.steps * request.num_images
    per_image = ("vae_decoder", COMPONENT)
    each_step = ("unet", "controlnet", "adapter")
    runs = {name: steps for name in seconds if name.rpartition("/")[2] in each_step}
    runs |= dict.fromkeys(per_image, request.num_images)
    return sum(each * runs.get(name, 1) for name, each in seconds.items())
