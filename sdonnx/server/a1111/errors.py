"""AUTOMATIC1111's error objects, and its JSON."""

import json
import logging
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

import sdonnx
from sdonnx.server.context import context_of
from sdonnx.server.errors import NotFound, http_status, retry_after

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]


class Unprocessable(sdonnx.RequestError):
    """A field has a wrong type, or names a script that is not there: 422."""

    def __init__(self, message: str, *, fields: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.detail: Any = message
        """FastAPI's: a list of the fields that are wrong, or a text."""
        if fields:
            self.detail = [{"loc": ["body", name], "msg": text, "type": "value_error"} for name, text in fields.items()]


_NAMES = {
    "guidance_scale": "cfg_scale", "hires_scale": "hr_scale", "hires_steps": "hr_second_pass_steps",
    "hires_strength": "denoising_strength", "image": "init_images", "image_guidance_scale": "image_cfg_scale",
    "mask_image": "mask", "num_images": "batch_size * n_iter", "num_inference_steps": "steps",
    "padding_mask_crop": "inpaint_full_res_padding", "strength": "denoising_strength", "variation[0]": "subseed",
    "variation[1]": "subseed_strength",
}  # fmt: skip
"""AUTOMATIC1111's names of a request's fields."""


def with_their_name(message: str) -> str:
    """Begin a message with AUTOMATIC1111's name of the field that it is about."""
    name, space, rest = message.partition(" ")
    return f"{_NAMES.get(name, name)}{space}{rest}"


class AsciiJson(Response):
    """JSON of which every text is a valid one, whatever a client sent: half of a surrogate pair stays escaped."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode the content."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def answer_errors(handler: Handler) -> Handler:
    """Make a handler's errors AUTOMATIC1111's."""

    @wraps(handler)
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except Unprocessable as error:
            return AsciiJson({"detail": error.detail}, 422)
        except NotFound as error:
            return AsciiJson({"detail": str(error)}, 404)
        except sdonnx.SdonnxError as error:
            return _error_response(request, error)

    return endpoint


def _error_response(request: Request, error: sdonnx.SdonnxError) -> Response:
    context, status = context_of(request), http_status(error)
    message = str(context.library.public(error))
    if status == 500:
        logger.error("%s", error)
    headers = retry_after(request) if status in (429, 503) else None
    return AsciiJson(error_object(type(error).__name__, message), status, headers)


def error_object(kind: str, message: str) -> dict[str, str]:
    """AUTOMATIC1111's JSON of an error: its class, and what is wrong."""
    return {"error": kind, "detail": message, "body": "", "errors": message}
