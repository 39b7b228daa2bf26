"""``/api/tokens``: how a text encoder reads a prompt."""

import asyncio
from typing import Any

from sdonnx_runtime.text.token_counts import count_tokens, parse_first_step
from sdonnx_runtime.text.wildcards import draw_texts
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sdonnx.server.context import context_of
from sdonnx.server.library import Library
from sdonnx.server.native.bodies import read_object, take
from sdonnx.server.planning import check_prompt


async def count(request: Request) -> Response:
    """Count the tokens of a prompt: POST ``{"prompt", "model", "prompt_syntax", "seed"}``.

    The reply has ``count`` (weights and LoRA tags aside), ``chunks`` (the tokens of each), ``texts`` (of each, without
    weights and tags), ``length`` (of a chunk, 75 for every published model), ``unknown`` (words that the vocabulary
    lacks), ``loras`` (``[{"name", "served"}…]``) and ``drawn`` (the prompt that the seed, 0 by default, draws from
    alternatives and wildcards; null if there are none).
    It is of the text of the first step.

    Raises:
        RequestError: the prompt can't be parsed.
        NotFound: the model is not served.
    """
    context = context_of(request)
    data = await read_object(request, ("prompt", "model", "prompt_syntax", "seed"))
    return JSONResponse(await asyncio.to_thread(_count, data, context.library))


def _count(data: dict[str, Any], library: Library) -> dict[str, Any]:
    prompt, syntax = take(data, "prompt", str, ""), take(data, "prompt_syntax", str, "a1111")
    seed = take(data, "seed", int, 0)
    check_prompt("prompt", prompt, library.settings.max_prompt)
    package = library.find(take(data, "model", str, library.default.name)).package
    drawn = draw_texts({"prompt": prompt}, syntax, library.settings.wildcard_folder, [seed])
    text = drawn[seed]["prompt"] if drawn else prompt
    check_prompt("prompt", text, library.settings.max_prompt)
    schedule, texts = parse_first_step(text, syntax)
    found = count_tokens(package, package.manifest.text_encoders[0], schedule, texts)
    served = {path.stem for path in library.loras()}
    return {
        "count": found.count,
        "chunks": found.chunks,
        "texts": found.texts,
        "length": found.length,
        "unknown": found.unknown,
        "loras": [{"name": tag.name, "served": tag.name in served} for tag in schedule.loras],
        "drawn": text if drawn else None,
    }
