"""Prompt templates, with sd-dynamic-prompts' syntax: alternatives and wildcards, of which a seed draws a prompt.

Parsing is linear in the text and never recurses.
"""

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Protocol, TypeAlias

from sdonnx_runtime.errors import RequestError

MAX_PROMPT = 100_000
"""Characters of a prompt that is drawn; far above any use."""

MAX_DRAWS = 10_000
"""Choices of a prompt that is drawn."""

MAX_COUNT = 100
"""Options that one choice may draw."""

_SIGN = re.compile(r"\\.|[{}\[\]|]|__(?!_)(?P<name>[\w./-]{1,100}?)(?<!_)__(?!_)|[^\\{}\[\]|_]+|.", re.DOTALL)
_NAME = re.compile(r"\\.|__(?!_)([\w./-]{1,100}?)(?<!_)__(?!_)", re.DOTALL)
_WEIGHT = re.compile(r"\s*(\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})::")
_COUNT = re.compile(r"\s*(?:(?P<exact>\d{1,9})|(?P<low>\d{0,9})-(?P<high>\d{0,9}))\$\$(?:(?P<separator>[^$]*)\$\$)?")


@dataclass(frozen=True, kw_only=True)
class Wildcard:
    """``__name__``: a line of a file."""

    name: str
    """Its path in the folder of wildcards, without ``.txt``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Option:
    """What a choice can draw."""

    source: "Template | str"
    """Parsed; or a line of a file, most of which are never drawn."""
    weight: float = 1.0

    @cached_property
    def text(self) -> "Template":
        """The template; raises as `parse_template` does."""
        return parse_template(self.source) if isinstance(self.source, str) else self.source


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """The options of a choice."""

    options: tuple[Option, ...]

    @cached_property
    def weights(self) -> list[float]:
        """The sum of the weights up to each option."""
        return list(accumulate(each.weight for each in self.options))


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """``{a|b}``, ``{2::a|b}``, ``{2$$a|b|c}``."""

    drawn_from: Options | Wildcard
    low: int = 1
    """The fewest options that are drawn, without replacement."""
    high: int | None = 1
    """The most; None is all."""
    separator: str = ", "


Template: TypeAlias = "tuple[str | Wildcard | Choice, ...]"


class WildcardSource(Protocol):
    """What has the options of wildcards."""

    def options(self, name: str) -> Options:
        """The options of a wildcard."""
        ...


def parse_template(text: str) -> Template:
    """Parse alternatives and wildcards; braces without ``|`` in them, and unmatched ones, are text.

    Raises:
        RequestError: a choice can't draw as many options as it is to.
    """
    if "{" not in text and "__" not in text:
        return (text,)
    pieces: list[str | Wildcard | Choice] = []
    stack: list[_Bracket] = []
    num_braces = 0
    for match in _SIGN.finditer(text):
        sign, name = match[0], match["name"]
        if sign == "|" and stack:
            stack[-1].bars.append(len(pieces))
        pieces.append(sign if name is None else Wildcard(name=name))
        if sign in ("{", "["):
            stack.append(_Bracket(sign=sign, start=len(pieces)))
            num_braces += sign == "{"
        elif sign == "]" and stack and stack[-1].sign == "[":
            stack.pop()
        elif sign == "}" and num_braces:
            brace = _pop_brace(stack)
            num_braces -= 1
            choice = _parse_choice(pieces, brace.start, brace.bars)
            if choice is not None:
                pieces[brace.start - 1 :] = [choice]
    return _join(pieces)


@dataclass(kw_only=True)
class _Bracket:
    """A bracket that is open."""

    sign: str
    start: int
    """The index of its content."""
    bars: list[int] = field(default_factory=list[int])
    """The indices of ``|`` that are directly in it."""


def _pop_brace(stack: list[_Bracket]) -> _Bracket:
    """Pop the innermost open brace with what was not closed in it."""
    bars: list[list[int]] = []
    while (bracket := stack.pop()).sign != "{":
        bars.append(bracket.bars)
    bracket.bars.extend(chain.from_iterable(reversed(bars)))
    return bracket


def _parse_choice(pieces: Sequence[str | Wildcard | Choice], start: int, bars: Sequence[int]) -> Choice | None:
    """Parse the pieces from ``start`` to the last, a closing brace; None if there is nothing to choose from."""
    if not bars and not (len(pieces) - start < _SHORT and _begins_with_count(pieces[start])):
        return None
    borders = [start - 1, *bars, len(pieces) - 1]
    parts = [_join(pieces[left + 1 : right]) for left, right in pairwise(borders)]
    count = _COUNT.match(parts[0][0]) if parts[0] and isinstance(parts[0][0], str) else None
    if count is None:
        return Choice(drawn_from=Options(options=tuple(map(parse_option, parts)))) if bars else None
    first = _without_start(parts[0], count.end())
    words = [each for each in first if not isinstance(each, str) or each.strip()]
    if bars:
        drawn_from: Options | Wildcard = Options(options=tuple(map(parse_option, [first, *parts[1:]])))
    elif len(words) == 1 and isinstance(words[0], Wildcard):
        drawn_from = words[0]
    else:
        return None
    low, high = _parse_count(count)
    return Choice(drawn_from=drawn_from, low=low, high=high, separator=count["separator"] or ", ")


_SHORT = 16
"""Above the pieces of ``{2$$__name__}``."""


def _begins_with_count(piece: str | Wildcard | Choice) -> bool:
    return isinstance(piece, str) and _COUNT.match(piece) is not None


def _parse_count(count: re.Match[str]) -> tuple[int, int | None]:
    low = int(count["exact"] or count["low"] or 1)
    high = low if count["exact"] else int(count["high"]) if count["high"] else None
    most = low if high is None else high
    if most > MAX_COUNT or low > most:
        raise RequestError(f"{{{count[0].strip()[:50]}…}} is not a choice of 0 to {MAX_COUNT}, the lower number first")
    return low, high


def parse_option(text: Template) -> Option:
    """Parse an option, which may begin with its weight."""
    weight = _WEIGHT.match(text[0]) if text and isinstance(text[0], str) else None
    if weight is None:
        return Option(source=text)
    return Option(source=_without_start(text, weight.end()), weight=float(weight[1]))


def parse_line(line: str) -> Option:
    """Parse a line of a file, which may begin with its weight, as far as it is needed before it is drawn."""
    weight = _WEIGHT.match(line) if "::" in line else None
    return Option(source=line) if weight is None else Option(source=line[weight.end() :], weight=float(weight[1]))


def _without_start(text: Template, length: int) -> Template:
    first = text[0]
    return (first[length:], *text[1:]) if isinstance(first, str) else text


def _join(pieces: Sequence[str | Wildcard | Choice]) -> Template:
    """Join the texts that follow each other."""
    joined: list[str | Wildcard | Choice] = []
    words: list[str] = []
    for piece in pieces:
        if isinstance(piece, str):
            words.append(piece)
            continue
        joined += ["".join(words)] * bool(words)
        joined.append(piece)
        words = []
    return (*joined, *["".join(words)] * bool(words))


def wildcard_names(text: str) -> list[str]:
    """List the wildcards that are anywhere in a template."""
    return [name for name in _NAME.findall(text) if name] if "__" in text else []


def is_template(text: str) -> bool:
    """Whether a text has anything to draw; raises as `parse_template` does."""
    return any(not isinstance(piece, str) for piece in parse_template(text))


def draw(template: Template, wildcards: WildcardSource, *, seed: int, stream: str) -> str:
    """Draw a prompt from a template; nothing is left in it to be drawn.

    Choice n, from 0 in the order of reading, is by the number u in [0, 1) of the first 53 bits of the SHA-256 of
    ``seed:stream:n``: the first option for which the weights up to it are more than u times the sum of all. A
    range of counts is such a choice too, and so is each of several options, among those that are left.

    Args:
        template: of `parse_template`.
        wildcards: has the options of its wildcards.
        seed: the image's.
        stream: ``prompt`` or ``negative_prompt``, which draw independently.

    Raises:
        RequestError: the weights of a choice are all 0, or the prompt gets too long; or as ``wildcards`` does.
    """
    numbers, words, length = _Numbers(seed, stream), list[str](), 0
    stack = [iter(template)]
    while stack:
        piece = next(stack[-1], None)
        if piece is None:
            stack.pop()
        elif isinstance(piece, str):
            words.append(piece)
            length += len(piece)
            if length > MAX_PROMPT:
                raise RequestError(f"the prompt that is drawn has over {MAX_PROMPT} characters; use fewer wildcards")
        else:
            choice = Choice(drawn_from=piece) if isinstance(piece, Wildcard) else piece
            stack.append(_drawn_pieces(choice, wildcards, numbers))
    return _escape("".join(words))


class _Numbers:
    """Numbers of a seed and a stream, uniform in [0, 1)."""

    def __init__(self, seed: int, stream: str) -> None:
        self._name, self._count = f"{seed}:{stream}:", 0

    def next(self) -> float:
        if self._count == MAX_DRAWS:
            raise RequestError(f"the prompt has over {MAX_DRAWS} choices to draw; use fewer wildcards")
        digest = hashlib.sha256(f"{self._name}{self._count}".encode()).digest()
        self._count += 1
        return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _drawn_pieces(choice: Choice, wildcards: WildcardSource, numbers: _Numbers) -> Iterator[str | Wildcard | Choice]:
    """Draw options of a choice, with its separator in between."""
    source = choice.drawn_from
    options = wildcards.options(source.name) if isinstance(source, Wildcard) else source
    high = min(len(options.options), MAX_COUNT if choice.high is None else choice.high)
    low = min(choice.low, high)
    count = low if high == low else low + int(numbers.next() * (high - low + 1))
    pieces: list[str | Wildcard | Choice] = []
    for number in range(count):
        index = _draw_index(options.weights, numbers)
        pieces += [choice.separator] * (number > 0)
        pieces += options.options[index].text
        if number + 1 < count:
            others = options.options[:index] + options.options[index + 1 :]
            options = Options(options=others)
            if options.weights[-1] == 0:
                break
    return iter(pieces)


def _draw_index(weights: Sequence[float], numbers: _Numbers) -> int:
    total = weights[-1]
    if total == 0:
        raise RequestError("a choice of the prompt has weights of 0 alone; give one option a larger weight")
    return min(bisect_right(weights, numbers.next() * total), bisect_left(weights, total))


def _escape(text: str) -> str:
    """Escape what would be drawn again: parts that together look like a choice or a wildcard."""
    if not is_template(text):
        return text
    escaped = list[str]()
    for match in _SIGN.finditer(text):
        if match["name"] is not None:
            escaped.append(f"\\__{match['name']}\\__")
        else:
            escaped.append("\\{" if match[0] == "{" else match[0])
    return "".join(escaped)
