"""Who may use the server: by which host names, from which pages, with which token.

A page on the Internet can reach a server on its visitor's machine: by a host name of its own that points there (DNS
rebinding), or by requests that a browser sends for it. So both Host and Origin are checked.
"""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes, urlsplit

from starlette.datastructures import Headers

import sdonnx
from sdonnx.server.settings import LOOPBACK, Settings

COOKIE = "sdonnx_token"
"""The name of the cookie that may hold the token, as it is or percent-encoded."""

GUESS_SECONDS = 0.5
"""How much longer the answer to a wrong token takes."""

_AUTHORITY = re.compile(r"(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:(?P<port>\d{1,5}))?", re.IGNORECASE | re.ASCII)
_NAME = re.compile(r"[a-z0-9._-]+", re.ASCII)
_TOKEN = re.compile(r"[!-~]{1,500}")
_DEFAULT_PORTS = {"http": 80, "https": 443}

Authority = tuple[str, int | None]
"""A host name or address in lower case, without brackets, and a port."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """What `Settings` allow."""

    hosts: frozenset[str]
    """Names and addresses by which clients may address the server."""
    allows_addresses: bool
    """Whether any IP address is allowed as Host; no name that an attacker owns is one."""
    origins: frozenset[str]
    """Origins of pages elsewhere that may use the server; ``*`` is all."""
    token: bytes | None

    @classmethod
    def of(cls, settings: Settings) -> "Access":
        """Check settings, and return what they allow.

        Raises:
            RequestError: a host name, an origin or the token is malformed, or a token is missing.
        """
        if settings.token is not None and not _TOKEN.fullmatch(settings.token):
            raise sdonnx.RequestError("the token is to have 1 to 500 printable ASCII characters, and no space")
        if "*" in settings.cors and settings.token is None:
            raise sdonnx.RequestError("--cors '*' lets every page on the Internet in; it requires --token")
        is_loopback = is_loopback_host(settings.host)
        if not is_loopback and settings.token is None:
            raise sdonnx.RequestError(f"--host {settings.host} lets other machines in; it requires --token")
        own = () if _is_unspecified(settings.host) else (settings.host,)
        return cls(
            hosts=frozenset((*LOOPBACK, *(_host_name(each) for each in (*own, *settings.allowed_hosts)))),
            allows_addresses=not is_loopback,
            origins=frozenset(each if each == "*" else _origin(each) for each in settings.cors),
            token=None if settings.token is None else settings.token.encode(),
        )

    def allows_host(self, host: str) -> bool:
        """Whether a request may have this host name or address in its Host header."""
        return host in self.hosts or (self.allows_addresses and _is_address(host))

    def allows_origin(self, origin: str) -> bool:
        """Whether a page of this origin, elsewhere, may use the server."""
        return origin.lower() in self.origins or ("*" in self.origins and origin != "null")

    def is_token(self, given: str) -> bool:
        """Whether a text is the token."""
        return self.token is not None and hmac.compare_digest(given.encode("utf-8", "surrogatepass"), self.token)

    def allows_token(self, headers: Headers, *, is_foreign: bool = False) -> bool:
        """Whether a request has the token, or needs none; a cookie does not count of a foreign page."""
        if self.token is None:
            return True
        matches = [hmac.compare_digest(each, self.token) for each in _tokens(headers, with_cookies=not is_foreign)]
        return any(matches)


async def delay_guesses() -> None:
    """Wait before a wrong token is answered; others are not held up."""
    await asyncio.sleep(GUESS_SECONDS)


def gives_token(headers: Headers) -> bool:
    """Whether a request has a token, be it right or wrong."""
    return any(_tokens(headers, with_cookies=True))


def is_loopback_host(host: str) -> bool:
    """Whether a name or address reaches nothing but this machine."""
    return host.lower() == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def is_same_origin(origin: str, host: Authority | None) -> bool:
    """Whether an origin is the server itself, as the Host header names it; a proxy may have ended TLS."""
    scheme, _, rest = origin.lower().partition("://")
    found, default = parse_authority(rest), _DEFAULT_PORTS.get(scheme)
    if found is None or host is None or default is None:
        return False
    return (found[0], found[1] or default) == (host[0], host[1] or default)


def parse_authority(text: str) -> Authority | None:
    """Parse ``localhost:7860`` or ``[::1]:7860``; None if it is malformed."""
    match = _AUTHORITY.fullmatch(text)
    if match is None:
        return None
    host, port = match["host"].lower().strip("[]").removesuffix("."), match["port"]
    if match["host"].startswith("[") and not _is_address(host):
        return None
    return host, None if port is None else int(port)


def _host_name(text: str) -> str:
    name = text.lower().strip("[]").removesuffix(".")
    if not _is_address(name) and not _NAME.fullmatch(name):
        raise sdonnx.RequestError(
            f"'{text}' is not a host name; give a name or address without port, such as nas.local"
        )
    return name


def _origin(text: str) -> str:
    """Check an origin, and write it as browsers do: in lower case, without the scheme's own port."""
    problem = sdonnx.RequestError(f"'{text}' is not an origin; give scheme and host, such as https://lite.koboldai.net")
    try:
        parts = urlsplit(text.lower().removesuffix("/"))
        port = parts.port
    except ValueError:
        raise problem from None
    authority = parse_authority(parts.netloc)
    if parts.scheme not in _DEFAULT_PORTS or authority is None or parts.path or parts.query or parts.fragment:
        raise problem
    host = f"[{authority[0]}]" if ":" in authority[0] else authority[0]
    return f"{parts.scheme}://{host}" + ("" if port in (None, _DEFAULT_PORTS[parts.scheme]) else f":{port}")


def _tokens(headers: Headers, *, with_cookies: bool) -> Iterable[bytes]:
    """What a request gives as its token, in each form."""
    for value in headers.getlist("authorization"):
        scheme, _, given = value.strip().partition(" ")
        given = given.strip()
        if scheme.lower() == "bearer":
            yield given.encode("latin-1")
        elif scheme.lower() == "basic":
            try:
                pair = base64.b64decode(given, validate=True)
            except (binascii.Error, ValueError):
                continue
            yield pair
            yield pair.partition(b":")[2]
    for value in headers.getlist("cookie") if with_cookies else ():
        for cookie in value.split(";"):
            name, _, given = cookie.strip().partition("=")
            if name == COOKIE:
                yield given.strip('"').encode("latin-1")
                yield unquote_to_bytes(given.encode("latin-1"))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_unspecified(host: str) -> bool:
    return host == "" or (_is_address(host) and ipaddress.ip_address(host).is_unspecified)
