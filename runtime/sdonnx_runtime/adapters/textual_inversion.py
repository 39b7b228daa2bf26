"""Textual inversion, arXiv:2208.01618: placeholder tokens with learned vectors."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdonnx_runtime.arrays import AnyArray, Array
from sdonnx_runtime.errors import PackageError, RequestError
from sdonnx_runtime.files.tensor_file import TensorFile
from sdonnx_runtime.files.tensors import open_tensors
from sdonnx_runtime.graphs.initializers import Initializer, read_initializers
from sdonnx_runtime.graphs.onnx_proto import package_errors
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.packages.variant import EMBEDDED, EMBEDS, PLAIN

TABLE = "text_model.embeddings.token_embedding.weight"
"""A text encoder's token embeddings; in int8 ``TABLE_quantized`` and ``TABLE_quantized_scale``."""

_SLOTS: Mapping[str, str] = {
    "clip_l": "text_encoder", "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder", "text_encoders_1": "text_encoder_2",
}  # fmt: skip
"""SDXL's names of the vectors for each text encoder."""


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A textual inversion."""

    word: str
    """The trigger word in prompts."""
    vectors: Mapping[str, Array]
    """(n, C) by text encoder component; the key is empty in a file for one encoder."""


def read_embedding(path: Path, word: str | None = None) -> Embedding:
    """Read a textual inversion of diffusers or AUTOMATIC1111: ``.safetensors``, ``.pt`` or ``.bin``.

    ``word`` is the trigger word; None is the file's own, or the file's name.

    Raises:
        RequestError: the file can't be read, is hostile, or has no vectors or those of several words.
    """
    file = open_tensors(path)
    a1111 = [name for name in file.shapes if name.startswith("string_to_param.")]
    keys = {"emb_params": a1111[0]} if len(a1111) == 1 else {name: name for name in file.shapes}
    vectors = {name: _read_vectors(file, key) for name, key in keys.items()}
    slots = {_SLOTS[name]: each for name, each in vectors.items() if name in _SLOTS}
    own = [name for name in vectors if name not in _SLOTS]
    if slots and not own:
        return Embedding(word=word or path.stem, vectors=slots)
    if slots or len(own) != 1:
        raise RequestError(f"{path} has {', '.join(vectors) or 'nothing'}; expected the vectors of one word")
    own_word = path.stem if own[0] == "emb_params" else own[0]
    return Embedding(word=word or own_word, vectors={"": vectors[own[0]]})


_BUNDLED = re.compile(r"bundle_emb\.(?P<word>.+)\.(?P<slot>clip_l|clip_g|string_to_param\.[^.]+)")
"""A tensor of an embedding in a LoRA file, as OneTrainer and AUTOMATIC1111 have it."""


def read_bundled(file: TensorFile) -> tuple[list[Embedding], list[str]]:
    """Read the textual inversions in a LoRA file; also returns the names of the other tensors.

    Raises:
        RequestError: one of them isn't vectors.
    """
    found: dict[str, dict[str, Array]] = {}
    others: list[str] = []
    for name in file.shapes:
        match = _BUNDLED.fullmatch(name)
        if match is None:
            others.append(name)
        else:
            vectors = _read_vectors(file, name)
            found.setdefault(match["word"], {})[_SLOTS.get(match["slot"], "")] = vectors
    return [Embedding(word=word, vectors=vectors) for word, vectors in found.items()], others


_MAX_ELEMENTS = 10_000_000
"""Of the vectors of one word; files have a hundred vectors of width 1280 at most."""


def _read_vectors(file: TensorFile, name: str) -> Array:
    """Read the vectors of a word, (n, C); what can't be vectors is refused before it is read."""
    shape = file.shapes[name]
    data = file.read(name) if len(shape) in (1, 2) and 0 < math.prod(shape) <= _MAX_ELEMENTS else None
    if data is None or data.dtype.kind != "f" or not np.isfinite(data).all():
        raise RequestError(
            f"{file.path}: '{name}' is {file.dtypes[name]} {shape}; expected the vectors of a textual inversion"
        )
    return data.reshape(-1, data.shape[-1]).astype(np.float32, copy=False)


