"""The web page's files in ``page/``: ``/`` is its ``index.html``, ``/page/NAME`` any other one."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources

from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sdonnx.server.errors import NotFound

INDEX = "index.html"

MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
"""By the ending of the files' names; others are not served."""

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, kw_only=True)
class PageFile:
    """A file of the page."""

    content: bytes
    media_type: str

    @cached_property
    def etag(self) -> str:
        """Names the content, whether it is compressed or not."""
        return f'W/"{hashlib.sha256(self.content).hexdigest()[:32]}"'


def page_files() -> Mapping[str, PageFile]:
    """Read the page's files, by name."""
    folder = resources.files("sdonnx.server") / "page"
    endings = {each.name: f".{each.name.rpartition('.')[2]}" for each in folder.iterdir()}
    return {
        name: PageFile(content=(folder / name).read_bytes(), media_type=MEDIA_TYPES[ending])
        for name, ending in endings.items()
        if ending in MEDIA_TYPES
    }


def routes() -> list[Route]:
    """The routes of the files as they are now: a page never mixes those of two versions."""
    files = page_files()

    async def get(request: Request) -> Response:
        """Get a file; 304 if the client has it. Raises NotFound."""
        found = files.get(request.path_params.get("name", INDEX))
        if found is None:
            raise NotFound("the page has no such file")
        headers = {**_HEADERS, "ETag": found.etag}
        if _has(request.headers.get("if-none-match", ""), found.etag):
            return Response(status_code=304, headers=headers)
        return Response(found.content, media_type=found.media_type, headers=headers)

    compressed = [Middleware(GZipMiddleware, compresslevel=6)]
    return [Route(path, get, middleware=compressed) for path in ("/", "/page/{name}")]


def _has(if_none_match: str, etag: str) -> bool:
    """Whether a client's ``If-None-Match`` names what it would get."""
    tags = {each.strip() for each in if_none_match.split(",")}
    return etag in tags or "*" in tags
