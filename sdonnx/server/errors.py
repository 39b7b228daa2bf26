"""Errors that have an HTTP status of their own, and what clients get for the others; never a traceback."""

import logging
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import sdonnx

logger = logging.getLogger(__name__)


class NotFound(sdonnx.RequestError):
    """There is no such model, sampler, job or image: 404."""


class QueueFull(sdonnx.SdonnxError):
    """Too many jobs wait: 429."""


class ShuttingDown(sdonnx.SdonnxError):
    """The server is about to end: 503."""


class ClientDisconnected(sdonnx.SdonnxError):
    """The client went away while it waited: 499, which nobody reads."""


class TooLarge(sdonnx.RequestError):
    """The body, an image or a number is beyond the server's limits: 413."""


def http_status(error: BaseException) -> int:
    """The HTTP status of an error."""
    for kind, status in _STATUSES.items():
        if isinstance(error, kind):
            return status
    return 500


_STATUSES: dict[type[BaseException], int] = {
    NotFound: 404,
    QueueFull: 429,
    ShuttingDown: 503,
    ClientDisconnected: 499,
    TooLarge: 413,
    sdonnx.SafetyError: 400,
    sdonnx.RequestError: 400,
}
"""By type, subclasses first."""


def error_response(path: str, status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Make the response of an error, as clients of the API that ``path`` belongs to expect it."""
    if not path.startswith("/v1/"):
        return JSONResponse({"detail": message}, status, headers)
    if status == 500:
        headers = {**(headers or {}), **SHOULD_NOT_RETRY}
    return JSONResponse(openai_error(message, status, code=_OPENAI_CODES.get(status)), status, headers)


def openai_error(message: str, status: int, *, code: str | None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's JSON of an error.

    Args:
        message: what is wrong.
        status: the HTTP status.
        code: names the kind of error.
        param: names the parameter that is wrong.
    """
    kind = "requests" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


SHOULD_NOT_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients repeat a request after 409 and after any 5xx unless this says not to."""


def retry_after(request: Request) -> dict[str, str]:
    """The header that tells the client of a full queue when to ask again."""
    return {"Retry-After": str(request.app.state.context.queue.seconds_until_room)}


def _answer_sdonnx_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, sdonnx.SdonnxError)  # noqa: S101 — for the type checker
    status = http_status(error)
    if status == 500:
        logger.error("%s", error)
    headers = retry_after(request) if status == 429 else None
    public = request.app.state.context.library.public(error)
    return error_response(request.url.path, status, str(public), headers)


def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 — for the type checker
    return error_response(request.url.path, error.status_code, error.detail, error.headers)


HANDLERS = {sdonnx.SdonnxError: _answer_sdonnx_error, HTTPException: _answer_http_exception}
"""Starlette's exception handlers, for what routes do not answer themselves."""


class UnknownErrors:
    """Answers errors that have no handler, and logs those that are not a client's mistake."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        has_started = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except ClientDisconnect:
            return
        except Exception as error:
            if scope["type"] != "http" or has_started:
                raise
            known = next((text for kind, text in _CLIENT_MISTAKES.items() if isinstance(error, kind)), None)
            if known is None:
                logger.exception("a request to %s failed", scope["path"])
            text = known or "the request failed for an unknown reason; the server's log has it"
            await error_response(scope["path"], 500 if known is None else 400, text)(scope, receive, send)


_CLIENT_MISTAKES = {
    RecursionError: "the JSON is nested too deeply",
    UnicodeEncodeError: "a text has half of a surrogate pair, which is no character; send valid Unicode",
}
"""What a body can do to Python's JSON reader and writer."""

_OPENAI_CODES = {401: "invalid_api_key", 404: "not_found", 413: "request_too_large"}
