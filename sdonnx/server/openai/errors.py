"""OpenAI's error objects, their statuses, and the headers that tell its clients whether to try again."""

from collections.abc import Awaitable, Callable, Mapping
from functools import wraps
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import sdonnx
from sdonnx.server.context import context_of
from sdonnx.server.errors import (
    SHOULD_NOT_RETRY,
    NotFound,
    QueueFull,
    ShuttingDown,
    TooLarge,
    http_status,
    openai_error,
    retry_after,
)

Handler = Callable[[Request], Awaitable[Response]]


class ApiError(sdonnx.RequestError):
    """An error that names the parameter that is wrong."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = "invalid_value", status: int = 400
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def error_object(error: Exception) -> dict[str, Any]:
    """OpenAI's JSON of an error."""
    message = str(error).encode("utf-8", "replace").decode()  # a client may have sent half a surrogate pair
    param = error.param if isinstance(error, ApiError) else None
    return openai_error(message, _status(error), code=_code(error), param=param)


def answer_errors(handler: Handler) -> Handler:
    """Make a handler's errors OpenAI's."""

    @wraps(handler)
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except HTTPException as error:  # of the form's parser
            return _error_response(request, ApiError(error.detail, code="invalid_form", status=error.status_code))
        except sdonnx.SdonnxError as error:
            return _error_response(request, error)

    return endpoint


def _error_response(request: Request, error: sdonnx.SdonnxError) -> JSONResponse:
    """Answer with an error, and with what its client should do next."""
    status = _status(error)
    headers: Mapping[str, str] = {}
    if isinstance(error, QueueFull):
        headers = retry_after(request)
    elif status == 409 or (status >= 500 and not isinstance(error, ShuttingDown)):
        headers = SHOULD_NOT_RETRY
    return JSONResponse(error_object(context_of(request).library.public(error)), status, headers)


def _status(error: Exception) -> int:
    return error.status if isinstance(error, ApiError) else http_status(error)


def _code(error: Exception) -> str | None:
    if isinstance(error, ApiError):
        return error.code
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), "server_error")


_CODES: dict[type[Exception], str] = {
    NotFound: "not_found",
    QueueFull: "rate_limit_exceeded",
    ShuttingDown: "shutting_down",
    TooLarge: "request_too_large",
    sdonnx.SafetyError: "content_policy_violation",
    sdonnx.RequestError: "invalid_value",
}
"""By type, subclasses first."""
