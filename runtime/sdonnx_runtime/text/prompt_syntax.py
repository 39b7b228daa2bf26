"""The language of prompts, AUTOMATIC1111's: what a text says of weights, steps, parts and adapters.

All of it takes time in proportion to the text, and none of it recurses, whatever is typed.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from sdonnx_runtime.errors import RequestError

SYNTAXES = ("a1111", "plain")
"""How prompts are read: with AUTOMATIC1111's syntax, or as they stand."""

MAX_WEIGHT = 1000
"""Of a word or a part; far beyond any use."""

_UP, _DOWN = 1.1, 1 / 1.1
"""What round and square brackets do to the weight of what is in them."""

_SIGN = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]+|\\", re.DOTALL)
_WEIGHT = re.compile(r"\\[()\[\]\\]?|:\s*([+-]?[.\d]+)\s*\)|[()\[\]:]|[^\\()\[\]:]+")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_AND, _BREAK = re.compile(r"\bAND\b"), re.compile(r"\bBREAK\b")
_LORA = re.compile(r"<lora:([^<>]*)>")


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Words of one weight."""

    text: str
    weight: float
    """1 is as if nothing was said."""


Sections: TypeAlias = tuple[tuple[Fragment, ...], ...]
"""What stands between the BREAKs of a text."""


@dataclass(frozen=True, kw_only=True)
class LoraTag:
    """An adapter that a prompt names: ``<lora:name:0.8>``."""

    name: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class _Scheduled:
    """``[before:after:when]``."""

    before: "_Text"
    after: "_Text"
    when: str
    """A step's number; or with a point in it the share of the steps, and above 1 that of a second pass' steps."""

    def last(self, steps: int, done: int | None) -> int:
        """The last step, from 1, with ``before``; ``done`` are the steps of the first pass, None in it."""
        number = float(self.when)
        if "." in self.when:
            number = (number - (0 if done is None else 1)) * steps
        else:
            number -= done or 0
        return int(max(min(number, steps), 0))


@dataclass(frozen=True, kw_only=True)
class _Alternating:
    """``[one|other]``."""

    choices: tuple["_Text", ...]


_Text: TypeAlias = "tuple[str | _Scheduled | _Alternating, ...]"


@dataclass(frozen=True, kw_only=True)
class Part:
    """What stands between the ANDs of a prompt."""

    text: _Text
    weight: float
    """How far it pulls, of the guidance scale."""

    def at(self, step: int, steps: int, done: int | None) -> str:
        """Its text at a step, from 1."""
        made: list[str] = []
        rest = [iter(self.text)]
        while rest:
            piece = next(rest[-1], None)
            if piece is None:
                rest.pop()
            elif isinstance(piece, str):
                made.append(piece)
            elif isinstance(piece, _Scheduled):
                rest.append(iter(piece.before if step <= piece.last(steps, done) else piece.after))
            else:
                rest.append(iter(piece.choices[(step - 1) % len(piece.choices)]))
        return "".join(made)

    def changes(self, steps: int, done: int | None) -> set[int]:
        """The steps, from 1, after which its text may be another one."""
        found: set[int] = set()
        rest = [self.text]
        while rest:
            for piece in rest.pop():
                if isinstance(piece, _Scheduled):
                    found.add(piece.last(steps, done))
                    rest += [piece.before, piece.after]
                elif isinstance(piece, _Alternating):
                    found.update(range(1, steps))
                    rest += piece.choices
        return found


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt, parsed."""

    parts: tuple[Part, ...]
    """One, or with AND those that are composed; arXiv:2206.01714."""
    loras: tuple[LoraTag, ...] = ()
    """In the order in which they are written."""


def parse_prompt(text: str, syntax: str = "a1111", *, composed: bool = True) -> Prompt:
    """Reads a prompt.

    Args:
        text: as it was typed.
        syntax: one of SYNTAXES.
        composed: whether AND divides it, as it does a prompt but no negative one.

    Raises:
        RequestError: nothing stands on one side of an AND; a weight or a LoRA's tag is none.
    """
    if syntax == "plain":
        return Prompt(parts=(Part(text=(text,), weight=1.0),))
    loras = tuple(_lora(found[1]) for found in _LORA.finditer(text))
    text = _LORA.sub("", text) if loras else text
    parts = _AND.split(text) if composed else [text]
    if len(parts) == 1:
        return Prompt(parts=(Part(text=_scheduled(text), weight=1.0),), loras=loras)
    return Prompt(parts=tuple(map(_part, parts)), loras=loras)


def _part(text: str) -> Part:
    """What stands between two ANDs, which may end in a weight."""
    words, _, number = text.rpartition(":")
    weighted = _NUMBER.fullmatch(number.strip())
    words = (words if weighted else text).strip()
    if words == "":
        raise RequestError("the prompt has an AND with nothing beside it; give a text on both of its sides")
    return Part(text=_scheduled(words), weight=_checked(float(number)) if weighted else 1.0)


