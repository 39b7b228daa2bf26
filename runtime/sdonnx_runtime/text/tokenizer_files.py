"""Read the files of a saved CLIP tokenizer, as transformers' CLIPTokenizer and CLIPTokenizerFast do."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.files.json_file import load_json
from sdonnx_runtime.files.kinds import describe_file

T = TypeVar("T")

_START, _END = "<|startoftext|>", "<|endoftext|>"
_SPECIALS = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
"""CLIP's special tokens, the defaults of a tokenizer's files."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MORE_SPECIALS = ("sep_token", "cls_token", "mask_token", "additional_special_tokens")

MAX_LENGTH = 1_000_000
"""transformers has a model_max_length above this where there is none."""

NUM_MERGES = 49152 - 256 - 2
"""Merges that CLIP has: its vocabulary less the 256 bytes and the special tokens. CLIPTokenizer reads no more."""

VOCABULARY = ("vocab.json", "merges.txt")
"""The files without which only CLIPTokenizerFast opens a directory, from its tokenizer.json."""

_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORDS = (_WORD, r"<\|startoftext\|>|<\|endoftext\|>|" + _WORD)
"""The patterns that transformers 4 and 5 write into tokenizer.json."""

_CLIP: Mapping[str, Any] = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ],
    },
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "behavior": "Removed", "invert": True},
            {"type": "ByteLevel", "add_prefix_space": False},
        ],
    },
    "model": {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "dropout": None},
}
"""CLIP's tokenizer.json without its vocabulary and pattern, and without what other tokenizers share."""


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token that is found in the text itself, before it is cleaned and encoded; flags are transformers'."""

    id: int
    single_word: bool = False
    """Whether it counts between spaces only."""
    lstrip: bool = False
    """Whether the spaces before it belong to it."""
    rstrip: bool = False
    """Whether the spaces after it belong to it."""
    normalized: bool = True
    """Whether CLIPTokenizerFast finds it in the normalized text, in upper or lower case."""
    special: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What the files of a tokenizer say."""

    directory: Path
    is_fast: bool
    """Whether diffusers opens it as CLIPTokenizerFast, whose ids differ for some texts."""
    vocabulary: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    """Pairs to join, in order."""
    word_pattern: str
    """Of CLIPTokenizerFast."""
    specials: Mapping[str, str]
    """The text of bos_token, eos_token, unk_token and pad_token."""
    added: Mapping[str, AddedToken]
    """By its text; the special tokens and those that a training added."""
    length: int | None
    """model_max_length, if there is one."""

    @classmethod
    def read(cls, directory: Path) -> "TokenizerFiles":
        """Read vocab.json and merges.txt, or tokenizer.json, and the optional files next to them.

        Raises:
            PackageError: files are missing or damaged, or not CLIP's.
        """
        settings = _settings(directory)
        vocabulary, merges, pattern = _read_bpe(directory)
        for left, right in merges:
            if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
                raise damaged(directory / "merges.txt", f"joins {left!r} and {right!r}, unlike vocab.json")
        specials = {name: _content(directory, name, settings.get(name, _SPECIALS[name])) for name in _SPECIALS}
        return cls(
            directory=directory,
            is_fast=is_fast(directory),
            vocabulary=vocabulary,
            merges=merges,
            word_pattern=pattern,
            specials=specials,
            added=_read_added(directory, settings, vocabulary),
            length=_length(directory, settings),
        )

    @property
    def size(self) -> int:
        """The number of embeddings that the ids require: one more than the highest."""
        return max([*self.vocabulary.values(), *(token.id for token in self.added.values())]) + 1


def is_fast(directory: Path) -> bool:
    """Whether diffusers opens the tokenizer as CLIPTokenizerFast, by the pipeline's model_index.json and its files."""
    index = directory.parent / "model_index.json"
    entry = _json(index).get(directory.name) if index.is_file() else None
    named = isinstance(entry, list) and cast("list[Any]", entry)[-1:] == ["CLIPTokenizerFast"]
    return named or not all((directory / name).is_file() for name in VOCABULARY)


