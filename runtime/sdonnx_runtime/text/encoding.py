"""Encoding of a request's texts, before the U-Net is loaded: the conditioning of each step."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from sdonnx_runtime.adapters.textual_inversion import Embedding, TextualInversions
from sdonnx_runtime.arrays import AnyArray, Array
from sdonnx_runtime.errors import PackageError, RequestError
from sdonnx_runtime.execution.components import Runner
from sdonnx_runtime.graphs.initializers import read_initializers
from sdonnx_runtime.packages.manifest import Manifest, TextEncoder, read_json
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.request import CompleteRequest
from sdonnx_runtime.text.chunks import Chunk, pad_chunk, split_into_chunks, truncate
from sdonnx_runtime.text.conditioning import encoder_texts, make_conditioning
from sdonnx_runtime.text.prompt_schedule import PromptSchedule, StepPrompts
from sdonnx_runtime.text.prompt_syntax import Sections
from sdonnx_runtime.text.tokenizer import Tokenizer
from sdonnx_runtime.text.weighting import WEIGHTINGS

logger = logging.getLogger(__name__)

_NORM = "text_model.final_layer_norm"
"""CLIP's last layer."""

Outputs: TypeAlias = Mapping[str, AnyArray]
"""A text encoder's outputs by name."""

Conditioning: TypeAlias = Mapping[StepPrompts, Mapping[str, AnyArray]]
"""A U-Net's inputs other than latents and timestep, by the texts of a step."""


def encode_prompts(
    package: Package,
    prefix: str,
    run: Runner,
    request: CompleteRequest,
    schedules: Sequence[PromptSchedule],
    embeddings: Sequence[Embedding],
    sizes: Sequence[tuple[int, int]],
) -> dict[PromptSchedule, list[Conditioning]]:
    """Encode the texts of each step to the inputs of a package's U-Net, in each pass of a size (width, height).

    Shorter texts of an image are padded to its longest with chunks of the empty text. ``run`` runs the components,
    whose names begin with ``prefix``.

    Raises:
        RequestError: ``clip_skip`` leaves no layer of a text encoder; or as `split_into_chunks` does.
        PackageError, DeviceError: as `Runner` does.
    """
    manifest, inversions = package.manifest, TextualInversions(package, embeddings)
    texts = {schedule: _texts(manifest, request, schedule) for schedule in schedules}
    sections = {text: each for schedule in texts for text, each in schedule.sections.items()}
    encoders = {
        each.component: _Encoder(package, run, prefix + each.component, request, each, inversions, sections)
        for each in manifest.text_encoders
    }
    if len({encoder.tokens for encoder in encoders.values()}) > 1:
        raise PackageError(
            f"{package.root} has tokenizers of different lengths; its U-Net takes as many tokens of both; set the same "
            "model_max_length in both of the checkpoint's tokenizer_config.json, and export it again"
        )
    lengths = {
        schedule: max(encoder.num_chunks(text) for encoder in encoders.values() for text in each)
        for schedule, each in texts.items()
    }
    encoded: dict[tuple[str, str, int], Outputs] = {}
    for component, encoder in encoders.items():
        padded = dict.fromkeys((text, lengths[schedule]) for schedule, each in texts.items() for text in each)
        encoded |= {(component, *key): encoder.encode(*key) for key in padded}
        run.components.unload(f"{prefix}{component}")

    def condition(schedule: PromptSchedule, step: StepPrompts, size: tuple[int, int]) -> Mapping[str, AnyArray]:
        length = lengths[schedule]
        return make_conditioning(
            manifest, request, step, lambda encoder, text: encoded[encoder.component, text, length], size
        )

    return {
        schedule: [
            {step: condition(schedule, step, size) for step in dict.fromkeys(each)}
            for each, size in zip(schedule.passes, sizes, strict=True)
        ]
        for schedule in texts
    }


def _texts(manifest: Manifest, request: CompleteRequest, schedule: PromptSchedule) -> list[str]:
    """The texts of all steps, each once."""
    steps = dict.fromkeys(step for each in schedule.passes for step in each)
    parts = (part for step in steps for part in encoder_texts(manifest, request, step))
    return list(dict.fromkeys(text for part in parts for text in part))


