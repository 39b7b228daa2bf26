"""The URLs of OpenAI's images API."""

from collections.abc import Mapping

from starlette.routing import Route

from sdonnx.server.openai.errors import Handler, answer_errors
from sdonnx.server.openai.generate import edit_images, generate_images, vary_images
from sdonnx.server.openai.models import list_models, retrieve_model
from sdonnx.server.openai.replies import get_file

_POSTS: Mapping[str, Handler] = {
    "/v1/images/generations": generate_images,
    "/v1/images/edits": edit_images,
    "/v1/images/variations": vary_images,
}


def routes() -> list[Route]:
    """The routes of OpenAI's API."""
    return [
        *(Route(path, answer_errors(handler), methods=["POST"]) for path, handler in _POSTS.items()),
        Route("/v1/images/files/{name}", answer_errors(get_file), name="image_file"),
        Route("/v1/models", answer_errors(list_models)),
        Route("/v1/models/{name}", answer_errors(retrieve_model)),
    ]
