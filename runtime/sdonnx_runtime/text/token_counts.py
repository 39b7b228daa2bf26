"""Token counts: how a text encoder reads a prompt, and where its chunks begin."""

from dataclasses import dataclass

from sdonnx_runtime.packages.manifest import TextEncoder
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.text.chunks import chunk_texts, split_into_chunks
from sdonnx_runtime.text.prompt_schedule import PromptSchedule, schedule_prompts
from sdonnx_runtime.text.tokenizer import Tokenizer

_MOST_TEXTS = 40
"""Chunks of which the texts are found: the time grows with the square of their number."""


@dataclass(frozen=True, kw_only=True)
class TokenCount:
    """The tokens of a prompt for one text encoder; weights and LoRA tags are none."""

    component: str
    """The text encoder."""
    count: int
    chunks: tuple[int, ...]
    """The tokens of each chunk; the subprompts of an AND begin new ones."""
    texts: tuple[str, ...]
    """What is in each chunk, without weights and tags; empty of more than 40 chunks."""
    length: int
    """The tokens that a chunk may have: 75 of every published model."""
    unknown: tuple[str, ...]
    """Words that the vocabulary lacks."""


def parse_first_step(prompt: str, syntax: str, *, negative: bool = False) -> tuple[PromptSchedule, tuple[str, ...]]:
    """Parse a prompt, or a negative one; returns its schedule, and the texts of its first step.

    Raises:
        RequestError: as `schedule_prompts` does.
    """
    schedule = schedule_prompts("" if negative else prompt, prompt if negative else "", syntax, [1])
    first = schedule.passes[0][0]
    return schedule, (first.negative,) if negative else first.conditional


def count_tokens(
    package: Package, encoder: TextEncoder, schedule: PromptSchedule, texts: tuple[str, ...]
) -> TokenCount:
    """Count the tokens of the texts of a step, as `parse_first_step` returns them.

    Raises:
        PackageError: the tokenizer is damaged.
    """
    tokenizer = Tokenizer.open(package.root / encoder.tokenizer, length=encoder.length)
    parsed = [schedule.sections[text] for text in texts]
    chunks = [_num_tokens(tokenizer, chunk.ids) for each in parsed for chunk in split_into_chunks(tokenizer, each)]
    parts = [part for each in parsed for part in chunk_texts(tokenizer, each)] if len(chunks) <= _MOST_TEXTS else []
    words = [word for each in parsed for section in each for fragment in section
             for word in fragment.text.replace(",", " ").split()]  # fmt: skip
    return TokenCount(
        component=encoder.component,
        count=sum(chunks),
        chunks=tuple(chunks),
        texts=tuple(parts),
        length=tokenizer.length - 2,
        unknown=tuple(word for word in dict.fromkeys(words) if tokenizer.eos in tokenizer.ids(word)),
    )


def _num_tokens(tokenizer: Tokenizer, ids: tuple[int, ...]) -> int:
    """Count a chunk's tokens of the text."""
    text = ids[1:-1]
    while text and text[-1] in (tokenizer.pad, tokenizer.eos):
        text = text[:-1]
    return len(text)
