"""A package's tokenizer files: a checkpoint's own, or CLIP's vocabulary for checkpoints that come without one."""

import gzip
import json
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from sdonnx_runtime.errors import ExportError

_MERGES = 49152 - 256 - 2
"""Number of published merges that CLIP uses: its vocabulary less the 256 bytes and the special tokens."""

_START, _END = "<|startoftext|>", "<|endoftext|>"


_CONFIGS = ("special_tokens_map.json", "tokenizer_config.json")
_VOCABULARY = ("vocab.json", "merges.txt")

_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORDS = (_WORD, r"<\|startoftext\|>|<\|endoftext\|>|" + _WORD)
"""The patterns that transformers 4 and 5 write into tokenizer.json."""

_SQUEEZE = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
_CLIP: Mapping[str, Any] = {
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, _SQUEEZE, {"type": "Lowercase"}]},
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


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Write the files of a checkpoint's tokenizer; vocab.json and merges.txt come out of tokenizer.json if need be.

    Raises:
        ExportError: there is no vocabulary, or a tokenizer.json that isn't CLIP's byte-pair encoding.
    """
    directory.mkdir(parents=True, exist_ok=True)
    there = [name for name in (*_CONFIGS, *_VOCABULARY, "tokenizer.json") if (source / name).is_file()]
    for name in there:
        shutil.copyfile(source / name, directory / name)
    if all(name in there for name in _VOCABULARY):
        return
    if "tokenizer.json" not in there:
        raise ExportError(f"{source} has no vocab.json with merges.txt and no tokenizer.json; download it again")
    vocabulary, merges = _read_clip_model(source / "tokenizer.json")
    _write(directory / "vocab.json", _json(vocabulary))
    _write(directory / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))


def _read_clip_model(path: Path) -> tuple[dict[str, int], list[str]]:
    """Read the vocabulary and the merges of a tokenizer.json that is CLIP's but for these."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        is_clip = _includes(content, _CLIP) and _word_pattern(content) in _WORDS
        vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        known = all({left, right, left + right} <= vocabulary.keys() for left, right in pairs)
        added = {token["content"] for token in content.get("added_tokens", ())}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ExportError(f"{path} is damaged ({type(error).__name__}: {error}); download it again") from None
    if not is_clip or not added <= vocabulary.keys():
        raise ExportError(f"{path} is not CLIP's byte-pair encoding; only Stable Diffusion's tokenizers are supported")
    if not known or not all(type(index) is int for index in vocabulary.values()):
        raise ExportError(f"{path} is damaged (its merges and its vocabulary differ); download it again")
    return vocabulary, [" ".join(pair) for pair in pairs]


def _word_pattern(content: Mapping[str, Any]) -> str:
    return content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]


def _includes(content: Any, expected: Any) -> bool:
    """Whether JSON has all of the expected keys and items with their values; an absent key is null."""
    if isinstance(expected, dict):
        return isinstance(content, dict) and all(_includes(content.get(key), each) for key, each in expected.items())
    if isinstance(expected, list):
        return isinstance(content, list) and len(content) == len(expected) and all(map(_includes, content, expected))
    return bool(content == expected)


def write_clip_tokenizer(directory: Path, pad: str = _END) -> None:
    """Write vocab.json (49408 tokens), merges.txt, special_tokens_map.json and tokenizer_config.json.

    They equal, byte for byte, those in the tokenizer/ directory of stable-diffusion-v1-5, but for ``pad``, the padding
    token: "!" in Stable Diffusion 2 and the second encoder of SDXL. The directory is created if needed; existing files
    are replaced.
    """
    merges = _merges()
    tokens = {"bos_token": _special(_START), "eos_token": _special(_END), "unk_token": _special(_END)}
    typed = {name: {"__type": "AddedToken"} | token for name, token in tokens.items()}
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "name_or_path": "openai/clip-vit-large-patch14",
        "pad_token": pad,
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
    }
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "vocab.json", _json(_vocabulary(merges)))
    _write(directory / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    _write(directory / "special_tokens_map.json", _json(tokens | {"pad_token": pad}))
    _write(directory / "tokenizer_config.json", _json(config | typed))


def _merges() -> list[str]:
    """Read the byte-pair merges, "i n" first."""
    published = files("sdonnx_export") / "data" / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(published.read_bytes()).decode("utf-8").split("\n")
    return lines[1 : 1 + _MERGES]


def _vocabulary(merges: list[str]) -> dict[str, int]:
    """Number the tokens: bytes, bytes at the end of a word, merges, the two special tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    stand_ins = range(256, 512 - len(printable))
    symbols = [chr(code) for code in (*printable, *stand_ins)]
    ending = [symbol + "</w>" for symbol in symbols]
    joined = [merge.replace(" ", "") for merge in merges]
    return {token: index for index, token in enumerate((*symbols, *ending, *joined, _START, _END))}


def _special(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