class _Encoder:
    """One text encoder, which runs once for each different chunk."""

    def __init__(
        self,
        package: Package,
        run: Runner,
        name: str,
        request: CompleteRequest,
        encoder: TextEncoder,
        inversions: TextualInversions,
        sections: Mapping[str, Sections],
    ) -> None:
        tokenizer = run.components.tokenizer(name, partial(_open_tokenizer, package, encoder))
        self._tokenizer = replace(tokenizer, placeholders=inversions.placeholders)
        self._run, self._inversions = partial(run, name), inversions
        self._encoder, self._request, self._sections = encoder, request, sections
        self._warns = encoder is package.manifest.text_encoders[0]
        self._layer = _layer(package, encoder, request.clip_skip)
        self._chunks: dict[Sections, list[Chunk]] = {}
        self._encoded: dict[tuple[int, ...], tuple[Array, AnyArray | None]] = {}

    @property
    def tokens(self) -> int:
        """The number of tokens of a chunk, start and end included."""
        return self._tokenizer.length

    def num_chunks(self, text: str) -> int:
        """The number of a text's chunks."""
        return len(self._split(self._sections[text]))

    def encode(self, text: str, length: int) -> dict[str, AnyArray]:
        """Encode a text in ``length`` chunks: states (1, length * S, C), and the first chunk's pooled state, (1, P)."""
        words = self._sections[text]
        chunks = self._split(words)
        states = WEIGHTINGS[self._request.weighting](words, self._split, lambda chunk: self._outputs(chunk)[0])
        states += [self._outputs(pad_chunk(self._tokenizer))[0] for _ in range(length - len(states))]
        outputs: dict[str, AnyArray] = {self._encoder.output: np.concatenate(states)[None]}
        pooled = self._outputs(chunks[0])[1]
        return outputs if pooled is None else {**outputs, str(self._encoder.pooled): pooled}

    def _split(self, words: Sections) -> list[Chunk]:
        if words not in self._chunks:
            if self._request.prompt_syntax == "plain":
                chunk, truncated = truncate(self._tokenizer, words)
                if truncated and self._warns:
                    logger.warning("the prompt is longer than %d tokens; cut: %s", self._tokenizer.length, truncated)
                self._chunks[words] = [chunk]
            else:
                self._chunks[words] = split_into_chunks(self._tokenizer, words)
        return self._chunks[words]

    def _outputs(self, chunk: Chunk) -> tuple[Array, AnyArray | None]:
        """Encode a chunk: states (S, C), and the pooled one, (1, P).

        A chunk shorter than the encoder's input is continued with its last id: no token sees a later one.
        """
        if chunk.ids not in self._encoded:
            length = len(chunk.ids)
            ids = np.pad(np.array([chunk.ids], np.int64), [(0, 0), (0, self._encoder.length - length)], mode="edge")
            outputs = self._run(*self._inversions.inputs(self._encoder.component, ids))
            pooled = None if self._encoder.pooled is None else outputs[self._encoder.pooled]
            self._encoded[chunk.ids] = self._layer(outputs)[0, :length], pooled
        return self._encoded[chunk.ids]


def _encoder_config(package: Package, encoder: TextEncoder) -> dict[str, Any]:
    path = package.root / encoder.component / "config.json"
    return read_json(path) if path.is_file() else {}


def _open_tokenizer(package: Package, encoder: TextEncoder) -> Tokenizer:
    """Open a text encoder's tokenizer; PackageError if it has ids beyond the text encoder's embeddings."""
    tokenizer = Tokenizer.open(package.root / encoder.tokenizer, length=encoder.length)
    rows = _encoder_config(package, encoder).get("vocab_size")
    if isinstance(rows, int) and tokenizer.size > rows:
        raise PackageError(
            f"{package.root / encoder.tokenizer} has ids up to {tokenizer.size - 1}, {encoder.component} has {rows} "
            "embeddings; export the checkpoint again, with the text encoder that was trained with this tokenizer"
        )
    return tokenizer


def _layer(package: Package, encoder: TextEncoder, clip_skip: int | None) -> Callable[[Outputs], Array]:
    """Make a function that reads the states of a layer from a text encoder's outputs."""
    if clip_skip is None:
        return lambda outputs: outputs[encoder.output]
    is_normed = encoder.output == "last_hidden_state"

    def states_of_layer(outputs: Outputs) -> Array:
        if clip_skip == 1 and is_normed:
            return outputs[encoder.output]
        layers = sum(name.startswith("hidden_states.") for name in outputs) - 1
        if layers < 1:
            raise RequestError(
                f"clip_skip requires hidden states, which {package.name} does not output; export its checkpoint again"
            )
        if clip_skip > layers:
            raise RequestError(
                f"clip_skip is {clip_skip}, and {package.name}'s {encoder.component} has {layers} layers; "
                f"give a whole number from 1, the last, to {layers}"
            )
        states = outputs[f"hidden_states.{layers + 1 - clip_skip}"]
        return _final_norm(package, encoder, states) if is_normed else states

    return states_of_layer


def _final_norm(package: Package, encoder: TextEncoder, states: Array) -> Array:
    """Apply the text encoder's final layer norm to the states of another layer."""
    weights = read_initializers(package.graph(encoder.component))
    try:
        scale, shift = (weights[f"{_NORM}.{name}"].read().astype(np.float32) for name in ("weight", "bias"))
    except KeyError:
        raise RequestError(
            f"clip_skip requires {_NORM}, which {package.name} does not have; export again, or leave clip_skip out"
        ) from None
    epsilon = np.float32(_encoder_config(package, encoder).get("layer_norm_eps", 1e-5))
    centred = states - states.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + epsilon) * scale + shift
