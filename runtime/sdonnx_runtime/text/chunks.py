"""Split weighted prompts into chunks of a text encoder's length, 77 tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from sdonnx_runtime.text.prompt_syntax import Fragment, Sections
from sdonnx_runtime.text.tokenizer import Tokenizer

BACKTRACK = 20
"""A chunk ends at its last comma if at most so many tokens follow it: AUTOMATIC1111's default."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The input of one run of a text encoder."""

    ids: tuple[int, ...]
    """`Tokenizer.length` ids: the start token, at most 75 of the text, the end token, padding."""
    weights: tuple[float, ...]
    """One per id; 1 for start, end and padding."""


@dataclass(kw_only=True)
class _ChunkBuilder:
    """A chunk to which tokens are still added."""

    ids: list[int] = field(default_factory=list[int])
    weights: list[float] = field(default_factory=list[float])
    comma: int | None = None
    """The index of its last comma."""


def split_into_chunks(tokenizer: Tokenizer, text: Sections) -> list[Chunk]:
    """Split a text into one or more chunks; each section begins a new one.

    Raises:
        RequestError: as `Tokenizer.ids` does.
    """
    sections = _fill_sections(tokenizer, text)
    return [pad_chunk(tokenizer, each.ids, each.weights) for section in sections for each in section]


def chunk_texts(tokenizer: Tokenizer, text: Sections) -> list[str]:
    """The part of a text in each chunk of `split_into_chunks`; a word in two is in the later one. Raises like that."""
    texts = list[str]()
    for section, chunks in zip(text, _fill_sections(tokenizer, text), strict=False):
        whole = "".join(fragment.text for fragment in section)
        first_tokens = accumulate((len(chunk.ids) for chunk in chunks[:-1]), initial=0)
        begins = _indices_of(tokenizer, section, list(first_tokens))
        texts += [whole[begin:end].strip() for begin, end in pairwise([*begins, len(whole)])]
    return texts


def truncate(tokenizer: Tokenizer, text: Sections) -> tuple[Chunk, str]:
    """Make one chunk of a verbatim text, and the rest that doesn't fit; raises like `split_into_chunks`."""
    ids, truncated = tokenizer.encode("".join(fragment.text for section in text for fragment in section))
    return Chunk(ids=ids, weights=(1.0,) * len(ids)), truncated


def _fill_sections(tokenizer: Tokenizer, text: Sections) -> list[list[_ChunkBuilder]]:
    sections = [_fill_chunks(tokenizer, section) for section in text]
    if len(sections) > 1 and not sections[-1][0].ids:  # nothing follows the last BREAK
        sections.pop()
    return sections


def _indices_of(tokenizer: Tokenizer, section: Sequence[Fragment], tokens: Sequence[int]) -> list[int]:
    """The indices in a section's text of the words that have the tokens of these ascending indices."""
    indices, first, index = list[int](), 0, 0
    for fragment in section:
        count = len(tokenizer.ids(fragment.text))
        within = [token - first for token in tokens if first <= token < first + count]
        indices += [index + each for each in tokenizer.word_starts(fragment.text, within)]
        first, index = first + count, index + len(fragment.text)
    return indices + [index] * (len(tokens) - len(indices))


def _fill_chunks(tokenizer: Tokenizer, section: Sequence[Fragment]) -> list[_ChunkBuilder]:
    room, commas = tokenizer.length - 2, tokenizer.ids(",")
    placeholder_sizes = {ids[0]: len(ids) for ids in tokenizer.placeholders.values()}
    chunks = [_ChunkBuilder()]
    for token, weight in ((token, each.weight) for each in section for token in tokenizer.ids(each.text)):
        chunk, size = chunks[-1], len(chunks[-1].ids)
        if [token] == commas:
            chunk.comma = size
        elif size == room and chunk.comma is not None and size - chunk.comma <= BACKTRACK:
            end = chunk.comma + 1
            chunks.append(_ChunkBuilder(ids=chunk.ids[end:], weights=chunk.weights[end:]))
            del chunk.ids[end:], chunk.weights[end:]
        if chunks[-1].ids and len(chunks[-1].ids) + placeholder_sizes.get(token, 1) > room:  # don't split its vectors
            chunks.append(_ChunkBuilder())
        chunks[-1].ids.append(token)
        chunks[-1].weights.append(weight)
    return chunks


def pad_chunk(tokenizer: Tokenizer, ids: Sequence[int] = (), weights: Sequence[float] = ()) -> Chunk:
    """Make a chunk of tokens, as many as fit or fewer; without any it is the empty text's."""
    padding = tokenizer.length - 2 - len(ids)
    return Chunk(
        ids=(tokenizer.bos, *ids, tokenizer.eos, *(tokenizer.pad,) * padding),
        weights=(1.0, *weights, 1.0, *(1.0,) * padding),
    )
