"""CLIP's vocabulary as Stable Diffusion 1.x repositories carry it, for checkpoints that come without one."""

import gzip
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

_MERGES = 49152 - 256 - 2
"""How many of the published merges CLIP uses; 256 bytes and two special tokens are the rest."""

_START, _END = "<|startoftext|>", "<|endoftext|>"


def write_clip_tokenizer(directory: Path, pad: str = _END) -> None:
    """Write vocab.json (49408 tokens), merges.txt, special_tokens_map.json and tokenizer_config.json.

    They equal, byte for byte, those in the tokenizer/ directory of stable-diffusion-v1-5, but for ``pad``, the token
    after a prompt's end: Stable Diffusion 2 and the second encoder of SDXL have "!". The directory is made if it is
    not there; files of these names in it are replaced.
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
    """The pairs of symbols that CLIP joins, "i n" first."""
    published = files("sdonnx_export") / "data" / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(published.read_bytes()).decode("utf-8").split("\n")
    return lines[1 : 1 + _MERGES]


def _vocabulary(merges: list[str]) -> dict[str, int]:
    """Ids by token: the bytes, the bytes that end a word, the merges, the two special tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    stand_ins = range(256, 512 - len(printable))
    symbols = [chr(code) for code in (*printable, *stand_ins)]
    ending = [symbol + "</w>" for symbol in symbols]
    joined = [merge.replace(" ", "") for merge in merges]
    return {token: place for place, token in enumerate((*symbols, *ending, *joined, _START, _END))}


def _special(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
