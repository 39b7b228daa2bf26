"""What handlers of all APIs do with a client's request: read its JSON, and wait for its job."""

import asyncio
from codecs import BOM_UTF8
from typing import Any, cast

from sdonnx_runtime.files.json_file import parse_json
from starlette.requests import Request

import sdonnx
from sdonnx.server.context import context_of
from sdonnx.server.errors import ClientDisconnected
from sdonnx.server.jobs import Job
from sdonnx.server.security.limits import check_values

EVENT_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Of server-sent events, which neither caches nor proxies are to hold back."""


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a body that is a JSON object of finite numbers.

    Raises:
        RequestError: it is something else.
        TooLarge: it has too many values.
    """
    check_values(body)
    try:
        data = parse_json(body.removeprefix(BOM_UTF8), finite=True)
    except ValueError:
        raise sdonnx.RequestError("the body is not valid JSON; send a JSON object in UTF-8") from None
    if not isinstance(data, dict):
        raise sdonnx.RequestError('the body is not a JSON object; send one, such as {"prompt": "a cat"}')
    return cast("dict[str, Any]", data)


async def wait_for(request: Request, job: Job) -> None:
    """Wait until a job has ended; cancel it if the client, whose request has been read, goes away.

    Raises:
        ClientDisconnected: the client went away; a response would reach nobody.
    """
    ended = asyncio.create_task(job.wait())
    gone = asyncio.create_task(_disconnection(request))
    try:
        await asyncio.wait({ended, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            raise ClientDisconnected("the client went away")
    finally:
        ended.cancel()
        gone.cancel()
        if not job.state.is_final:
            await asyncio.to_thread(context_of(request).queue.cancel, job)


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
