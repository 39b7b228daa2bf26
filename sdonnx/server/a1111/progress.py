"""Progress of the running job, and of a job by its id; interrupting.

Of several running jobs, AUTOMATIC1111's routes mean the one that has been running for the longest time.
"""

import asyncio
import base64
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sdonnx.server.a1111.errors import AsciiJson
from sdonnx.server.a1111.fields import TaskProgress, parse_body, read_form
from sdonnx.server.context import context_of
from sdonnx.server.jobs import Job, Preview, State
from sdonnx.server.queue import JobQueue

_YES = ("true", "1", "on", "yes")


async def get_progress(request: Request) -> Response:
    """``GET /progress``: of the job that runs; all is 0 exactly when there is none."""
    queue = _queue(request)
    job = queue.current or next(iter(queue.waiting), None)
    query = request.query_params
    skip = query.get("skip_current_image") or query.get("skipCurrentImage") or ""
    wanted = None if job is None or skip.lower() in _YES else job.preview
    image = None if wanted is None else await asyncio.to_thread(_encode, wanted)
    content = {
        "progress": 0.0 if job is None else min(1.0, 0.01 + job.progress),
        "eta_relative": 0.0 if job is None else job.eta or 0.0,
        "state": _state(job),
        "current_image": image,
        "textinfo": None,
    }
    return AsciiJson(content)


def _state(job: Job | None) -> dict[str, Any]:
    state = {"skipped": False, "interrupted": False, "stopping_generation": False, "job": "", "job_count": 0}
    state |= {"job_timestamp": "0", "job_no": 0, "sampling_step": 0, "sampling_steps": 0}
    if job is None:
        return state
    return state | {
        "interrupted": job.is_cancelled,
        "job": job.id,
        "job_count": job.num_images if job.num_steps else -1,  # as a job begins
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.created)),
        "job_no": job.image,
        "sampling_step": job.step,
        "sampling_steps": job.num_steps,
    }


async def interrupt(request: Request) -> Response:
    """``POST /interrupt``: cancel the job that runs."""
    await asyncio.to_thread(_queue(request).interrupt)
    return AsciiJson({})


async def skip(request: Request) -> Response:
    """``POST /skip``: go on to the next image, which is that of the next job unless the running one has more."""
    queue = _queue(request)
    if (job := queue.current) is not None and job.num_images == 1:
        await asyncio.to_thread(queue.cancel, job)
    return AsciiJson(None)


async def task_progress(request: Request) -> Response:
    """``POST /internal/progress``: of the job that a client named with ``force_task_id``."""
    form = read_form(TaskProgress, parse_body(await request.body()))
    queue = _queue(request)
    job = next((each for each in queue.jobs if each.id == form.id_task), None)
    is_active, is_queued = (job is not None and job.state is state for state in (State.RUNNING, State.QUEUED))
    content: dict[str, Any] = {
        "active": is_active,
        "queued": is_queued,
        "paused": False,
        "completed": job is not None and job.state.is_final,
        "progress": None,
        "eta": None,
        "live_preview": None,
        "id_live_preview": -1,
        "textinfo": "Queued..." if is_queued else "Waiting...",
    }
    if job is None or not is_active:
        return AsciiJson(content)
    content |= {"progress": job.progress, "eta": job.eta, "id_live_preview": form.id_live_preview, "textinfo": None}
    preview = job.preview
    if form.live_preview and preview is not None and preview.number != form.id_live_preview:
        encoded = await asyncio.to_thread(_encode, preview)
        content |= {"live_preview": f"data:image/png;base64,{encoded}", "id_live_preview": preview.number}
    return AsciiJson(content)


async def pending_tasks(request: Request) -> Response:
    """``GET /internal/pending-tasks``: the ids of the jobs that wait."""
    tasks = [job.id for job in _queue(request).waiting]
    return AsciiJson({"size": len(tasks), "tasks": tasks})


def _queue(request: Request) -> JobQueue:
    return context_of(request).queue


def _encode(preview: Preview) -> str:
    return base64.b64encode(preview.png).decode()
