"""CLIP's tokenizer: makes of a prompt the ids that a text encoder reads, the same ids as diffusers makes."""

import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import models, pre_tokenizers

from sdonnx_runtime.errors import PackageError, RequestError

_SPECIALS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
"""CLIP's special tokens, where a tokenizer's files name no others."""

_LONGEST = 1_000_000
"""A model_max_length above this is transformers' way to say that there is none."""

# The published pattern ignores case, where U+017F is the letter s and the mark U+0345 is a letter too.
_WORD = (
    r"<\|[s\x{17f}]tartoftext\|>|<\|endoftext\|>"
    r"|'[s\x{17f}]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
)
_WHOLE = frozenset(("<|startoftext|>", "<|endoftext|>"))
"""Words of the cleaned text that are tokens as they are."""

_WORDS: Any = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(tokenizers.Regex(_WORD), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)

_FAST_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_FAST_WORDS = (_FAST_WORD, r"<\|startoftext\|>|<\|endoftext\|>|" + _FAST_WORD)
"""The patterns that transformers 4 and 5 write into tokenizer.json."""

_NATIVE: Any = tokenizers.Tokenizer
"""The library's own tokenizer; its stubs carry no types."""

_STAGES = ("normalizer", "pre_tokenizer", "model")
"""The parts of tokenizer.json that make ids of a text."""

