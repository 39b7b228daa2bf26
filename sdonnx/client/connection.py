"""HTTP with one server, and what its errors mean."""

import base64
import http.client
import json
import socket
import ssl
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast
from urllib.parse import unquote, urlsplit

from sdonnx_runtime.files.json_file import parse_json

import sdonnx

CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 60.0
"""Seconds until a server is taken for absent; between two of its bytes. It sends something at least every 15 s."""

Kind: TypeAlias = Literal["absent", "full", "broken"]
"""Why a server is not available: it can't be reached or shuts down, its queue is full, the connection broke."""


class ServerError(sdonnx.SdonnxError):
    """A server is of no use: it is another program, refuses the token, or has another version."""


class UnavailableError(ServerError):
    """A server can't be used now; later it may, and another one at once."""

    def __init__(self, message: str, kind: Kind, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server is, and what it wants to know."""

    scheme: str
    host: str
    port: int
    path: str = ""
    """Where a proxy has put it, such as ``/images``."""
    authorization: str | None = field(default=None, repr=False)
    """The header: a token or a password."""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


def parse_address(url: str, token: str | None = None) -> Address:
    """Parse ``http://HOST:PORT``, also with a token, ``http://:TOKEN@HOST:PORT``, or ``HOST`` for port 7860.

    Raises:
        RequestError: it has another form.
    """
    text = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(text)
        port = parts.port or (7860 if text != url else {"http": 80, "https": 443}[parts.scheme])
    except (KeyError, ValueError):
        parts, port = None, 0
    if parts is None or not parts.hostname or parts.query or parts.fragment or not text.isascii():
        shown = url.rpartition("@")[2]
        raise sdonnx.RequestError(f"'{shown}' is not a server's address; give one such as http://192.168.1.7:7860")
    if parts.password is not None:
        user = f"{unquote(parts.username or '')}:{unquote(parts.password)}".encode()
        authorization = f"Basic {base64.b64encode(user).decode()}"
    else:
        token = unquote(parts.username) if parts.username else token
        authorization = None if token is None else f"Bearer {token}"
    return Address(
        scheme=parts.scheme,
        host=parts.hostname,
        port=port,
        path=parts.path.rstrip("/"),
        authorization=authorization,
    )


@contextmanager
def open_response(
    address: Address,
    method: str,
    path: str,
    *,
    body: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = READ_TIMEOUT,
) -> Generator[http.client.HTTPResponse, None, None]:
    """Send a request, and read the answer while the context lasts.

    Raises:
        RequestError: the server refuses the request as invalid.
        UnavailableError: the server is not there, is full or shuts down, or the connection breaks.
        ServerError: it is of no use.
        SdonnxError: it failed.
    """
    sent = {"Connection": "close", **(headers or {})}
    if address.authorization is not None:
        sent["Authorization"] = address.authorization
    data = None if body is None else json.dumps(body, allow_nan=False).encode()
    if data is not None:
        sent["Content-Type"] = "application/json"
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    connection = kind(address.host, address.port, timeout=min(timeout, CONNECT_TIMEOUT))
    try:
        with _describe_errors(address, "absent"):
            connection.connect()
        with _describe_errors(address, "broken"):
            connection.sock.settimeout(timeout)
            with suppress(BrokenPipeError, ConnectionResetError):  # a refusal may come before the whole body is sent
                connection.request(method, address.path + path, body=data, headers=sent)
            response = connection.getresponse()
            if not 200 <= response.status < 300:
                raise _refusal(address, response)
            yield response
    finally:
        connection.close()


def read_json(address: Address, method: str, path: str, **options: Any) -> dict[str, Any]:
    """Send a request, and read its answer, a JSON object; arguments and errors are those of `open_response`."""
    with open_response(address, method, path, **options) as response:
        answer = _parse_object(response.read())
    if answer is None:
        raise not_sdonnx(address)
    return answer


def read_bytes(address: Address, path: str) -> bytes:
    """Read a file of the server; errors are those of `open_response`."""
    with open_response(address, "GET", path) as response:
        return response.read()


def not_sdonnx(address: Address, status: int = 200) -> ServerError:
    """The error for another kind of server."""
    return ServerError(f"{address} is not an sdonnx server (it answered {status}); give one that runs 'sdonnx serve'")


def _parse_object(data: bytes) -> dict[str, Any] | None:
    try:
        answer = parse_json(data)
    except ValueError:
        return None
    return cast("dict[str, Any]", answer) if isinstance(answer, dict) else None


def _refusal(address: Address, response: http.client.HTTPResponse) -> sdonnx.SdonnxError:
    """The error that an answer stands for."""
    status, answer = response.status, _parse_object(response.read(1 << 20))
    message = (answer or {}).get("detail")
    if status == 401:
        has = "refuses the token" if address.authorization is not None else "requires a token"
        return ServerError(f"{address} {has}; give the one it was started with as --token or SDONNX_TOKEN")
    if status in (408, 429, 502, 503, 504):
        reason = message if isinstance(message, str) else f"it answered {status}"
        after = response.headers["Retry-After"] or ""
        seconds = float(after) if after.isdecimal() else None
        return UnavailableError(f"{address}: {reason}", "full" if status == 429 else "absent", retry_after=seconds)
    if not isinstance(message, str):
        return not_sdonnx(address, status)
    if status == 403:
        return ServerError(f"{address}: {message}")
    return sdonnx.RequestError(message) if status < 500 else sdonnx.SdonnxError(f"{address}: {message}")


@contextmanager
def _describe_errors(address: Address, kind: Kind) -> Generator[None, None, None]:
    """Turn errors of the network into ones that name the server and the remedy."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        reason = f"the TLS certificate of {address} is not trusted ({error.verify_message})"
        raise ServerError(f"{reason}; name its certificate's file in SSL_CERT_FILE") from None
    except ssl.SSLError:
        raise ServerError(f"{address} does not speak TLS; write http:// if you trust the network") from None
    except socket.gaierror:
        raise UnavailableError(f"there is no host {address.host}; check its spelling", kind) from None
    except ConnectionRefusedError:
        raise UnavailableError(f"there is no server at {address}; start one there with: sdonnx serve", kind) from None
    except TimeoutError:
        raise UnavailableError(f"{address} does not answer; check the address and the network", kind) from None
    except (ConnectionResetError, BrokenPipeError, http.client.IncompleteRead):
        raise UnavailableError(f"{address} closed the connection; see its log", kind) from None
    except http.client.HTTPException:
        raise ServerError(f"{address} does not speak HTTP; give one that runs 'sdonnx serve'") from None
    except OSError as error:
        raise UnavailableError(f"{address} can't be reached: {error.strerror or error}", kind) from None
