"""A package's tokenizer files: a checkpoint's own, or CLIP's vocabulary for checkpoints that come without one."""

import gzip
import json
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from sdonnx_runtime.errors import ExportError, PackageError
from sdonnx_runtime.text.tokenizer_files import NUM_MERGES, VOCABULARY, TokenizerFiles

_START, _END = "<|startoftext|>", "<|endoftext|>"

_CONFIGS = ("added_tokens.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Write the files of a checkpoint's tokenizer; vocab.json and merges.txt come out of tokenizer.json if need be.

    Raises:
        ExportError: there is no vocabulary, or a file is damaged, or not that of CLIP's byte-pair encoding.
    """
    if not any((source / name).is_file() for name in ("tokenizer.json", VOCABULARY[0])):
        raise ExportError(f"{source} has no vocab.json with merges.txt and no tokenizer.json; download it again")
    read = read_tokenizer(source)
    directory.mkdir(parents=True, exist_ok=True)
    for name in (*_CONFIGS, *VOCABULARY):
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    if not all((source / name).is_file() for name in VOCABULARY):
        _write(directory / "vocab.json", _json(read.vocabulary))
        _write(directory / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, read.merges), ""]))


def read_tokenizer(directory: Path) -> TokenizerFiles:
    """Read the files of a checkpoint's tokenizer; raises ExportError."""
    try:
        return TokenizerFiles.read(directory)
    except PackageError as error:
        raise ExportError(str(error)) from None


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
    return lines[1 : 1 + NUM_MERGES]


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


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
