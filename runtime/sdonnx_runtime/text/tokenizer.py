"""CLIP's tokenizer: a prompt's token ids, the same as diffusers'."""

import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import tokenizers
from tokenizers import models, pre_tokenizers

from sdonnx_runtime.errors import PackageError, RequestError

_START, _END = "<|startoftext|>", "<|endoftext|>"
_SPECIALS = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
"""CLIP's special tokens, the defaults of a tokenizer's files."""

_MAX_LENGTH = 1_000_000
"""transformers has a model_max_length above this where there is none."""

# The published pattern ignores case, where U+017F is the letter s and the mark U+0345 is a letter too.
_WORD = (
    r"<\|[s\x{17f}]tartoftext\|>|<\|endoftext\|>"
    r"|'[s\x{17f}]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
)
_WHOLE = (_START, _END)
"""Words of the cleaned text that are tokens themselves."""

_SPLIT: Any = pre_tokenizers.Split(tokenizers.Regex(_WORD), behavior="removed", invert=True)
_WORDS: Any = pre_tokenizers.Sequence([_SPLIT, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

_IDEOGRAPH = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """CLIP's byte-pair encoding with a vocabulary, read as transformers' CLIPTokenizer does without ftfy."""

    length: int
    """Tokens per prompt, start and end included: 77 for every published Stable Diffusion; at least 3."""
    bos: int
    """Id of the token that starts a prompt."""
    eos: int
    """Id of the token that ends a prompt."""
    pad: int
    """Id of the token that pads to `length`."""
    unknown: int
    """Id of what the vocabulary lacks."""
    special: Mapping[str, int]
    """Ids of the special tokens, which are recognised anywhere in a prompt."""
    bpe: Any
    """``tokenizers.models.BPE`` of one word."""
    placeholders: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Ids, beyond the vocabulary's, of textual inversions' placeholder tokens, which ignore case."""

    @classmethod
    def open(
        cls, directory: Path, *, length: int | None = None, placeholders: Mapping[str, tuple[int, ...]] | None = None
    ) -> "Tokenizer":
        """Open a directory with vocab.json, merges.txt, and optional tokenizer_config.json and special_tokens_map.json.

        ``length`` is the text encoder's max_position_embeddings; a smaller model_max_length goes before it.

        Raises:
            PackageError: files are missing or damaged.
        """
        settings = _settings(directory)
        names = {name: _special(directory, settings, name) for name in _SPECIALS}
        vocabulary, merges = _vocabulary(directory / "vocab.json"), _merges(directory / "merges.txt")
        for left, right in merges:
            if not {left, right, left + right} <= vocabulary.keys():
                raise _damaged(directory / "merges.txt", f"joins {left!r} and {right!r}, unlike vocab.json")
        for token in names.values():
            if token not in vocabulary:
                raise _damaged(directory / "vocab.json", f"lacks the special token {token!r}")
        return cls(
            length=_length(directory, settings, length),
            bos=vocabulary[names["bos_token"]],
            eos=vocabulary[names["eos_token"]],
            pad=vocabulary[names["pad_token"]],
            unknown=vocabulary[names["unk_token"]],
            special={token: vocabulary[token] for token in names.values()},
            bpe=_build_bpe(directory, vocabulary, merges, names["unk_token"]),
            placeholders=placeholders or {},
        )

    def ids(self, text: str) -> list[int]:
        """Encode the text without start, end or padding.

        Raises:
            RequestError: the text is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the prompt's character {error.start + 1} is half of a surrogate pair; "
                "expected Unicode text; remove or retype it"
            ) from error
        return [token for _, _, ids in self._words(text) for token in ids]

    def encode(self, text: str) -> tuple[tuple[int, ...], str]:
        """Encode the text to `length` ids: start, as many tokens as fit, end, padding; raises like `ids`.

        The second value is the text from the first word that doesn't fit whole, empty if all of it fits.
        """
        ids, room = self.ids(text), self.length - 2
        padded = (self.bos, *ids[:room], self.eos, *[self.pad] * (room - len(ids)))
        return padded, text[self._word_start(text, room) :]

    def _word_start(self, text: str, token: int) -> int:
        """The index in the text of the word that has the token of this index; the text's end if there are fewer."""
        for begin, offset, ids in self._words(text):
            token -= len(ids)
            if token < 0:
                rest = text[begin:]
                return begin + bisect_right(range(len(rest) + 1), offset, key=lambda end: len(_clean(rest[:end]))) - 1
        return len(text)

    def _words(self, text: str) -> Iterator[tuple[int, int, Sequence[int]]]:
        """Each word's ids, the index in the text of its span, and its offset in the span once cleaned."""
        begin = 0
        for match in self._placeholder_pattern.finditer(text) if self.placeholders else ():
            yield from self._vocabulary_words(begin, text[begin : match.start()])
            yield match.start(), 0, self.placeholders[self._longest_first[int(match.lastindex or 0) - 1]]
            begin = match.end()
        yield from self._vocabulary_words(begin, text[begin:])

    def _vocabulary_words(self, begin: int, text: str) -> Iterator[tuple[int, int, Sequence[int]]]:
        """Like `_words`, for a part of the text without placeholders."""
        for span in self._special_pattern.split(text):
            if span in self.special:
                yield begin, 0, [self.special[span]]
            else:
                for word, (offset, _) in _WORDS.pre_tokenize_str(_clean(span)):
                    yield begin, offset, self._bpe(word)
            begin += len(span)

    def _bpe(self, word: str) -> list[int]:
        if word in _WHOLE:
            known = self.bpe.token_to_id(word)
            return [self.unknown if known is None else known]
        return [token.id for token in self.bpe.tokenize(word)]

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(map(re.escape, sorted(self.special, key=len, reverse=True)))})")

    @cached_property
    def _longest_first(self) -> list[str]:
        return sorted(self.placeholders, key=len, reverse=True)

    @cached_property
    def _placeholder_pattern(self) -> re.Pattern[str]:
        """Placeholders outside of other words, a group each: what matches may be spelled in another way."""
        words = "|".join(f"({re.escape(word)})" for word in self._longest_first)
        return re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)


