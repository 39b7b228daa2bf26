"""All APIs and the web page as one Starlette application."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio.to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from sdonnx.server import static
from sdonnx.server.a1111 import routes as a1111
from sdonnx.server.context import Context
from sdonnx.server.errors import HANDLERS, UnknownErrors
from sdonnx.server.images import ImageStore
from sdonnx.server.library import Library
from sdonnx.server.native import routes as native
from sdonnx.server.openai import routes as openai
from sdonnx.server.queue import JobQueue
from sdonnx.server.running import LocalRunner, MakeRunner
from sdonnx.server.security.access import Access
from sdonnx.server.security.middleware import BodyLimit, Guard, SecurityHeaders
from sdonnx.server.settings import Settings


def create_app(settings: Settings, make_runner: MakeRunner = LocalRunner) -> Starlette:
    """Make the application; its workers run while the application does.

    ``make_runner`` makes what runs the jobs.

    Raises:
        RequestError: a host name, an origin or the token is malformed.
        SdonnxError: a package can't be opened, or the output directory can't be used.
    """
    access = Access.of(settings)
    library, store = Library(settings), ImageStore(settings.output, provenance=settings.provenance)
    queue = JobQueue(library, store, make_runner(library, store))
    context = Context(settings=settings, access=access, library=library, store=store, queue=queue)

    @asynccontextmanager
    async def run_workers(app: Starlette) -> AsyncGenerator[None, None]:
        context.queue.start()
        yield
        await anyio.to_thread.run_sync(context.queue.close)

    middleware = [
        Middleware(SecurityHeaders),
        Middleware(UnknownErrors),
        Middleware(Guard, access=access),
        Middleware(BodyLimit, max_bytes=settings.max_body),
    ]
    routes = [Route("/health", _health), *a1111.routes(), *openai.routes(), *native.routes(), *static.routes()]
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=HANDLERS, lifespan=run_workers)
    app.state.context = context
    return app


async def _health(_: Request) -> JSONResponse:
    return JSONResponse({"status": "ok"})
