"""CLIP's tokenizer: a prompt's token ids, the same as diffusers'."""

import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import count, groupby, takewhile
from pathlib import Path
from typing import Any, TypeAlias

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.text.tokenizer_files import MAX_LENGTH, AddedToken, TokenizerFiles, damaged

# The published pattern ignores case, where U+017F is the letter s and the mark U+0345 is a letter too.
_WORD = (
    r"<\|[s\x{17f}]tartoftext\|>|<\|endoftext\|>"
    r"|'[s\x{17f}]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
)
_WHOLE = ("<|startoftext|>", "<|endoftext|>")
"""Words of the cleaned text that are tokens themselves."""

_SPLIT: Any = pre_tokenizers.Split(tokenizers.Regex(_WORD), behavior="removed", invert=True)
_WORDS: Any = pre_tokenizers.Sequence([_SPLIT, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

_FAST_NORMALIZER: Any = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
)
"""Of CLIPTokenizerFast."""

_IDEOGRAPH = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)

Word: TypeAlias = tuple[int, int, Sequence[int]]
"""A word's ids, after the index in the text of its span, and its offset in the span once cleaned."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """CLIP's byte-pair encoding with a vocabulary, as in transformers: CLIPTokenizer (without ftfy) or the fast one."""

    length: int
    """Tokens per prompt, start and end included: 77 for every published Stable Diffusion; at least 3."""
    bos: int
    """Id of the token that starts a prompt."""
    eos: int
    """Id of the token that ends a prompt."""
    pad: int
    """Id of the token that pads to `length`."""
    size: int
    """The number of embeddings that the ids require."""
    words: Callable[[str], Iterable[Word]]
    """Split a text into its words and added tokens."""
    vectors: Mapping[int, tuple[int, ...]]
    """Ids of the tokens ``x``, ``x_1``, ``x_2`` … by the first, for which ``x`` stands in a prompt of diffusers."""
    placeholders: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Ids, beyond the vocabulary's, of textual inversions' placeholder tokens, which ignore case."""

    @classmethod
    def open(
        cls, directory: Path, *, length: int | None = None, placeholders: Mapping[str, tuple[int, ...]] | None = None
    ) -> "Tokenizer":
        """Open a directory with the files that `TokenizerFiles` reads.

        ``length`` is the text encoder's max_position_embeddings; a smaller model_max_length goes before it.

        Raises:
            PackageError: files are missing or damaged.
        """
        files = TokenizerFiles.read(directory)
        bos, eos, pad = (files.added[files.specials[name]].id for name in ("bos_token", "eos_token", "pad_token"))
        return cls(
            length=_length(files, length),
            bos=bos,
            eos=eos,
            pad=pad,
            size=files.size,
            words=_FastWords.make(files) if files.is_fast else _Words.make(files),
            vectors=_vectors(files.added),
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
        return padded, text[self.word_start(text, room) :]

    def word_start(self, text: str, token: int) -> int:
        """The index in the text of the word that has the token of this index; the text's end if there are fewer."""
        return self.word_starts(text, [token])[0]

    def word_starts(self, text: str, tokens: Sequence[int]) -> list[int]:
        """`word_start` of several tokens, in ascending order."""
        starts, known = list[int](), 0
        for begin, offset, ids in self._words(text):
            known += len(ids)
            while len(starts) < len(tokens) and tokens[len(starts)] < known:
                rest, ends = text[begin:], range(len(text) - begin + 1)
                starts.append(begin + bisect_right(ends, offset, key=lambda end: len(_clean(rest[:end]))) - 1)
        return starts + [len(text)] * (len(tokens) - len(starts))

    def _words(self, text: str) -> Iterator[Word]:
        begin = 0
        for match in self._placeholder_pattern.finditer(text) if self.placeholders else ():
            yield from self._vocabulary_words(begin, text[begin : match.start()])
            yield match.start(), 0, self.placeholders[self._longest_first[int(match.lastindex or 0) - 1]]
            begin = match.end()
        yield from self._vocabulary_words(begin, text[begin:])

    def _vocabulary_words(self, begin: int, text: str) -> Iterator[Word]:
        """Like `_words`, for a part of the text without placeholders."""
        for start, offset, ids in self.words(text):
            yield begin + start, offset, self.vectors.get(ids[0], ids) if len(ids) == 1 else ids

    @cached_property
    def _longest_first(self) -> list[str]:
        return sorted(self.placeholders, key=len, reverse=True)

    @cached_property
    def _placeholder_pattern(self) -> re.Pattern[str]:
        """Placeholders outside of other words, a group each: what matches may be spelled in another way."""
        words = "|".join(f"({re.escape(word)})" for word in self._longest_first)
        return re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class _Words:
    """CLIPTokenizer's words: added tokens are split off, the rest is cleaned, split and encoded."""

    bpe: Any
    """``tokenizers.models.BPE`` of one word."""
    unknown: int
    """Id of what the vocabulary lacks."""
    added: Mapping[str, AddedToken]

    @classmethod
    def make(cls, files: TokenizerFiles) -> "_Words":
        name = files.specials["unk_token"]
        unknown = files.added[name].id
        return cls(bpe=_build_bpe(files, {name: unknown, **files.vocabulary}, name), unknown=unknown, added=files.added)

    def __call__(self, text: str) -> Iterator[Word]:
        for begin, span in self._split(text):
            if span in self.added:
                yield begin, 0, [self.added[span].id]
            else:
                for word, (offset, _) in _WORDS.pre_tokenize_str(_clean(span)):
                    yield begin, offset, self._encode(word)

    def _split(self, text: str) -> Iterator[tuple[int, str]]:
        """Yield the spans and where they begin; a token of whole words that touches its neighbour is a part of that."""
        spans = [span for span in self._pattern.split(text) if span]
        begins = [0]
        for span in spans:
            begins.append(begins[-1] + len(span))
        for index, span in enumerate(spans):
            token = self.added.get(span)
            if token is None:
                continue
            left, right = "".join(spans[max(index - 1, 0) : index]), "".join(spans[index + 1 : index + 2])
            if token.rstrip and right:
                spans[index + 1] = right.lstrip()
                begins[index + 1] += len(right) - len(spans[index + 1])
            if token.lstrip and left:
                spans[index - 1] = left.rstrip()
            if token.single_word and left and left[-1] != " ":
                spans[index - 1 : index + 1] = [spans[index - 1] + span, ""]
            elif token.single_word and right and right[0] != " ":
                spans[index : index + 2] = ["", span + spans[index + 1]]
                begins[index + 1] = begins[index]
        return ((begin, span) for begin, span in zip(begins, spans, strict=False) if span)

    def _encode(self, word: str) -> list[int]:
        if word in _WHOLE:
            known = self.added[word].id if word in self.added else self.bpe.token_to_id(word)
            return [self.unknown if known is None else known]
        pieces = self.bpe.tokenize(word)
        return [self.added[piece.value].id if piece.value in self.added else piece.id for piece in pieces]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(map(re.escape, sorted(self.added, key=len, reverse=True)))})")


