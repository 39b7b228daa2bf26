"""``/api/session``: the token as the page's cookie, which scripts can't read."""

from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from sdonnx.server.context import context_of
from sdonnx.server.errors import TooLarge, error_response
from sdonnx.server.native.bodies import check_keys, take
from sdonnx.server.requests import parse_object
from sdonnx.server.security.access import COOKIE, delay_guesses

_MAX_AGE = 30 * 24 * 3600
"""Seconds that a browser keeps the cookie."""

_MAX_BODY = 4096
"""Bytes; nothing else that is longer is read of a client without the token."""


async def sign_in(request: Request) -> Response:
    """Set the cookie: POST ``{"token"}``; 204, or 401 if the token is wrong. Where none is needed, there is no cookie.

    Raises:
        RequestError: the body is something else.
        TooLarge: it is too large.
    """
    data = check_keys(parse_object(await _read(request)), "the body", ("token",))
    token, access = take(data, "token", str, ""), context_of(request).access
    if access.token is None:
        return Response(status_code=204)
    if not access.is_token(token):
        await delay_guesses()
        return error_response(request.url.path, 401, "this is not the server's token; see how it was started")
    return _with_cookie(request, quote(token, safe=""), _MAX_AGE)


async def sign_out(request: Request) -> Response:
    """Delete the cookie: 204."""
    return _with_cookie(request, "", 0)


def _with_cookie(request: Request, value: str, max_age: int) -> Response:
    is_secure = request.headers.get("origin", "").lower().startswith("https://")
    response = Response(status_code=204)
    response.set_cookie(COOKIE, value, max_age=max_age, path="/", secure=is_secure, httponly=True, samesite="strict")
    return response


async def _read(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MAX_BODY:
            raise TooLarge(f"the body has more than {_MAX_BODY} bytes; send the token alone")
    return body
