"""From words with weights to what a text encoder reads: chunks of as many tokens as it takes, each with its weight."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sdonnx_runtime.text.prompt_syntax import Fragment, Sections
from sdonnx_runtime.text.tokenizer import Tokenizer

BACKTRACK = 20
"""A chunk ends at its last comma where so few tokens or fewer follow, as by AUTOMATIC1111's default."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What is read at once."""

    ids: tuple[int, ...]
    """The start token, at most 75 of the text, the end token, then padding: `Tokenizer.length`."""
    weights: tuple[float, ...]
    """One for each of them; 1 for what is not of the text."""


@dataclass(kw_only=True)
class _Open:
    """A chunk that tokens are still added to."""

    ids: list[int] = field(default_factory=list[int])
    weights: list[float] = field(default_factory=list[float])
    comma: int | None = None
    """Where its last comma is."""


def split_into_chunks(tokenizer: Tokenizer, parts: Sections) -> list[Chunk]:
    """The chunks of a text, one or more; each section begins one.

    Raises:
        RequestError: as `Tokenizer.ids` does.
    """
    found = [_filled(tokenizer, section) for section in parts]
    if len(found) > 1 and not found[-1][0].ids:  # nothing follows the last BREAK
        found.pop()
    return [_closed(tokenizer, each.ids, each.weights) for section in found for each in section]


def truncate(tokenizer: Tokenizer, text: str) -> tuple[Chunk, str]:
    """One chunk of a text as it stands, and what no longer fits in; raises like `split_into_chunks`."""
    tokens = tokenizer.encode(text)
    ids = tuple(int(token) for token in tokens.ids[0])
    return Chunk(ids=ids, weights=(1.0,) * len(ids)), tokens.truncated


def empty_chunk(tokenizer: Tokenizer) -> Chunk:
    """The chunk of an empty text."""
    return _closed(tokenizer, (), ())


def _tokens(tokenizer: Tokenizer, section: Sequence[Fragment]) -> Iterator[tuple[int, float]]:
    """Ids with weights: the one place where words become tokens."""
    for fragment in section:
        for token in tokenizer.ids(fragment.text):
            yield token, fragment.weight


def _filled(tokenizer: Tokenizer, section: Sequence[Fragment]) -> list[_Open]:
    room, commas = tokenizer.length - 2, tokenizer.ids(",")
    learned = {ids[0]: len(ids) for ids in tokenizer.learned.values()}
    chunks = [_Open()]
    for token, weight in _tokens(tokenizer, section):
        chunk, size = chunks[-1], len(chunks[-1].ids)
        if [token] == commas:
            chunk.comma = size
        elif size == room and chunk.comma is not None and size - chunk.comma <= BACKTRACK:
            kept = chunk.comma + 1
            chunks.append(_Open(ids=chunk.ids[kept:], weights=chunk.weights[kept:]))
            del chunk.ids[kept:], chunk.weights[kept:]
        if chunks[-1].ids and len(chunks[-1].ids) + learned.get(token, 1) > room:  # a learned word isn't divided
            chunks.append(_Open())
        chunks[-1].ids.append(token)
        chunks[-1].weights.append(weight)
    return chunks


def _closed(tokenizer: Tokenizer, ids: Sequence[int], weights: Sequence[float]) -> Chunk:
    rest = tokenizer.length - 2 - len(ids)
    return Chunk(
        ids=(tokenizer.bos, *ids, tokenizer.eos, *(tokenizer.pad,) * rest),
        weights=(1.0, *weights, 1.0, *(1.0,) * rest),
    )