FIRST_PLACEHOLDER_ID = 2**31
"""The first id of placeholder tokens; vocabularies end before it."""


class TextualInversions:
    """The placeholder tokens of textual inversions for a package's text encoders.

    Raises:
        RequestError: there are no vectors for an encoder, or of another width, or two are of one word.
        PackageError: an encoder has no graph that takes vectors.
    """

    def __init__(self, package: Package, embeddings: Sequence[Embedding] = ()) -> None:
        self._package = package
        self.placeholders = _assign_ids(embeddings)
        """Ids of each word, in lower case."""
        encoders = package.manifest.text_encoders if embeddings else ()
        self._vectors = {
            encoder.component: np.concatenate([_vectors_for(package, encoder.component, each) for each in embeddings])
            for encoder in encoders
        }

    def inputs(self, component: str, ids: NDArray[np.int64]) -> tuple[dict[str, AnyArray], str]:
        """Make a text encoder's inputs of ids (N, S), and choose the graph for them."""
        is_placeholder = ids >= FIRST_PLACEHOLDER_ID
        if not is_placeholder.any():
            return {"input_ids": ids}, PLAIN
        known = np.where(is_placeholder, 0, ids)  # below the end token's id, which the encoder searches for
        vectors = token_embeddings(self._package, component, known)
        vectors[is_placeholder] = self._vectors[component][ids[is_placeholder] - FIRST_PLACEHOLDER_ID]
        return {"input_ids": known, EMBEDS: vectors}, EMBEDDED


def _assign_ids(embeddings: Sequence[Embedding]) -> dict[str, tuple[int, ...]]:
    placeholders: dict[str, tuple[int, ...]] = {}
    first = FIRST_PLACEHOLDER_ID
    for each in embeddings:
        word, count = each.word.lower(), len(next(iter(each.vectors.values())))
        if not word.strip() or word != word.strip() or word in placeholders:
            raise RequestError(f"the trigger word '{each.word}' is invalid or already used; choose another")
        placeholders[word] = tuple(range(first, first + count))
        first += count
    return placeholders


def _vectors_for(package: Package, component: str, embedding: Embedding) -> Array:
    """Get the vectors for a text encoder, (n, C)."""
    if EMBEDDED not in package.manifest.components[component].graphs:
        raise PackageError(f"{package.root}: {component} does not support textual inversion; export it again")
    single = len(package.manifest.text_encoders) == 1
    vectors = embedding.vectors.get(component, embedding.vectors.get("") if single else None)
    count, width = len(next(iter(embedding.vectors.values()))), _embedding_table(package, component)[0].shape[1]
    if vectors is None or vectors.shape != (count, width):
        shapes = ", ".join(f"{slot} {each.shape}".strip() for slot, each in embedding.vectors.items())
        raise RequestError(
            f"'{embedding.word}' has vectors {shapes}; {component} of {package.name} requires {count} of width "
            f"{width}; use one that was trained for this kind of model"
        )
    return vectors


def token_embeddings(package: Package, component: str, ids: NDArray[np.int64]) -> Array:
    """Read a text encoder's own embeddings of ids (N, S): (N, S, C)."""
    table, scales = _embedding_table(package, component)
    with package_errors(table.file):
        vectors = table.map()[ids].astype(np.float32)
        return vectors if scales is None else vectors * scales.read()[ids][..., None]


def _embedding_table(package: Package, component: str) -> tuple[Initializer, Initializer | None]:
    """Find a text encoder's token embeddings, and in int8 their scales."""
    graph = package.graph(component)
    initializers = read_initializers(graph)
    table = initializers.get(TABLE, initializers.get(f"{TABLE}_quantized"))
    scales = None if TABLE in initializers else initializers.get(f"{TABLE}_quantized_scale")
    if table is None or len(table.shape) != 2 or (scales is None and TABLE not in initializers):
        raise PackageError(f"{graph} has no weights '{TABLE}'; run 'sdonnx export' again")
    return table, scales
