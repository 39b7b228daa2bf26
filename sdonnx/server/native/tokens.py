"""``/api/tokens``: how a text encoder reads a prompt."""

import asyncio
from typing import Any

from sdonnx_runtime.text.chunks import chunk_texts, split_into_chunks
from sdonnx_runtime.text.prompt_schedule import schedule_prompts
from sdonnx_runtime.text.tokenizer import Tokenizer
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sdonnx.server.context import context_of
from sdonnx.server.library import Library
from sdonnx.server.native.bodies import read_object, take
from sdonnx.server.planning import check_prompt

_MOST_TEXTS = 40
"""Chunks of which the texts are found: the time grows with the square of their number."""


async def count(request: Request) -> Response:
    """Count the tokens of a prompt: POST ``{"prompt", "model", "prompt_syntax"}``.

    The reply has ``count`` (weights and LoRA tags aside), ``chunks`` (the tokens of each), ``texts`` (of each, without
    weights and tags), ``length`` (of a chunk, 75 for every published model), ``unknown`` (words that the vocabulary
    lacks) and ``loras`` (``[{"name", "served"}…]``).
    It is of the text of the first step.

    Raises:
        RequestError: the prompt can't be parsed.
        NotFound: the model is not served.
    """
    context = context_of(request)
    data = await read_object(request, ("prompt", "model", "prompt_syntax"))
    return JSONResponse(await asyncio.to_thread(_count, data, context.library))


def _count(data: dict[str, Any], library: Library) -> dict[str, Any]:
    prompt, syntax = take(data, "prompt", str, ""), take(data, "prompt_syntax", str, "a1111")
    check_prompt("prompt", prompt, library.settings.max_prompt)
    package = library.find(take(data, "model", str, library.default.name)).package
    encoder = package.manifest.text_encoders[0]
    tokenizer = Tokenizer.open(package.root / encoder.tokenizer, length=encoder.length)
    schedule = schedule_prompts(prompt, "", syntax, [1])
    texts = schedule.passes[0][0].conditional
    chunks = [_num_tokens(tokenizer, chunk.ids) for text in texts
              for chunk in split_into_chunks(tokenizer, schedule.sections[text])]  # fmt: skip
    parts = list[str]()
    if len(chunks) <= _MOST_TEXTS:
        parts = [part for text in texts for part in chunk_texts(tokenizer, schedule.sections[text])]
    words = [word for text in texts for section in schedule.sections[text] for each in section
             for word in each.text.replace(",", " ").split()]  # fmt: skip
    served = {path.stem for path in library.loras()}
    return {
        "count": sum(chunks),
        "chunks": chunks,
        "texts": parts,
        "length": tokenizer.length - 2,
        "unknown": [word for word in dict.fromkeys(words) if tokenizer.eos in tokenizer.ids(word)],
        "loras": [{"name": tag.name, "served": tag.name in served} for tag in schedule.loras],
    }


def _num_tokens(tokenizer: Tokenizer, ids: tuple[int, ...]) -> int:
    """Count a chunk's tokens of the text."""
    text = ids[1:-1]
    while text and text[-1] in (tokenizer.pad, tokenizer.eos):
        text = text[:-1]
    return len(text)