_IDEOGRAPH = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A prompt as a text encoder reads it."""

    ids: NDArray[np.int64]
    """The start token, the prompt's tokens, the end token, then padding, (1, length)."""

    truncated: str
    """The end of the prompt, from the word that no longer fits whole; empty if all of it fits."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A CLIP vocabulary, and the length that its text encoder reads."""

    length: int
    """Tokens per prompt, start and end included: 77 for every published Stable Diffusion; at least 3."""

    bos: int
    """Id of the token that starts a prompt."""

    eos: int
    """Id of the token that ends a prompt."""

    pad: int
    """Id of the token that fills up to the length."""

    speller: "_BytePairs | _Serialized"
    """How a text becomes ids."""

    learned: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Ids, beyond those of the vocabulary, of words that textual inversions stand for, whatever their case."""

    @classmethod
    def open(
        cls, directory: Path, *, length: int | None = None, learned: Mapping[str, tuple[int, ...]] | None = None
    ) -> "Tokenizer":
        """Open vocab.json with merges.txt, or tokenizer.json where these are not both there.

        `length` is the text encoder's max_position_embeddings; a smaller model_max_length in
        tokenizer_config.json goes before it. Raises PackageError for files that are missing or damaged.
        """
        settings = _settings(directory)
        special = {name: _special(directory, settings, name) for name in _SPECIALS}
        pair, serialized = ("vocab.json", "merges.txt"), directory / "tokenizer.json"
        if serialized.is_file() and not all((directory / name).is_file() for name in pair):
            speller = _Serialized.open(serialized, special)
        else:
            speller = _BytePairs.open(directory, special)
        return cls(
            length=_length(directory, settings, length),
            bos=speller.special[special["bos_token"]],
            eos=speller.special[special["eos_token"]],
            pad=speller.special[special["pad_token"]],
            speller=speller,
            learned=learned or {},
        )

    def ids(self, text: str) -> list[int]:
        """The ids of all of the text, without start, end or padding.

        Raises RequestError for text that UTF-8 can't hold.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the prompt's character {error.start + 1} is half of a surrogate pair; "
                "expected Unicode text; remove or retype it"
            ) from error
        return [token for _, _, ids in self._parts(text) for token in ids]

    def encode(self, text: str) -> Tokens:
        """The text cut or padded to the model's length; raises RequestError like `ids`."""
        ids, room = self.ids(text), self.length - 2
        row = [self.bos, *ids[:room], self.eos] + [self.pad] * (room - len(ids))
        return Tokens(ids=np.array([row], np.int64), truncated=text[self._start(text, room) :])

    def _start(self, text: str, token: int) -> int:
        """Where in the text the word begins that holds the token of this index; its end if there are fewer."""
        for begin, part, ids in self._parts(text):
            if token < len(ids):
                return begin + (self.speller.start(part, token) if part else 0)
            token -= len(ids)
        return len(text)

    def _parts(self, text: str) -> Iterator[tuple[int, str, Sequence[int]]]:
        """Learned words and what is between them: where each begins, its text (of learned words none) and its ids."""
        begin, words = 0, self._longest_first
        for found in self._learned_words.finditer(text) if words else ():
            yield begin, text[begin : found.start()], self.speller.ids(text[begin : found.start()])
            yield found.start(), "", self.learned[words[int(found.lastindex or 0) - 1]]
            begin = found.end()
        yield begin, text[begin:], self.speller.ids(text[begin:])

    @cached_property
    def _longest_first(self) -> list[str]:
        return sorted(self.learned, key=len, reverse=True)

    @cached_property
    def _learned_words(self) -> re.Pattern[str]:
        """Learned words, not within others, each a group: what a word's letters match has other spellings than its."""
        words = "|".join(f"({re.escape(word)})" for word in self._longest_first)
        return re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class _BytePairs:
    """vocab.json and merges.txt, read as transformers' CLIPTokenizer reads them without ftfy."""

    special: Mapping[str, int]
    """Ids of the tokens that are recognised wherever they are written in a prompt."""

    unknown: int
    """Id of what the vocabulary lacks."""

    bpe: Any
    """The byte-pair encoding of one word."""

    @classmethod
    def open(cls, directory: Path, special: Mapping[str, str]) -> "_BytePairs":
        vocabulary, merges = _vocabulary(directory / "vocab.json"), _merges(directory / "merges.txt")
        for left, right in merges:
            if not {left, right, left + right} <= vocabulary.keys():
                raise _damaged(directory / "merges.txt", f"joins {left!r} and {right!r}, unlike vocab.json")
        _require(directory / "vocab.json", vocabulary, special.values())
        unknown = special["unk_token"]
        bpe = _built(
            directory / "vocab.json",
            lambda: models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, end_of_word_suffix="</w>"),
        )
        ids = {token: vocabulary[token] for token in special.values()}
        return cls(special=ids, unknown=vocabulary[unknown], bpe=bpe)

    def ids(self, text: str) -> list[int]:
        return [token for _, _, ids in self._words(text) for token in ids]

    def start(self, text: str, token: int) -> int:
        """Where in the text the word begins that holds the token of this index."""
        for begin, offset, ids in self._words(text):
            token -= len(ids)
            if token < 0:
                rest = text[begin:]
                cleaned = bisect_right(range(len(rest) + 1), offset, key=lambda end: len(_clean(rest[:end])))
                return begin + cleaned - 1
        return len(text)

    def _words(self, text: str) -> Iterator[tuple[int, int, list[int]]]:
        """Where a part of the text begins, a word's offset in that part once cleaned, the word's ids."""
        literals = sorted(self.special, key=len, reverse=True)
        begin = 0
        for part in re.split(f"({'|'.join(map(re.escape, literals))})", text):
            if part in self.special:
                yield begin, 0, [self.special[part]]
            else:
                for word, (offset, _) in _WORDS.pre_tokenize_str(_clean(part)):
                    yield begin, offset, self._spell(word)
            begin += len(part)

    def _spell(self, word: str) -> list[int]:
        if word in _WHOLE:
            known = self.bpe.token_to_id(word)
            return [self.unknown if known is None else known]
        return [token.id for token in self.bpe.tokenize(word)]