def _lora(tag: str) -> LoraTag:
    name, _, number = tag.partition(":")
    if name.strip() == "" or (number != "" and not _NUMBER.fullmatch(number.strip())):
        raise RequestError(f"the prompt has '<lora:{tag:.80}>'; give a name and a weight, such as <lora:name:0.8>")
    return LoraTag(name=name.strip(), weight=_checked(float(number)) if number else 1.0)


def _checked(weight: float) -> float:
    if not abs(weight) <= MAX_WEIGHT:
        raise RequestError(f"the prompt has the weight {weight:g}; give one from -{MAX_WEIGHT} to {MAX_WEIGHT}")
    return weight


def _scheduled(text: str) -> _Text:
    """The text with its schedules and alternations; brackets that are none of them stay for `sections`."""
    pieces: list[str | _Scheduled | _Alternating] = []
    opened: list[tuple[str, int, list[int]]] = []  # the bracket, where its content begins, and the signs in it
    for match in _SIGN.finditer(text):
        sign = match[0]
        if sign in (":", "|") and opened:
            opened[-1][2].append(len(pieces))
        pieces.append(sign)
        if sign in ("[", "("):
            opened.append((sign, len(pieces), []))
        elif sign in ("]", ")") and opened:
            bracket, start, signs = opened.pop()
            if (bracket == "[") != (sign == "]"):
                opened.clear()  # nothing around brackets that don't match is a schedule
            elif sign == "]":
                made = _bracketed(pieces, start, signs)
                if made is not None:
                    pieces[start - 1 :] = [made]
    return tuple(pieces)


def _bracketed(
    pieces: Sequence[str | _Scheduled | _Alternating], start: int, signs: Sequence[int]
) -> _Scheduled | _Alternating | None:
    """What the pieces from ``start`` up to the last, a closing bracket, are; ``signs`` are the places of : and |."""
    colons = [place for place in signs if pieces[place] == ":"]
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
    """A text without schedules in it, as words with weights.

    Raises:
        RequestError: a weight is beyond MAX_WEIGHT.
    """
    if syntax == "plain":
        return ((Fragment(text=text, weight=1.0),),)
    pieces, ranges = _weighed(text)
    found: list[list[tuple[float, list[str]]]] = [[]]
    for piece, weight in zip(pieces, _weights(len(pieces), ranges), strict=True):
        if piece is None:
            found.append([])
        elif piece and found[-1] and found[-1][-1][0] == weight:
            found[-1][-1][1].append(piece)
        elif piece:
            found[-1].append((_checked(weight), [piece]))
    return tuple(tuple(Fragment(text="".join(made), weight=weight) for weight, made in section) for section in found)


_Range: TypeAlias = tuple[int, int, float]
"""The first piece in a pair of brackets, the first behind it, and what multiplies their weights."""


def _weighed(text: str) -> tuple[list[str | None], tuple[list[_Range], list[_Range]]]:
    """The pieces of a text, None for a BREAK, and the ranges of its round and of its square brackets."""
    pieces: list[str | None] = []
    round_ones: list[int] = []
    square_ones: list[int] = []
    ranges: tuple[list[_Range], list[_Range]] = ([], [])
    for match in _WEIGHT.finditer(text):
        sign, factor = match[0], _factor(match[1])
        if sign.startswith("\\"):
            pieces.append(sign[1:])  # nothing, where it is before another sign
        elif sign == "(":
            round_ones.append(len(pieces))
        elif sign == "[":
            square_ones.append(len(pieces))
        elif (factor is not None or sign == ")") and round_ones:
            ranges[0].append((round_ones.pop(), len(pieces), _UP if factor is None else factor))
        elif sign == "]" and square_ones:
            ranges[1].append((square_ones.pop(), len(pieces), _DOWN))
        else:
            pieces += _broken(sign)
    ranges[0].extend((start, len(pieces), _UP) for start in reversed(round_ones))
    ranges[1].extend((start, len(pieces), _DOWN) for start in reversed(square_ones))
    return pieces, ranges


def _factor(number: str | None) -> float | None:
    return float(number) if number is not None and _NUMBER.fullmatch(number) else None


def _broken(text: str) -> Iterator[str | None]:
    """The text with None for each BREAK, and without the space around it."""
    first, *more = _BREAK.split(text)
    yield first.rstrip() if more else first
    for index, part in enumerate(more):
        yield None
        yield part.lstrip() if index == len(more) - 1 else part.strip()


def _weights(count: int, ranges: tuple[list[_Range], list[_Range]]) -> Iterator[float]:
    """The weight of each piece: the product of all the ranges that it is in; those of one kind are nested."""
    starting: list[tuple[dict[int, list[_Range]], list[tuple[int, float]]]] = []
    for kind in ranges:
        by_start: dict[int, list[_Range]] = {}
        for each in kind:  # inner ones come first
            by_start.setdefault(each[0], []).append(each)
        starting.append((by_start, []))
    for place in range(count):
        weight = 1.0
        for by_start, around in starting:
            while around and around[-1][0] <= place:
                around.pop()
            for _, end, factor in reversed(by_start.get(place, [])):
                if end > place:
                    around.append((end, factor * (around[-1][1] if around else 1.0)))
            weight *= around[-1][1] if around else 1.0
        yield weight