@dataclass(frozen=True, kw_only=True)
class _FastWords:
    """CLIPTokenizerFast's words: the tokenizers library splits and encodes all of the text."""

    backend: Any
    """``tokenizers.Tokenizer``."""

    @classmethod
    def make(cls, files: TokenizerFiles) -> "_FastWords":
        backend: Any = tokenizers.Tokenizer(_build_bpe(files, files.vocabulary, files.specials["unk_token"]))
        backend.normalizer = _FAST_NORMALIZER
        split: Any = pre_tokenizers.Split(tokenizers.Regex(files.word_pattern), behavior="removed", invert=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        for content, token in sorted(files.added.items(), key=lambda item: item[1].id):
            flags = {name: value for name, value in asdict(token).items() if name != "id"}
            add = backend.add_special_tokens if token.special else backend.add_tokens
            add([tokenizers.AddedToken(content, **flags)])
            if backend.token_to_id(content) != token.id:
                raise damaged(files.directory, f"gives the token {content!r} the id {token.id}, which isn't the next")
        return cls(backend=backend)

    def __call__(self, text: str) -> Iterator[Word]:
        encoding = self.backend.encode(text, add_special_tokens=False)
        tokens = zip(encoding.word_ids, encoding.offsets, encoding.ids, strict=True)
        for _, word in groupby(tokens, key=lambda token: token[0]):
            _, ((begin, _), *_), ids = zip(*word, strict=True)
            yield begin, 0, ids


def _vectors(added: Mapping[str, AddedToken]) -> dict[int, tuple[int, ...]]:
    """Find the added tokens of several vectors."""
    found: dict[int, tuple[int, ...]] = {}
    for content, token in added.items():
        more = takewhile(added.__contains__, (f"{content}_{index}" for index in count(1)))
        found[token.id] = (token.id, *(added[each].id for each in more))
    return {first: ids for first, ids in found.items() if len(ids) > 1}


def _length(files: TokenizerFiles, limit: int | None) -> int:
    """Get the smaller of the tokenizer's length and the text encoder's, either of which may be unknown."""
    known = [value for value in (files.length, limit) if value is not None]
    length = min(known, default=MAX_LENGTH + 1)
    if length < 3:
        raise damaged(files.directory, f"is for {json.dumps(files.length)} tokens, its text encoder for {limit}")
    if length > MAX_LENGTH:
        raise damaged(files.directory, "has no model_max_length and its text encoder no max_position_embeddings")
    return length


def _build_bpe(files: TokenizerFiles, vocabulary: Mapping[str, int], unknown: str) -> Any:
    try:
        return models.BPE(
            vocab=dict(vocabulary), merges=list(files.merges), unk_token=unknown, end_of_word_suffix="</w>"
        )
    except Exception as error:  # of any kind: the library raises bare Exception
        raise damaged(files.directory / "vocab.json", f"is damaged ({error})") from error


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
