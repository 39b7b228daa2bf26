"""The paths of the API."""

from starlette.routing import Route

from sdonnx.server.native import events, images, jobs, listings, plans, recipes, sessions, tokens


def routes() -> list[Route]:
    """The routes, each with its method."""
    return [
        Route("/api/session", sessions.sign_in, methods=["POST"]),
        Route("/api/session", sessions.sign_out, methods=["DELETE"]),
        Route("/api/events", events.follow, methods=["GET"]),
        Route("/api/jobs", jobs.create, methods=["POST"]),
        Route("/api/jobs", jobs.list_jobs, methods=["GET"]),
        Route("/api/jobs/{id}", jobs.get, methods=["GET"]),
        Route("/api/jobs/{id}", jobs.cancel, methods=["DELETE"]),
        Route("/api/jobs/{id}/events", jobs.follow, methods=["GET"]),
        Route("/api/jobs/{id}/preview", jobs.preview, methods=["GET"]),
        Route("/api/upscale", jobs.upscale, methods=["POST"]),
        Route("/api/images", images.list_images, methods=["GET"]),
        Route("/api/images/{name}", images.get, methods=["GET"]),
        Route("/api/images/{name}", images.delete, methods=["DELETE"]),
        Route("/api/images/{name}/info", images.info, methods=["GET"]),
        Route("/api/info", recipes.info, methods=["POST"]),
        Route("/api/plan", plans.plan, methods=["POST"]),
        Route("/api/tokens", tokens.count, methods=["POST"]),
        Route("/api/models", listings.models, methods=["GET"]),
        Route("/api/fields", listings.fields, methods=["GET"]),
        Route("/api/samplers", listings.samplers, methods=["GET"]),
        Route("/api/schedules", listings.schedules, methods=["GET"]),
        Route("/api/loras", listings.loras, methods=["GET"]),
        Route("/api/styles", listings.styles, methods=["GET"]),
        Route("/api/embeddings", listings.embeddings, methods=["GET"]),
    ]
