"""AUTOMATIC1111's prompt syntax: weights, schedules, alternation, AND, BREAK and LoRA tags.

Parsing is linear in the text and never recurses.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from sdonnx_runtime.errors import RequestError

MAX_WEIGHT = 1000
"""Of a fragment or a subprompt; far above any use."""

_UP, _DOWN = 1.1, 1 / 1.1
"""Factors of round and square brackets on the weight of their content."""

_SIGN = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]+|\\", re.DOTALL)
_WEIGHT = re.compile(r"\\[()\[\]\\]?|:\s*([+-]?[.\d]+)\s*\)|[()\[\]:]|[^\\()\[\]:]+")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_AND, _BREAK = re.compile(r"\bAND\b"), re.compile(r"\bBREAK\b")
_TAG = re.compile(r"<(\w+):([^>]+)>")
"""AUTOMATIC1111's extra networks."""

_LORA_TAGS = ("lora", "lyco")
_MISSPELLED_TAG = re.compile(r"<\s*(?:lora|lyco|lycoris|hypernet)\s*:[^>]*>", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Words of one weight."""

    text: str
    weight: float
    """1 is no weighting."""


Sections: TypeAlias = tuple[tuple[Fragment, ...], ...]
"""A text's fragments, split at BREAK."""


@dataclass(frozen=True, kw_only=True)
class LoraTag:
    """A LoRA tag: ``<lora:name:0.8>``, or with two weights ``<lora:name:0.8:0.5>``."""

    name: str
    text_encoder_weight: float
    unet_weight: float


@dataclass(frozen=True, kw_only=True)
class _Scheduled:
    """``[before:after:when]``."""

    before: "_Text"
    after: "_Text"
    when: str
    """A step number; with a point in it a fraction of the steps, above 1 of the second pass's steps."""

    def last_step(self, steps: int, previous_steps: int | None) -> int:
        """The last step, from 1, with ``before``; ``previous_steps`` are the first pass's, None in it."""
        number = float(self.when)
        if "." in self.when:
            number = (number - (0 if previous_steps is None else 1)) * steps
        else:
            number -= previous_steps or 0
        return int(max(min(number, steps), 0))


@dataclass(frozen=True, kw_only=True)
class _Alternating:
    """``[one|other]``."""

    choices: tuple["_Text", ...]


_Text: TypeAlias = "tuple[str | _Scheduled | _Alternating, ...]"


@dataclass(frozen=True, kw_only=True)
class Subprompt:
    """A prompt's text between ANDs."""

    text: _Text
    weight: float
    """Factor on the guidance scale."""

    def text_at_step(self, step: int, steps: int, previous_steps: int | None) -> str:
        """Get the text at a step, from 1."""
        pieces: list[str] = []
        stack = [iter(self.text)]
        while stack:
            piece = next(stack[-1], None)
            if piece is None:
                stack.pop()
            elif isinstance(piece, str):
                pieces.append(piece)
            elif isinstance(piece, _Scheduled):
                stack.append(iter(piece.before if step <= piece.last_step(steps, previous_steps) else piece.after))
            else:
                stack.append(iter(piece.choices[(step - 1) % len(piece.choices)]))
        return "".join(pieces)

    def change_steps(self, steps: int, previous_steps: int | None) -> set[int]:
        """Get the steps, from 1, after which the text may change."""
        changes: set[int] = set()
        stack = [self.text]
        while stack:
            for piece in stack.pop():
                if isinstance(piece, _Scheduled):
                    changes.add(piece.last_step(steps, previous_steps))
                    stack += [piece.before, piece.after]
                elif isinstance(piece, _Alternating):
                    changes.update(range(1, steps))
                    stack += piece.choices
        return changes


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A parsed prompt."""

    parts: tuple[Subprompt, ...]
    """One, or several joined by AND; arXiv:2206.01714."""
    loras: tuple[LoraTag, ...] = ()
    """In the order of the text."""


def parse_prompt(text: str, syntax: str = "a1111", *, composed: bool = True) -> Prompt:
    """Parse a prompt; ``composed`` says whether AND splits it, as in a prompt but not in a negative one.

    Raises:
        RequestError: a side of an AND is empty; a weight or a LoRA tag is invalid.
    """
    if syntax == "plain":
        return Prompt(parts=(Subprompt(text=(text,), weight=1.0),))
    text, loras = _take_tags(text)
    parts = _AND.split(text) if composed else [text]
    if len(parts) == 1:
        return Prompt(parts=(Subprompt(text=_parse_text(text), weight=1.0),), loras=loras)
    return Prompt(parts=tuple(map(_parse_subprompt, parts)), loras=loras)


def _parse_subprompt(text: str) -> Subprompt:
    """Parse the text between two ANDs, which may end in a weight."""
    words, _, number = text.rpartition(":")
    weighted = _NUMBER.fullmatch(number.strip())
    words = (words if weighted else text).strip()
    if words == "":
        raise RequestError("AND requires a prompt on both sides; write AND in lower case for the word")
    return Subprompt(text=_parse_text(words), weight=_check_weight(float(number)) if weighted else 1.0)


def _take_tags(text: str) -> tuple[str, tuple[LoraTag, ...]]:
    """Take the tags of LoRAs out of a text, as AUTOMATIC1111's extra networks."""
    end = text.rfind(">") + 1  # without a closing sign behind, searching it would be quadratic
    loras = tuple(_parse_tag(match) for match in _TAG.finditer(text, 0, end))
    text = _TAG.sub("", text[:end]) + text[end:]
    misspelled = _MISSPELLED_TAG.search(text, 0, text.rfind(">") + 1)
    if misspelled is not None:
        tag = " ".join(misspelled[0].split())[:80]
        raise RequestError(f"'{tag}' is not a LoRA tag; write it as <lora:name:0.8>")
    return text, loras


def _parse_tag(tag: re.Match[str]) -> LoraTag:
    """Parse a tag's name and weights: the text encoders' and the U-Net's, by position or name (te=, unet=)."""
    text = " ".join(tag[0].split())[:80]
    if tag[1] not in _LORA_TAGS:
        raise RequestError(f"'{text}' is not supported; tags in prompts are LoRAs, such as <lora:name:0.8>")
    positional: list[str] = []
    named: dict[str, str] = {}
    for part in tag[2].split(":"):
        key, sign, value = part.partition("=")
        if sign and "=" not in value:
            named[key.strip()] = value
        else:
            positional.append(part)
    name, *weights = positional or [""]
    te, unet = named.pop("te", None), named.pop("unet", None)
    te = te if te is not None else weights[0] if weights else "1"
    unet = unet if unet is not None else weights[1] if len(weights) > 1 else te
    is_number = all(_NUMBER.fullmatch(each.strip()) for each in (te, unet, *weights))
    if not name.strip() or not is_number or len(weights) > 2 or named:
        raise RequestError(
            f"'{text}' is not a LoRA tag; expected a name and a weight, such as <lora:name:0.8>, or the weights "
            "of the text encoders and the U-Net, such as <lora:name:0.8:0.5> or <lora:name:te=0.8:unet=0.5>"
        )
    return LoraTag(
        name=name.strip(), text_encoder_weight=_check_weight(float(te)), unet_weight=_check_weight(float(unet))
    )


def _check_weight(weight: float) -> float:
    if not abs(weight) <= MAX_WEIGHT:
        raise RequestError(f"the prompt has the weight {weight:g}; give one from -{MAX_WEIGHT} to {MAX_WEIGHT}")
    return weight


def _parse_text(text: str) -> _Text:
    """Parse schedules and alternations; other brackets stay for `sections`."""
    pieces: list[str | _Scheduled | _Alternating] = []
    stack: list[tuple[str, int, list[int]]] = []  # open brackets: sign, index of the content, indices of : and |
    for match in _SIGN.finditer(text):
        sign = match[0]
        if sign in (":", "|") and stack:
            stack[-1][2].append(len(pieces))
        pieces.append(sign)
        if sign in ("[", "("):
            stack.append((sign, len(pieces), []))
        elif sign in ("]", ")") and stack:
            bracket, start, signs = stack.pop()
            if (bracket == "[") != (sign == "]"):
                stack.clear()  # nothing around mismatched brackets is a schedule
            elif sign == "]":
                schedule = _parse_schedule(pieces, start, signs)
                if schedule is not None:
                    pieces[start - 1 :] = [schedule]
    return tuple(pieces)


def _parse_schedule(
    pieces: Sequence[str | _Scheduled | _Alternating], start: int, signs: Sequence[int]
) -> _Scheduled | _Alternating | None:
    """Parse the pieces from ``start`` to the last, a closing bracket; ``signs`` are the indices of : and |."""
    colons = [index for index in signs if pieces[index] == ":"]
    if len(colons) in (1, 2):
        number = pieces[colons[-1] + 1 : -1]
        when = "".join(piece for piece in number if isinstance(piece, str)).strip()
        if all(isinstance(piece, str) for piece in number) and _NUMBER.fullmatch(when):
            before, after = (start, colons[0]), (colons[0] + 1, colons[-1])
            if len(colons) == 1:
                before, after = (start, start), (start, colons[0])
            return _Scheduled(before=tuple(pieces[slice(*before)]), after=tuple(pieces[slice(*after)]), when=when)
    if signs and not colons:
        borders = [start - 1, *signs, len(pieces) - 1]
        return _Alternating(choices=tuple(tuple(pieces[left + 1 : right]) for left, right in pairwise(borders)))
    return None


def sections(text: str, syntax: str = "a1111") -> Sections:
    """Parse the weights and BREAKs of a text without schedules.

    Raises:
        RequestError: a weight is above MAX_WEIGHT.
    """
    if syntax == "plain":
        return ((Fragment(text=text, weight=1.0),),)
    pieces, ranges = _parse_attention(text)
    parsed: list[list[tuple[float, list[str]]]] = [[]]
    for piece, weight in zip(pieces, _weights(len(pieces), ranges), strict=True):
        if piece is None:
            parsed.append([])
        elif piece and parsed[-1] and parsed[-1][-1][0] == weight:
            parsed[-1][-1][1].append(piece)
        elif piece:
            parsed[-1].append((_check_weight(weight), [piece]))
    return tuple(tuple(Fragment(text="".join(words), weight=weight) for weight, words in section) for section in parsed)


_Range: TypeAlias = tuple[int, int, float]
"""The index of the first piece in a pair of brackets, that of the first behind it, and the factor on weights."""


def _parse_attention(text: str) -> tuple[list[str | None], tuple[list[_Range], list[_Range]]]:
    """Split a text into pieces, None for a BREAK, and find the ranges of round and of square brackets."""
    pieces: list[str | None] = []
    open_round: list[int] = []
    open_square: list[int] = []
    ranges: tuple[list[_Range], list[_Range]] = ([], [])
    for match in _WEIGHT.finditer(text):
        sign, number = match[0], match[1]
        factor = float(number) if number is not None and _NUMBER.fullmatch(number) else None
        if sign.startswith("\\"):
            pieces.append(sign[1:])  # empty before any other sign
        elif sign == "(":
            open_round.append(len(pieces))
        elif sign == "[":
            open_square.append(len(pieces))
        elif (factor is not None or sign == ")") and open_round:
            ranges[0].append((open_round.pop(), len(pieces), _UP if factor is None else factor))
        elif sign == "]" and open_square:
            ranges[1].append((open_square.pop(), len(pieces), _DOWN))
        else:
            pieces += _split_break(sign)
    ranges[0].extend((start, len(pieces), _UP) for start in reversed(open_round))
    ranges[1].extend((start, len(pieces), _DOWN) for start in reversed(open_square))
    return pieces, ranges


def _split_break(text: str) -> Iterator[str | None]:
    """Split the text at BREAK, yielding None for each and no space around it."""
    first, *more = _BREAK.split(text)
    yield first.rstrip() if more else first
    for index, part in enumerate(more):
        yield None
        yield part.lstrip() if index == len(more) - 1 else part.strip()


def _weights(count: int, ranges: tuple[list[_Range], list[_Range]]) -> Iterator[float]:
    """Yield the weight of each piece: the product of the ranges that it is in; those of one kind are nested."""
    starting: list[tuple[dict[int, list[_Range]], list[tuple[int, float]]]] = []
    for kind in ranges:
        by_start: dict[int, list[_Range]] = {}
        for each in kind:  # inner ones come first
            by_start.setdefault(each[0], []).append(each)
        starting.append((by_start, []))
    for index in range(count):
        weight = 1.0
        for by_start, around in starting:
            while around and around[-1][0] <= index:
                around.pop()
            for _, end, factor in reversed(by_start.get(index, [])):
                if end > index:
                    around.append((end, factor * (around[-1][1] if around else 1.0)))
            weight *= around[-1][1] if around else 1.0
        yield weight
