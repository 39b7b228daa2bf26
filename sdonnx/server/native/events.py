"""``/api/events``: what every open page shows, the queue and how its running jobs go on."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from sdonnx.server.context import Context, context_of
from sdonnx.server.feed import Message
from sdonnx.server.jobs import Job
from sdonnx.server.native.jobs import KEEP_ALIVE, image_links, job_json, preview_url
from sdonnx.server.requests import EVENT_HEADERS


async def follow(request: Request) -> Response:
    """Stream what happens to all jobs (text/event-stream), until the server ends; docs/server-api.md has the events.

    The first is ``jobs``, the queue as it is: who comes back needs nothing of what was before.
    """
    if request.method == "HEAD":  # whose body nobody would read
        return Response(media_type="text/event-stream", headers=EVENT_HEADERS)
    return StreamingResponse(_stream(context_of(request)), media_type="text/event-stream", headers=EVENT_HEADERS)


async def _stream(context: Context) -> AsyncIterator[str]:
    with context.queue.feed.follow() as follower:
        async for batch in follower.batches(KEEP_ALIVE):
            yield "".join(_event_text(each, context) for each in batch) or ": keep-alive\n\n"


def _event_text(message: Message, context: Context) -> str:
    data = _queue_json(context) if message.kind == "jobs" else _json(message)
    return f"event: {message.kind}\ndata: {json.dumps(data)}\n\n"


def _queue_json(context: Context) -> dict[str, Any]:
    jobs = [*context.queue.running, *context.queue.waiting]
    return {"jobs": [job_json(each, context) for each in jobs if not each.state.is_final]}


def _json(message: Message) -> dict[str, Any]:
    if (job := message.job) is None:
        return dict(message.data)
    return {"id": job.id, **message.data, **_additions(message.kind, job, message.data)}


def _additions(kind: str, job: Job, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a kind of event has besides the data of the job's own."""
    if kind == "preview":
        return {"url": preview_url(job, data["number"])}
    if kind == "done":
        return {"images": image_links(job.files)}
    return {"step": job.step} if kind == "cancelled" else {}