def _build_bpe(directory: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], unknown: str) -> Any:
    try:
        return models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, end_of_word_suffix="</w>")
    except Exception as error:  # of any kind: the library raises bare Exception
        raise _damaged(directory / "vocab.json", f"is damaged ({error})") from error


def _clean(text: str) -> str:
    """Normalize the text: lower case, NFC, no control characters, single spaces, also around ideographs."""
    return " ".join(unicodedata.normalize("NFC", "".join(map(_visible, text))).split()).lower()


def _visible(char: str) -> str:
    category = unicodedata.category(char)
    if char in "\t\n\r" or category == "Zs":
        return " "
    if category.startswith("C") or char == "\ufffd":
        return ""
    return f" {char} " if _IDEOGRAPH.match(char) else char


def _settings(directory: Path) -> dict[str, Any]:
    """Read the two optional configuration files; special_tokens_map.json is the older and yields."""
    config, tokens = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    settings = _json(config) if config.is_file() else {}
    if "added_tokens_decoder" in settings or not tokens.is_file():
        return settings
    return settings | _json(tokens)


def _special(directory: Path, settings: Mapping[str, Any], name: str) -> str:
    """Get a special token's text, which is a string or an object with its content."""
    value: Any = settings.get(name, _SPECIALS[name])
    content: Any = cast("dict[str, Any]", value).get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise _damaged(directory, f"has the {name} {json.dumps(value)}")
    return content


def _length(directory: Path, settings: Mapping[str, Any], limit: int | None) -> int:
    """Get the smaller of the tokenizer's length and the text encoder's, either of which may be unknown."""
    own = settings.get("model_max_length")
    known = [value for value in (own, limit) if value is not None]
    if not all(isinstance(value, int) and value >= 3 for value in known):
        raise _damaged(directory, f"is for {json.dumps(own)} tokens, its text encoder for {limit}")
    length = min(known, default=_MAX_LENGTH + 1)
    if length > _MAX_LENGTH:
        raise _damaged(directory, "has no model_max_length and its text encoder no max_position_embeddings")
    return length


def _vocabulary(path: Path) -> dict[str, int]:
    vocabulary = _json(path)
    for token, index in vocabulary.items():
        if type(index) is not int or not 0 <= index < 2**31:
            raise _damaged(path, f"gives the token {token!r} the id {json.dumps(index)}")
    return vocabulary


def _merges(path: Path) -> list[tuple[str, str]]:
    """Read the pairs to join, in order; the first line is the format's version."""
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


def _damaged(path: Path, fact: str) -> PackageError:
    return PackageError(f"{path} {fact}; expected a CLIP tokenizer; run 'sdonnx export' again")
