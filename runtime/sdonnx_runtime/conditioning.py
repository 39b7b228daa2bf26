"""What the U-Net is told besides latents and time: the one table that knows families."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from sdonnx_runtime.arrays import AnyArray, Array
from sdonnx_runtime.manifest import Manifest, TextEncoder
from sdonnx_runtime.request import Request, given, guided

_T = TypeVar("_T")

Encode = Callable[[TextEncoder, str], Mapping[str, AnyArray]]
"""Runs a text encoder on one prompt: its outputs, each of one row."""

Conditioning = Callable[[Manifest, Request, Sequence[str], Encode], dict[str, AnyArray]]


def condition(manifest: Manifest, request: Request, encode: Encode) -> dict[str, AnyArray]:
    """Inputs of the U-Net, R rows each: 1, or 2 (unconditional, conditional) with guidance.

    An editing model that is guided by its picture too has 3: neither, the picture alone, both.
    """
    rows = rows_of(manifest, request)
    prompts = [*[request.negative_prompt] * (rows - 1), request.prompt]
    inputs = CONDITIONING[manifest.family](manifest, request, prompts, encode)
    if manifest.conditions.guidance_width is not None:
        scale = given(request.guidance_scale) - 1
        inputs["timestep_cond"] = embedded_guidance(scale, manifest.conditions.guidance_width)
    return inputs


def rows_of(manifest: Manifest, request: Request) -> int:
    """How many rows a step of a checked request has."""
    if manifest.conditions.guidance_width is not None or not guided(request):
        return 1
    return 3 if manifest.conditions.beside == "picture" and given(request.image_guidance_scale) != 1 else 2


def clip_states(manifest: Manifest, request: Request, prompts: Sequence[str], encode: Encode) -> dict[str, AnyArray]:
    """Stable Diffusion 1 and 2: the hidden states of one encoder, a row for each prompt."""
    (encoder,) = manifest.text_encoders
    return {"encoder_hidden_states": np.concatenate(_each(prompts, lambda text: encode(encoder, text)[encoder.output]))}


def sdxl_states(manifest: Manifest, request: Request, prompts: Sequence[str], encode: Encode) -> dict[str, AnyArray]:
    """SDXL, arXiv:2307.01952: the states of its encoders side by side, a pooled one, and the picture's sizes."""
    return _two_encoders(manifest, prompts, encode, [_flat(_sizes(request))] * len(prompts))


def refiner_states(manifest: Manifest, request: Request, prompts: Sequence[str], encode: Encode) -> dict[str, AnyArray]:
    """SDXL's refiner: as its base model, with how pleasing the picture shall be instead of the size it is made at."""
    scores = [*[request.negative_aesthetic_score] * (len(prompts) - 1), request.aesthetic_score]
    return _two_encoders(manifest, prompts, encode, [[*_flat(_sizes(request)[:2]), score] for score in scores])


def _two_encoders(
    manifest: Manifest, prompts: Sequence[str], encode: Encode, ids: Sequence[Sequence[float]]
) -> dict[str, AnyArray]:
    def both(text: str) -> tuple[AnyArray, AnyArray]:
        """(1, 77, C), (1, P)."""
        outputs = [encode(encoder, text) for encoder in manifest.text_encoders]
        states = [each[encoder.output] for each, encoder in zip(outputs, manifest.text_encoders, strict=True)]
        return np.concatenate(states, axis=-1), outputs[-1][str(manifest.text_encoders[-1].pooled)]

    rows = _each(prompts, both)
    if manifest.conditions.zero_negative:
        negatives = [text == "" for text in prompts[:-1]]
        empty = [*negatives, False]
        rows = [
            tuple(np.zeros_like(each) for each in row) if zero else row for row, zero in zip(rows, empty, strict=True)
        ]
    states, pooled = (np.concatenate(each) for each in zip(*rows, strict=True))
    return {"encoder_hidden_states": states, "text_embeds": pooled, "time_ids": np.array(ids, np.float32)}


def _sizes(request: Request) -> list[Sequence[int]]:
    """(height, width) of the picture that the one to make is as if cut from, where it begins there, and its own."""
    own = given(request.width), given(request.height)
    original, target = (own if size is None else size for size in (request.original_size, request.target_size))
    return [original[::-1], (0, 0) if request.crop_top_left is None else request.crop_top_left, target[::-1]]


def _flat(pairs: Sequence[Sequence[int]]) -> list[int]:
    return [number for pair in pairs for number in pair]


def _each(prompts: Sequence[str], make: Callable[[str], _T]) -> list[_T]:
    """What ``make`` gives for each prompt, made once for those that are equal."""
    made = {text: make(text) for text in dict.fromkeys(prompts)}
    return [made[text] for text in prompts]


def embedded_guidance(scale: float, width: int) -> Array:
    """Sinusoids (1, width) of 1000 times a guidance scale less 1; arXiv:2310.04378, section 4.2."""
    half = width // 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-np.log(10000.0) / (half - 1)))
    angles = np.float32(1000 * scale) * frequencies
    waves = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2, np.float32)])
    return waves[None].astype(np.float32)


CONDITIONING: Mapping[str, Conditioning] = {
    "sd1": clip_states,
    "sd2": clip_states,
    "sdxl": sdxl_states,
    "sdxl-refiner": refiner_states,
}
