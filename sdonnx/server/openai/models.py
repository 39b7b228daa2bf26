"""The models: those that are served, and names of OpenAI's own that stand for the default one."""

from contextlib import suppress
from typing import Any

from sdonnx_runtime.packages.manifest import MANIFEST
from starlette.requests import Request
from starlette.responses import JSONResponse

from sdonnx.server.context import context_of
from sdonnx.server.errors import NotFound
from sdonnx.server.library import Library, ServedPackage
from sdonnx.server.openai.errors import ApiError

_PLACEHOLDERS = ("gpt-image-", "dall-e-", "chatgpt-image-")
"""How OpenAI's image models begin, of which most have been shut down: names in old settings are placeholders."""


def find_model(library: Library, name: str | None) -> ServedPackage:
    """Find a model by its name; None and the names of OpenAI's image models are the default one.

    Raises:
        ApiError: there is no such model.
    """
    if name is None:
        return library.default
    try:
        return library.find(name)
    except NotFound as error:
        if name.lower().startswith(_PLACEHOLDERS):
            return library.default
        raise ApiError(str(error), param="model", code="model_not_found", status=404) from None


async def list_models(request: Request) -> JSONResponse:
    """GET /v1/models."""
    context = context_of(request)
    return JSONResponse({"object": "list", "data": [_describe(each) for each in context.library.models]})


async def retrieve_model(request: Request) -> JSONResponse:
    """GET /v1/models/NAME."""
    context = context_of(request)
    return JSONResponse(_describe(find_model(context.library, request.path_params["name"])))


def _describe(model: ServedPackage) -> dict[str, Any]:
    root, created = model.package.root, 0.0
    with suppress(OSError):  # somebody deleted it
        created = (root / MANIFEST if (root / MANIFEST).exists() else root).stat().st_mtime
    return {"id": model.name, "object": "model", "created": int(created), "owned_by": "sdonnx"}
