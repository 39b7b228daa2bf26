"""Images as server-sent events: partial images while they are made, then the finished ones."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

import sdonnx
from sdonnx.server.context import Context
from sdonnx.server.generation import GenerationJob
from sdonnx.server.images import convert_png
from sdonnx.server.jobs import Preview
from sdonnx.server.openai.errors import error_object
from sdonnx.server.openai.fields import ImageParameters
from sdonnx.server.openai.replies import check_done, describe, describe_safety, read_file, to_base64
from sdonnx.server.requests import EVENT_HEADERS

_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""Of finished images, which OpenAI's clients expect; a local model charges nothing."""


class ImageStream(StreamingResponse):
    """The events of a job, which is cancelled when its client goes away.

    Each image has up to ``partial_images`` partial images; the finished images follow when all are made. Comments tell
    of each step, so that neither clients nor proxies give up during a long one.
    """

    def __init__(self, context: Context, job: GenerationJob, parameters: ImageParameters, event: str) -> None:
        super().__init__(self._events(), media_type="text/event-stream", headers=EVENT_HEADERS)
        self._context, self._job, self._parameters, self._event = context, job, parameters, event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            asyncio.get_running_loop().run_in_executor(None, self._context.queue.cancel, self._job)

    async def _events(self) -> AsyncIterator[str]:
        partials = 0
        async for event in self._job.events():
            if event.kind == "step":
                yield f": step {event.data['step']} of {event.data['num_steps']}\n\n"
                partials = partials if event.data["step"] > 1 else 0
            elif event.preview is not None:
                data = await asyncio.to_thread(self._encode_preview, event.preview)
                yield self._image("partial_image", data, partial_image_index=partials)
                partials += 1
        try:
            check_done(self._context, self._job)
            for name, safety in zip(self._job.files, describe_safety(self._job), strict=True):
                data = await asyncio.to_thread(read_file, self._context, name, self._parameters)
                yield self._image("completed", data, usage=_USAGE, **safety)
        except sdonnx.SdonnxError as error:
            yield _server_sent("error", error_object(error))
        yield "data: [DONE]\n\n"

    def _encode_preview(self, preview: Preview) -> bytes:
        return convert_png(preview.png, self._parameters.output_format, quality=self._parameters.output_compression)

    def _image(self, what: str, data: bytes, **others: Any) -> str:
        kind = f"{self._event}.{what}"
        image = {"type": kind, "b64_json": to_base64(data), "created_at": int(time.time())}
        return _server_sent(kind, {**image, **describe(self._job, self._parameters), **others})


def _server_sent(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"
