"""Textual inversion, arXiv:2208.01618: words that stand for learned vectors, and texts as their tokens' vectors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sdonnx_runtime.adapters.tensor_files import load_pickled, open_safetensors, tensors_in
from sdonnx_runtime.arrays import AnyArray, Array
from sdonnx_runtime.errors import PackageError, RequestError
from sdonnx_runtime.graphs.initializers import Initializer, read_initializers
from sdonnx_runtime.packages.manifest import EMBEDS
from sdonnx_runtime.packages.package import Package

TABLE = "text_model.embeddings.token_embedding.weight"
"""A text encoder's table of its tokens' vectors; ``TABLE_codes`` and ``TABLE_codes_scale`` where it is in 8 bits."""

_SLOTS: Mapping[str, str] = {
    "clip_l": "text_encoder", "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder", "text_encoders_1": "text_encoder_2",
}  # fmt: skip
"""What SDXL's files call the vectors of each of its encoders."""


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A word that a text encoder never learned."""

    word: str
    """As it is written in prompts."""
    vectors: Mapping[str, Array]
    """(n, C) for each text encoder's component; of one encoder's files the key is empty."""


def read_embedding(path: Path, word: str | None = None) -> Embedding:
    """A file of textual inversion: diffusers' or AUTOMATIC1111's, ``.safetensors``, ``.pt`` or ``.bin``.

    Args:
        path: the file.
        word: what stands for it in prompts; None is what the file says, or its name.

    Raises:
        RequestError: it can't be read, is hostile, or has no vectors or those of several words.
    """
    if path.suffix == ".safetensors":
        file = open_safetensors(path)
        found = {name: file.read(name) for name in file.shapes}
    else:
        data = load_pickled(path)
        found = tensors_in(data)
        a1111 = [each for name, each in found.items() if name.startswith("string_to_param.")]
        found = {"emb_params": a1111[0]} if len(a1111) == 1 else found
    vectors = {name: _rows(path, name, each) for name, each in found.items()}
    slots = {_SLOTS[name]: each for name, each in vectors.items() if name in _SLOTS}
    own = [name for name in vectors if name not in _SLOTS]
    if slots and not own:
        return Embedding(word=word or path.stem, vectors=slots)
    if slots or len(own) != 1:
        raise RequestError(f"{path} has {', '.join(vectors) or 'nothing'}; give a file with the vectors of one word")
    named = path.stem if own[0] == "emb_params" else own[0]
    return Embedding(word=word or named, vectors={"": vectors[own[0]]})


def _rows(path: Path, name: str, data: AnyArray) -> Array:
    if data.dtype.kind != "f" or data.ndim not in (1, 2) or data.size == 0 or not np.isfinite(data).all():
        raise RequestError(f"{path} has no vectors in '{name}' but {data.dtype} {data.shape}; give a textual inversion")
    return data.reshape(-1, data.shape[-1]).astype(np.float32, copy=False)


FIRST_PLACEHOLDER_ID = 2**31
"""The first id of learned words; vocabularies end before."""

Inputs: TypeAlias = tuple[dict[str, AnyArray], str]
"""What a text encoder is given, and the graph that takes it."""


class TextualInversions:
    """The words that a package's text encoders are taught.

    Args:
        package: whose.
        embeddings: of different words.

    Raises:
        RequestError: there are no vectors for an encoder, or of another width, or two are of one word.
        PackageError: an encoder has no graph that takes vectors.
    """

    def __init__(self, package: Package, embeddings: Sequence[Embedding] = ()) -> None:
        self._package = package
        self.words: dict[str, tuple[int, ...]] = {}
        """Ids of each word, in lower case."""
        for each in embeddings:
            self._add_word(each)
        encoders = package.manifest.text_encoders if embeddings else ()
        self._vectors = {
            encoder.component: np.concatenate([self._vectors_for(encoder.component, each) for each in embeddings])
            for encoder in encoders
        }

    def _add_word(self, embedding: Embedding) -> None:
        word = embedding.word.lower()
        if not word.strip() or word != word.strip() or word in self.words:
            raise RequestError(f"'{embedding.word}' can't stand for a textual inversion, or does so for two; name it")
        first = FIRST_PLACEHOLDER_ID + sum(map(len, self.words.values()))
        self.words[word] = tuple(range(first, first + len(next(iter(embedding.vectors.values())))))

    def _vectors_for(self, component: str, embedding: Embedding) -> Array:
        package, count = self._package, len(self.words[embedding.word.lower()])
        if "embedded" not in package.manifest.components[component].graphs:
            raise PackageError(
                f"{package.root} has no {component} that takes a word's vectors; export its checkpoint again"
            )
        single = len(package.manifest.text_encoders) == 1
        found = embedding.vectors.get(component, embedding.vectors.get("") if single else None)
        width = self._table(component)[0].shape[1]
        if found is None or found.shape != (count, width):
            has = ", ".join(f"{slot} {vectors.shape}".strip() for slot, vectors in embedding.vectors.items())
            raise RequestError(
                f"'{embedding.word}' has vectors {has}, but {component} of {package.name} takes {count} of width "
                f"{width}; take one that was made for this kind of model"
            )
        return found

    def inputs(self, component: str, ids: NDArray[np.int64]) -> Inputs:
        """What a text encoder is given for ids (N, S)."""
        new = ids >= FIRST_PLACEHOLDER_ID
        if not new.any():
            return {"input_ids": ids}, "plain"
        known = np.where(new, 0, ids)  # lower than the id of the end, which the encoder looks for
        vectors = self._rows(component, known)
        vectors[new] = self._vectors[component][ids[new] - FIRST_PLACEHOLDER_ID]
        return {"input_ids": known, EMBEDS: vectors}, "embedded"

    def _rows(self, component: str, ids: NDArray[np.int64]) -> Array:
        """(N, S, C): what the encoder's own table has."""
        table, scales = self._table(component)
        rows = np.memmap(table.file, table.dtype, "r", table.offset, table.shape)[ids].astype(np.float32)
        return rows if scales is None else rows * scales.read()[ids][..., None]

    def _table(self, component: str) -> tuple[Initializer, Initializer | None]:
        found = read_initializers(self._package.graph(component))
        if TABLE in found:
            return found[TABLE], None
        return found[f"{TABLE}_codes"], found[f"{TABLE}_codes_scale"]