@dataclass(frozen=True, kw_only=True)
class _Serialized:
    """tokenizer.json, read as transformers' CLIPTokenizerFast reads it."""

    special: Mapping[str, int]
    """Ids of the tokens that are recognised wherever they are written in a prompt."""

    tokenizer: Any
    """The tokenizer that the file describes, from clean-up to ids."""

    @classmethod
    def open(cls, path: Path, special: Mapping[str, str]) -> "_Serialized":
        content, known = _json(path), [_stages(_published(words)) for words in _FAST_WORDS]
        if _built(path, lambda: _stages(content)) not in known:
            raise _damaged(path, "cleans or splits text in another way")
        used = {name: content.get(name) for name in ("version", "added_tokens", *_STAGES)}
        tokenizer = _built(path, lambda: _NATIVE.from_str(json.dumps(used)))
        vocabulary, unknown = tokenizer.get_vocab(with_added_tokens=False), tokenizer.model.unk_token
        _require(path, vocabulary, [*special.values(), *([] if unknown is None else [unknown])])
        ids = {token: vocabulary[token] for token in special.values()}
        marked = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_special_tokens([token for token in ids if token not in marked])
        return cls(special=ids, tokenizer=tokenizer)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def start(self, text: str, token: int) -> int:
        """Where in the text the word begins that holds the token of this index."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return encoding.word_to_chars(encoding.token_to_word(token))[0]


def _clean(text: str) -> str:
    """The text in lower case and NFC, without control characters, ideographs apart, spaces single."""
    return " ".join(unicodedata.normalize("NFC", "".join(map(_visible, text))).split()).lower()


def _visible(char: str) -> str:
    category = unicodedata.category(char)
    if char in "\t\n\r" or category == "Zs":
        return " "
    if category.startswith("C") or char == "\ufffd":
        return ""
    return f" {char} " if _IDEOGRAPH.match(char) else char


def _published(words: str) -> dict[str, Any]:
    """The tokenizer.json of CLIP, without its vocabulary."""
    squeeze = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Removed", "invert": True}
    spell = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, squeeze, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, spell]},
        "model": {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>"},
    }


def _stages(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a tokenizer.json does, whatever its vocabulary, with every setting spelled out."""
    empty: dict[str, Any] = {"vocab": {}, "merges": [], "unk_token": None}
    stages: dict[str, Any] = {name: content[name] for name in _STAGES}
    stages |= {"version": "1.0", "added_tokens": [], "model": {"type": "BPE"} | stages["model"] | empty}
    return json.loads(_NATIVE.from_str(json.dumps(stages)).to_str())


def _require(path: Path, vocabulary: Mapping[str, int], special: Iterable[str]) -> None:
    for token in special:
        if token not in vocabulary:
            raise _damaged(path, f"lacks the special token {token!r}")


def _settings(directory: Path) -> dict[str, Any]:
    """What the two optional configuration files say; special_tokens_map.json is the older and yields."""
    config, tokens = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    settings = _json(config) if config.is_file() else {}
    if "added_tokens_decoder" in settings or not tokens.is_file():
        return settings
    return settings | _json(tokens)


def _special(directory: Path, settings: Mapping[str, Any], name: str) -> str:
    """The special token's text, which a file gives plain or as an object with its content."""
    value: Any = settings.get(name, _SPECIALS[name])
    content: Any = cast("dict[str, Any]", value).get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise _damaged(directory, f"has the {name} {json.dumps(value)}")
    return content


def _length(directory: Path, settings: Mapping[str, Any], limit: int | None) -> int:
    """The smaller of the tokenizer's length and the text encoder's, either of which may be unknown."""
    stated = settings.get("model_max_length")
    known = [value for value in (stated, limit) if value is not None]
    if not all(isinstance(value, int) and value >= 3 for value in known):
        raise _damaged(directory, f"is for {json.dumps(stated)} tokens, its text encoder for {limit}")
    length = min(known, default=_LONGEST + 1)
    if length > _LONGEST:
        raise _damaged(directory, "has no model_max_length and its text encoder no max_position_embeddings")
    return length


def _vocabulary(path: Path) -> dict[str, int]:
    vocabulary = _json(path)
    for token, known in vocabulary.items():
        if type(known) is not int or not 0 <= known < 2**31:
            raise _damaged(path, f"gives the token {token!r} the id {json.dumps(known)}")
    return vocabulary


def _merges(path: Path) -> list[tuple[str, str]]:
    """The pairs to join, first ones first; the first line is the format's version."""
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(_text(path).strip().split("\n")[1:], start=2):
        symbols = line.split()
        if len(symbols) != 2:
            raise _damaged(path, f"has {len(symbols)} symbols in line {number} instead of 2")
        merges.append((symbols[0], symbols[1]))
    return merges


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _damaged(path, "is not a JSON object")
    return cast("dict[str, Any]", content)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise _damaged(path, "is missing") from error
    except OSError as error:
        raise _damaged(path, f"can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise _damaged(path, "is not UTF-8 text") from error


def _built(path: Path, build: Callable[[], Any]) -> Any:
    """What `build` makes of the file; the tokenizers library raises bare Exception."""
    try:
        return build()
    except Exception as error:
        raise _damaged(path, f"is damaged ({error})") from error


def _damaged(path: Path, fact: str) -> PackageError:
    return PackageError(f"{path} {fact}; expected a CLIP tokenizer; run 'sdonnx export' again")
