"""The middlewares between a client and the routes: who may use the server, how large a body may be, which headers."""

import asyncio
import re
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import sdonnx
from sdonnx.server.errors import error_response
from sdonnx.server.security.access import Access, delay_guesses, gives_token, is_same_origin, parse_authority

OPEN_PATHS = ("/", "/health", "/api/session")
"""Paths that require no token: the page has no secrets."""

OPEN_FOLDERS = ("/page/", "/v1/images/files/")
"""Beginnings of such paths: images' files have random names."""

BODY_TIMEOUT = 120.0
"""Seconds in which a request's body has to come."""

_HEADER_NAMES = re.compile(r"[A-Za-z0-9, _-]{1,2000}")

_MAX_DIGITS = 18

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Headers of every response that does not set them itself."""


class SecurityHeaders:
    """Adds headers that restrict what browsers do with responses, and the time that each took."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.append("Server-Timing", f"total;dur={(time.perf_counter() - started) * 1e3:.1f}")
            await send(message)

        await self._app(scope, receive, send_with_headers)


class Guard:
    """Refuses requests with a wrong host, of foreign pages, or without the token; answers CORS preflights."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path, access = Headers(scope=scope), scope["path"], self._access
        host, origin = parse_authority(headers.get("host", "")), headers.get("origin")
        refusal: Response | None = None
        is_foreign = origin is not None and not is_same_origin(origin, host)
        if host is None or not access.allows_host(host[0]):
            name = "the Host header is not a host name" if host is None else f"'{host[0]}' is not a host of this server"
            refusal = error_response(path, 403, f"{name}; start it with --allow-host NAME to allow one")
        elif origin is not None and is_foreign and not access.allows_origin(origin):
            refusal = error_response(path, 403, f"pages of {origin[:200]!r} may not use this server; see --cors")
        elif origin is not None and is_foreign:
            send = _with_cors(send, "*" if "*" in access.origins else origin)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                refusal = _preflight(headers)
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)
        if refusal is None and not is_open and not access.allows_token(headers, is_foreign=is_foreign):
            if gives_token(headers):
                await delay_guesses()
            refusal = _unauthorized(path, headers)
        await (self._app if refusal is None else refusal)(scope, receive, send)


class BodyLimit:
    """Refuses bodies that are too large, before they are read as far as possible, or that come too slowly."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if len(length) > _MAX_DIGITS or int(length) > self._max_bytes:  # a number, which uvicorn checks
            await self._too_large(scope)(scope, receive, send)
            return
        body = _Body(receive, send, self._max_bytes)
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            if body.failure is None:
                raise
        if body.failure is not None and not body.is_answered:
            answer = self._too_large(scope) if body.failure == 413 else _too_slow(scope)
            await answer(scope, receive, send)

    def _too_large(self, scope: Scope) -> Response:
        text = f"the body is larger than {self._max_bytes} bytes; send less"
        return error_response(scope["path"], 413, text, {"Connection": "close"})


class _Body:
    """The body of one request as it comes in."""

    def __init__(self, receive: Receive, send: Send, max_bytes: int) -> None:
        self._receive, self._send = receive, send
        self._left, self._deadline = max_bytes, time.monotonic() + BODY_TIMEOUT
        self._is_complete = False
        self.failure: int | None = None
        """The status of the answer to a body that is refused."""
        self.is_answered = False

    async def receive(self) -> Message:
        """Receive the next part.

        Raises:
            RequestError: the body is too large or too slow.
        """
        if self._is_complete:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._deadline - time.monotonic()))
        except asyncio.TimeoutError:
            self.failure = 408
            raise sdonnx.RequestError("the body came too slowly") from None
        self._left -= len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        if self._left < 0:
            self.failure = 413
            raise sdonnx.RequestError("the body is too large")
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the answer, unless the body is refused: that has another one."""
        if self.failure is not None and not self.is_answered:
            return
        self.is_answered = True
        await self._send(message)


def _too_slow(scope: Scope) -> Response:
    return error_response(scope["path"], 408, "the body came too slowly; try again", {"Connection": "close"})


def _unauthorized(path: str, headers: Headers) -> Response:
    """Ask for the token: browsers show a dialog of their own for Basic, which a page's scripts don't want."""
    scheme = 'Basic realm="sdonnx", charset="UTF-8"'
    if path.startswith(("/v1/", "/api/")):
        scheme = 'Bearer realm="sdonnx"'
    is_of_script = headers.get("sec-fetch-dest") == "empty"
    text = "this server requires its token, as Bearer token or as the password of Basic authentication"
    return error_response(path, 401, text, None if is_of_script else {"WWW-Authenticate": scheme})


def _preflight(headers: Headers) -> Response:
    allowed = {"Access-Control-Allow-Methods": "GET, POST, DELETE", "Access-Control-Max-Age": "600"}
    if _HEADER_NAMES.fullmatch(names := headers.get("access-control-request-headers", "")):
        allowed["Access-Control-Allow-Headers"] = names
    if headers.get("access-control-request-private-network") == "true":
        allowed["Access-Control-Allow-Private-Network"] = "true"
    return Response(status_code=204, headers=allowed)


def _with_cors(send: Send, origin: str) -> Send:
    """Let pages of an origin read what is sent; never with the browser's own credentials."""

    async def send_with_cors(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = "Retry-After, Server-Timing"
            headers.add_vary_header("Origin")
        await send(message)

    return send_with_cors