def _settings(directory: Path) -> dict[str, Any]:
    """Read the two optional configuration files; special_tokens_map.json is the older and yields."""
    config, tokens = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    settings = _json(config) if config.is_file() else {}
    if "added_tokens_decoder" in settings or not tokens.is_file():
        return settings
    return settings | _json(tokens)


def _content(directory: Path, name: str, value: Any) -> str:
    """Get a special token's text, which is a string or an object with its content."""
    content: Any = cast("dict[str, Any]", value).get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content or re.search("[\ud800-\udfff]", content):
        raise damaged(directory, f"has the {name} {json.dumps(value)}")
    return content


def _read_added(directory: Path, settings: Mapping[str, Any], vocabulary: Mapping[str, int]) -> dict[str, AddedToken]:
    """Read the added tokens; special tokens that no file numbers have the vocabulary's ids, or the next free ones."""
    added: dict[str, AddedToken] = {}
    specials = dict(_special_tokens(directory, settings))
    for path, index, entry in _added_entries(directory, settings):
        content = _content(path, "added token", entry)
        added[content] = _added_token(path, content, index, {"special": content in specials, **_flags(entry)})
    for content, entry in specials.items():
        if content not in added:
            known = vocabulary.get(content)
            index = len(vocabulary.keys() | added.keys()) if known is None else known
            added[content] = _added_token(directory, content, index, {**_flags(entry), "special": True})
    return added


def _flags(entry: Any) -> dict[str, Any]:
    """Get the flags of an added token, which is a string or an object."""
    flags = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    return {name: flags[name] for name in _FLAGS if name in flags}


