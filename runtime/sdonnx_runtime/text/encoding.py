"""A request's texts, each encoded once before there is a U-Net: what it is given at each step."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np

from sdonnx_runtime.adapters.textual_inversion import Embedding, TextualInversions
from sdonnx_runtime.arrays import AnyArray, Array
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.execution.components import Runner
from sdonnx_runtime.graphs.initializers import read_initializers
from sdonnx_runtime.packages.manifest import TextEncoder
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.request import Request
from sdonnx_runtime.text.chunks import Chunk, empty_chunk, split_into_chunks, truncate
from sdonnx_runtime.text.conditioning import condition, encoder_texts
from sdonnx_runtime.text.prompt_schedule import PromptSchedule, StepPrompts
from sdonnx_runtime.text.prompt_syntax import Sections, sections
from sdonnx_runtime.text.tokenizer import Tokenizer
from sdonnx_runtime.text.weighting import WEIGHTINGS

logger = logging.getLogger(__name__)

_NORM, _EPSILON = "text_model.final_layer_norm", 1e-5
"""The last layer of every CLIP."""


Outputs: TypeAlias = Mapping[str, AnyArray]
"""A text encoder's, by name."""

Conditioning: TypeAlias = Mapping[StepPrompts, Mapping[str, AnyArray]]
"""What a U-Net is given besides latents and time, by the texts of a step."""


def encode_prompts(
    package: Package, place: str, run: Runner, request: Request, said: PromptSchedule, embeddings: Sequence[Embedding]
) -> Conditioning:
    """What a package's U-Net is given, for the texts of each step.

    All are as long as the longest, with chunks of the empty text where they end.

    Args:
        package: whose U-Net and text encoders.
        place: what the names of its components begin with.
        run: runs them.
        request: with every choice made.
        said: what it says at each step.
        embeddings: the words that the text encoders are taught.

    Raises:
        RequestError: ``clip_skip`` leaves no layer of a text encoder; or as `split_into_chunks` does.
        PackageError, DeviceError: as `Runner` does.
    """
    manifest, learned = package.manifest, TextualInversions(package, embeddings)
    rows = list(dict.fromkeys(row for each in said.passes for row in each))
    texts = list(dict.fromkeys(text for row in rows for part in encoder_texts(manifest, request, row) for text in part))
    encoders = {
        each.component: _Encoder(package, partial(run, f"{place}{each.component}"), request, each, learned)
        for each in manifest.text_encoders
    }
    length = max(encoder.length(text) for encoder in encoders.values() for text in texts)
    encoded: dict[tuple[str, str], Outputs] = {}
    for component, encoder in encoders.items():
        encoded |= {(component, text): encoder.encode(text, length) for text in texts}
        run.components.release(f"{place}{component}")
    return {
        row: condition(manifest, request, row, lambda encoder, text: encoded[encoder.component, text]) for row in rows
    }


class _Encoder:
    """One text encoder; it runs once for each chunk that is another one."""

    def __init__(
        self,
        package: Package,
        run: Callable[..., Outputs],
        request: Request,
        encoder: TextEncoder,
        learned: TextualInversions,
    ) -> None:
        where = package.root / encoder.tokenizer
        self._tokenizer = Tokenizer.open(where, length=encoder.length, learned=learned.words)
        self._run, self._learned = run, learned
        self._encoder, self._request = encoder, request
        self._warns = encoder is package.manifest.text_encoders[0]
        self._layer = _layer(package, encoder, request.clip_skip)
        self._read: dict[Sections, list[Chunk]] = {}
        self._made: dict[tuple[int, ...], tuple[Array, AnyArray | None]] = {}

    def length(self, text: str) -> int:
        """How many chunks a text has."""
        return len(self._chunked(sections(text, self._request.prompt_syntax)))

    def encode(self, text: str, length: int) -> dict[str, AnyArray]:
        """The outputs that the U-Net reads: states (1, length * S, C), and the first chunk's pooled one, (1, P)."""
        words = sections(text, self._request.prompt_syntax)
        chunks = self._chunked(words)
        states = WEIGHTINGS[self._request.weighting](words, self._chunked, lambda chunk: self._outputs(chunk)[0])
        states += [self._outputs(empty_chunk(self._tokenizer))[0]] * (length - len(states))
        outputs: dict[str, AnyArray] = {self._encoder.output: np.concatenate(states)[None]}
        pooled = self._outputs(chunks[0])[1]
        return outputs if pooled is None else {**outputs, str(self._encoder.pooled): pooled}

    def _chunked(self, words: Sections) -> list[Chunk]:
        if words not in self._read:
            plain = self._request.prompt_syntax == "plain"
            self._read[words] = [self._cut(words)] if plain else split_into_chunks(self._tokenizer, words)
        return self._read[words]

    def _cut(self, words: Sections) -> Chunk:
        chunk, truncated = truncate(self._tokenizer, "".join(each.text for section in words for each in section))
        if truncated and self._warns:
            logger.warning("the prompt is longer than %d tokens; cut: %s", self._tokenizer.length, truncated)
        return chunk

    def _outputs(self, chunk: Chunk) -> tuple[Array, AnyArray | None]:
        """States (S, C), and the pooled one, (1, P)."""
        if chunk.ids not in self._made:
            ids = np.array([chunk.ids], np.int64)
            outputs = self._run(*self._learned.inputs(self._encoder.component, ids))
            pooled = None if self._encoder.pooled is None else outputs[self._encoder.pooled]
            self._made[chunk.ids] = self._layer(outputs)[0], pooled
        return self._made[chunk.ids]


def _layer(package: Package, encoder: TextEncoder, clip_skip: int | None) -> Callable[[Outputs], Array]:
    """Takes the states out of a text encoder's outputs."""
    if clip_skip is None:
        return lambda outputs: outputs[encoder.output]
    normed = encoder.output == "last_hidden_state"

    def taken(outputs: Outputs) -> Array:
        if clip_skip == 1 and normed:
            return outputs[encoder.output]
        layers = sum(name.startswith("hidden_states.") for name in outputs) - 1
        if layers < 1:
            raise RequestError(f"clip_skip needs layers that {package.name} doesn't give; export its checkpoint again")
        if clip_skip > layers:
            raise RequestError(
                f"clip_skip is {clip_skip}, and {package.name}'s {encoder.component} has {layers} layers; "
                f"give a whole number from 1, the last, to {layers}"
            )
        states = outputs[f"hidden_states.{layers + 1 - clip_skip}"]
        return _normed(package, encoder, states) if normed else states

    return taken


def _normed(package: Package, encoder: TextEncoder, states: Array) -> Array:
    """Layer norm with the weights that the text encoder applies to its last layer."""
    weights = read_initializers(package.graph(encoder.component))
    try:
        scale, shift = (weights[f"{_NORM}.{name}"].read().astype(np.float32) for name in ("weight", "bias"))
    except KeyError:
        raise RequestError(
            f"{package.name} has no {_NORM}, which clip_skip needs; export again, or leave it out"
        ) from None
    centred = states - states.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + np.float32(_EPSILON)) * scale + shift
