"""The HTTP server, ``sdonnx serve``: the library behind HTTP; the only room that imports starlette and uvicorn.

    settings    what the command line told the server
    library     the packages that are served, and the pipelines that are open
    jobs        one generation each: its state, its events, cancelling it
    feed        what all jobs do, told to every open page
    queue       the bounded queue, and the threads that let jobs run
    running     what runs a job: the pipelines of this process, unless another runner does
    images      finished images on disk; decoding of clients' images
    infotext    A1111's text of parameters in images
    context     what the routes of all APIs use
    requests    reading clients' JSON, and waiting for their jobs
    security    tokens, hosts, origins, limits
    serving     the process: sockets, uvicorn, signals
    a1111       AUTOMATIC1111's API, /sdapi/v1
    openai      OpenAI's images API, /v1
    native      sdonnx' own API, /api
    static      the web page's files, whose folder is page
    app         all of it as one Starlette application

All three APIs are spellings of the same job.
"""
