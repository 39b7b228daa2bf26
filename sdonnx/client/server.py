"""One server: its models, its jobs and images, by its own API."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from urllib.parse import quote

import sdonnx
from sdonnx.client.connection import (
    Address,
    ServerError,
    UnavailableError,
    not_sdonnx,
    open_response,
    read_bytes,
    read_json,
)

FINAL = ("done", "failed", "cancelled")
"""Kinds of a job's last event."""

MALFORMED = (AttributeError, LookupError, StopIteration, TypeError, ValueError)
"""What reading an answer raises that is none of sdonnx."""

_PATIENCE = 3
"""Times that a broken stream of events is opened again before the job is taken for lost."""

_DELAY = 0.5
"""Seconds before the first time; twice as many before the others."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The packages that requests are for, by the names that servers have for them."""

    model: str | None = None
    """None is the server's default."""
    vae: str | None = None
    controls: tuple[str, ...] = ()
    ip_adapters: tuple[str, ...] = ()
    upscaler: str | None = None
    """Of hires fix."""


@dataclass(frozen=True, kw_only=True)
class Packages:
    """The packages of a selection, as a server has them."""

    model: str
    titles: tuple[str, ...]
    """The names with digests of the weights: model, VAE, controls, IP-Adapters, upscaler."""
    enlarge: int
    """Factor by which the model's images are saved larger."""
    has_preview: bool


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a job."""

    number: int
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Server:
    """An sdonnx server.

    Every method raises UnavailableError if the server can't be used now, ServerError if it is of no use, and
    SdonnxError if it fails.
    """

    address: Address

    def __str__(self) -> str:
        return str(self.address)

    def find_packages(self, selection: Selection) -> Packages:
        """Find the packages of a selection; raises ServerError if one is not served."""
        try:
            answer = read_json(self.address, "GET", "/api/models")
            self._check_version(answer["version"])
            return self._select(selection, answer)
        except (*MALFORMED, sdonnx.RequestError):
            raise not_sdonnx(self.address) from None

    def submit(self, body: dict[str, Any]) -> str:
        """Queue a job, and return its id.

        Raises:
            RequestError: the request is invalid, or the server refuses it.
        """
        answer = read_json(self.address, "POST", "/api/jobs", body=body)
        return str(answer["id"])

    def job(self, job: str) -> dict[str, Any]:
        """Read what became of a job."""
        with suppress(sdonnx.RequestError):
            answer = read_json(self.address, "GET", _path(job))
            if "request" in answer:  # else it is one from before the server's last start
                return answer
        raise UnavailableError(f"{self} lost a job; was it started again?", "broken")

    def follow(self, job: str) -> Iterator[Event]:
        """Iterate over a job's events to its last; a stream that breaks is opened again where it was."""
        last, broken = 0, 0
        while True:
            try:
                for event in self._events(job, last):
                    last, broken = event.number, 0
                    yield event
                    if event.kind in FINAL:
                        return
            except UnavailableError:
                if broken >= _PATIENCE:
                    raise
            broken += 1
            time.sleep(_DELAY * min(broken, 2))
            self.job(job)

    def image(self, name: str) -> bytes:
        """Read an image, the bytes of a PNG."""
        return read_bytes(self.address, f"/api/images/{quote(name, safe='')}")

    def preview(self, job: str) -> bytes:
        """Read a job's latest preview, the bytes of a PNG."""
        return read_bytes(self.address, _path(job, "/preview"))

    def cancel(self, job: str, *, timeout: float = 3) -> None:
        """Cancel a job, if the server is there and the job has not ended."""
        with suppress(sdonnx.SdonnxError), open_response(self.address, "DELETE", _path(job), timeout=timeout):
            pass

    def _events(self, job: str, after: int) -> Iterator[Event]:
        """Read server-sent events from the one after this number on, as long as the connection lasts."""
        kind, data, number = "", "", after
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        with open_response(self.address, "GET", _path(job, "/events"), headers=headers) as response:
            for line in iter(response.readline, b""):
                name, _, value = line.decode(errors="replace").rstrip("\r\n").partition(":")
                value = value.removeprefix(" ")
                if name == "id":
                    number = int(value)
                elif name == "event":
                    kind = value
                elif name == "data":
                    data += value
                elif not name and not value and data:
                    yield Event(number=number, kind=kind, data=json.loads(data))
                    kind = data = ""

    def _select(self, selection: Selection, answer: dict[str, Any]) -> Packages:
        models = answer["models"]
        model = next(each for each in models if each["default"])
        if selection.model is not None:
            model = self._find(selection.model, "model", models)
        others = [] if selection.vae is None else [self._find(selection.vae, "VAE", answer["vaes"])]
        others += [self._find(name, "ControlNet or T2I-Adapter", answer["controls"]) for name in selection.controls]
        others += [self._find(name, "IP-Adapter", answer.get("ip_adapters", [])) for name in selection.ip_adapters]
        if selection.upscaler is not None:
            others.append(self._find(selection.upscaler, "upscaler", answer["upscalers"]))
        return Packages(
            model=str(model["name"]),
            titles=tuple(str(each["title"]) for each in (model, *others)),
            enlarge=int(model["defaults"]["enlarge"]),
            has_preview=bool(model["preview"]),
        )

    def _find(self, name: str, kind: str, served: list[dict[str, Any]]) -> dict[str, Any]:
        for each in served:
            if each["name"] == name:
                return each
        has = ", ".join(str(each["name"]) for each in served) or "none"
        raise ServerError(f"{self} serves no {kind} '{name}'; it has {has}")

    def _check_version(self, other: str) -> None:
        own = version("sdonnx")
        if other.split(".")[:2] != own.split(".")[:2]:
            raise ServerError(f"{self} has sdonnx {other}, this is {own}; install the same version on both")


def _path(job: str, rest: str = "") -> str:
    return f"/api/jobs/{quote(job, safe='')}{rest}"