def _special_tokens(directory: Path, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the text and the entry of each special token, in transformers' order."""
    for name in (*_SPECIALS, *_MORE_SPECIALS):
        value = settings.get(name, _SPECIALS.get(name))
        several = cast("list[Any]", value) if isinstance(value, list) else [] if value is None else [value]
        for each in several:
            yield _content(directory, name, each), each


def _added_entries(directory: Path, settings: Mapping[str, Any]) -> Iterator[tuple[Path, Any, Any]]:
    """Yield the file, id and entry of each added token.

    transformers reads added_tokens.json and tokenizer.json only where there is no ``added_tokens_decoder``.
    """
    config, added, fast = (directory / n for n in ("tokenizer_config.json", "added_tokens.json", "tokenizer.json"))
    if "added_tokens_decoder" in settings:
        for index, entry in _mapping(config, settings["added_tokens_decoder"]).items():
            yield config, int(index) if index.isdecimal() and len(index) < 11 else index, entry
        return
    if added.is_file():
        yield from ((added, index, content) for content, index in _json(added).items())
    if fast.is_file():
        for entry in _list(fast, _json(fast).get("added_tokens", [])):
            yield fast, _mapping(fast, entry).get("id"), entry


def _added_token(path: Path, content: str, index: Any, flags: dict[str, Any]) -> AddedToken:
    flags = {"normalized": not flags["special"], **flags}
    if type(index) is not int or not 0 <= index < 2**31 or not all(type(flag) is bool for flag in flags.values()):
        raise damaged(path, f"gives the token {content!r} the id {json.dumps(index)} and {json.dumps(flags)}")
    return AddedToken(id=index, **flags)


def _length(directory: Path, settings: Mapping[str, Any]) -> int | None:
    """Get the length; ``max_len`` is its name in old files."""
    length = settings.get("model_max_length", settings.get("max_len"))
    if isinstance(length, float) and length.is_integer():
        length = int(length)
    if length is not None and (type(length) is not int or length < 3):
        raise damaged(directory, f"is for {json.dumps(length)} tokens")
    return length


def _read_bpe(directory: Path) -> tuple[dict[str, int], list[tuple[str, str]], str]:
    """Read vocabulary, merges and word pattern, from tokenizer.json where only that is there."""
    fast = directory / "tokenizer.json"
    if fast.is_file() and is_fast(directory):
        return _read_fast_bpe(fast)
    vocabulary, merges = (directory / name for name in VOCABULARY)
    return _check_vocabulary(vocabulary, _json(vocabulary)), _merges(merges), _WORD


def _read_fast_bpe(path: Path) -> tuple[dict[str, int], list[tuple[str, str]], str]:
    """Read vocabulary, merges and word pattern of a tokenizer.json that is CLIP's but for these."""
    content = _json(path)
    pattern = _word_pattern(content)
    if not _includes(content, _CLIP) or pattern is None:
        raise PackageError(f"{path} is not CLIP's byte-pair encoding; only Stable Diffusion's tokenizers are supported")
    model = _mapping(path, content["model"])
    vocabulary = _check_vocabulary(path, _mapping(path, model.get("vocab")))
    merges = [_pair(path, each) for each in _list(path, model.get("merges"))]
    if not all({left, right, left + right} <= vocabulary.keys() for left, right in merges):
        raise damaged(path, "has merges and a vocabulary that differ")
    return vocabulary, merges, pattern


def _pair(path: Path, merge: Any) -> tuple[str, str]:
    """Read one of tokenizer.json's merges, which is a list or has a space between its symbols."""
    symbols = merge.split(" ") if isinstance(merge, str) else _list(path, merge)
    if len(symbols) != 2 or not all(type(symbol) is str for symbol in symbols):
        raise damaged(path, f"has the merge {json.dumps(merge)[:40]} instead of two symbols")
    return symbols[0], symbols[1]


def _word_pattern(content: Mapping[str, Any]) -> str | None:
    """Get the pattern of words if it is CLIP's."""
    try:
        pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    except (LookupError, TypeError):
        return None
    return pattern if pattern in _WORDS else None


def _includes(content: Any, expected: Any) -> bool:
    """Whether JSON has all of the expected keys and items with their values; an absent key is null."""
    if isinstance(expected, dict):
        items = cast("dict[str, Any]", expected).items()
        return isinstance(content, dict) and all(
            _includes(cast("dict[str, Any]", content).get(key), each) for key, each in items
        )
    if isinstance(expected, list):
        own, items = cast("list[Any]", content), cast("list[Any]", expected)
        return isinstance(content, list) and len(own) == len(items) and all(map(_includes, own, items))
    return bool(content == expected)


def _check_vocabulary(path: Path, vocabulary: dict[str, Any]) -> dict[str, int]:
    for token, index in vocabulary.items():
        if type(index) is not int or not 0 <= index < 2**31:
            raise damaged(path, f"gives the token {token!r} the id {json.dumps(index)}")
    return vocabulary


def _merges(path: Path) -> list[tuple[str, str]]:
    """Read the pairs to join, in order; the first line is the format's version."""
    merges: list[tuple[str, str]] = []
    lines = _read(path, lambda path: path.read_text(encoding="utf-8")).strip().split("\n", 1 + NUM_MERGES)
    for number, line in enumerate(lines[1 : 1 + NUM_MERGES], start=2):
        symbols = line.split()
        if len(symbols) != 2:
            raise damaged(path, f"has {len(symbols)} symbols in line {number} instead of 2")
        merges.append((symbols[0], symbols[1]))
    return merges


def _mapping(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise damaged(path, f"has {json.dumps(value)[:40]} instead of an object")
    return cast("dict[str, Any]", value)


def _list(path: Path, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise damaged(path, f"has {json.dumps(value)[:40]} instead of a list")
    return cast("list[Any]", value)


def _json(path: Path) -> dict[str, Any]:
    content = _read(path, load_json)
    if not isinstance(content, dict):
        raise damaged(path, "is not a JSON object")
    return cast("dict[str, Any]", content)


def _read(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except FileNotFoundError as error:
        raise damaged(path, "is missing") from error
    except OSError as error:
        raise damaged(path, f"can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise damaged(path, "is not UTF-8 text") from error
    except ValueError as error:
        raise damaged(path, f"is not JSON ({error})") from error


def damaged(path: Path, fact: str) -> PackageError:
    """Return the error for tokenizer files that can't be used."""
    what = describe_file(path, is_text=True) if path.is_file() else None
    fact = what or f"{fact}; expected a CLIP tokenizer; download it or run 'sdonnx export' again"
    return PackageError(f"{path} {fact}")
