"""Every fuzzed parser by name."""

from collections.abc import Callable, Mapping
from pathlib import Path

from support.fuzz import package_parsers, request_parsers
from support.fuzz.campaign import Target


def _checkpoint(name: str) -> Callable[[Path], Target]:
    def make(folder: Path) -> Target:
        from support.fuzz import checkpoint_parsers  # which imports diffusers

        return getattr(checkpoint_parsers, name)(folder)

    return make


def _tensors(name: str) -> Callable[[Path], Target]:
    def make(folder: Path) -> Target:
        from support.fuzz import tensor_parsers  # which imports torch

        return getattr(tensor_parsers, name)(folder)

    return make


PARSERS: Mapping[str, Callable[[Path], Target]] = {
    "safetensors": _tensors("safetensors"),
    "gguf": _tensors("gguf"),
    "pickle": _tensors("pickle"),
    "embedding": _tensors("embedding"),
    "lora": _tensors("lora"),
    "latents": request_parsers.latents,
    "png": request_parsers.png,
    "prompt": request_parsers.prompt,
    "template": request_parsers.template,
    "styles": request_parsers.styles,
    "batch": request_parsers.batch,
    "manifest": package_parsers.manifest,
    "optimum": package_parsers.optimum,
    "scheduler": package_parsers.scheduler,
    "onnx": package_parsers.onnx,
    "tokenizer": package_parsers.tokenizer,
    "directory": _checkpoint("directory"),
    "single_file": _checkpoint("single_file"),
    "original_config": _checkpoint("original_config"),
}
"""Each makes its target in an empty folder."""
