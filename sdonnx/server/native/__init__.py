"""sdonnx' own API below ``/api``; docs/server-api.md has every request and reply.

    routes        paths and their handlers
    bodies        reading JSON
    generations   JSON to a `Generation`
    jobs          /api/jobs: queue, list, follow, cancel
    events        /api/events: what every open page shows
    images        /api/images: finished images
    recipes       /api/info and the parameters of finished images
    plans         /api/plan: memory and seconds of a job before it runs
    listings      /api/models, fields, samplers, schedules, loras, embeddings
    tokens        /api/tokens
    sessions      /api/session: the token as a cookie

Errors are ``{"detail": "one line"}`` with status 400, 404, 413, 429 (with Retry-After), 500 or 503.
"""
