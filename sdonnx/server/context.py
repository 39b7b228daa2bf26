"""What the routes of all APIs use."""

from dataclasses import dataclass

from starlette.requests import Request

from sdonnx.server.images import ImageStore
from sdonnx.server.library import Library
from sdonnx.server.queue import JobQueue
from sdonnx.server.security.access import Access
from sdonnx.server.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Context:
    """The parts of a server."""

    settings: Settings
    access: Access
    library: Library
    store: ImageStore
    queue: JobQueue


def context_of(request: Request) -> Context:
    """The parts of the server that a request came to."""
    return request.app.state.context
