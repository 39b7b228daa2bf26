"""What the U-Net is told besides latents and time: the one table that knows families."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sdonnx_runtime.arrays import AnyArray, Array
from sdonnx_runtime.packages.manifest import Manifest, TextEncoder
from sdonnx_runtime.request import Request, given, uses_guidance
from sdonnx_runtime.text.prompt_schedule import StepPrompts

Encode = Callable[[TextEncoder, str], Mapping[str, AnyArray]]
"""What a text encoder makes of a text: its outputs, each of one row."""

Texts = tuple[Sequence[str], Sequence[str]]
"""Those of the rows without the prompt, none or more, and those of the conditional rows."""

Conditioning = Callable[[Manifest, Request, Texts, Encode], dict[str, AnyArray]]


def condition(manifest: Manifest, request: Request, rows: StepPrompts, encode: Encode) -> dict[str, AnyArray]:
    """Inputs of the U-Net, a row for each text of `encoder_texts`, first those without the prompt."""
    texts = encoder_texts(manifest, request, rows)
    inputs = CONDITIONING[manifest.family](manifest, request, texts, encode)
    if manifest.conditions.guidance_width is not None:
        scale = given(request.guidance_scale) - 1
        told = embedded_guidance(scale, manifest.conditions.guidance_width)
        inputs["timestep_cond"] = np.repeat(told, len(texts[1]), axis=0)
    return inputs


def encoder_texts(manifest: Manifest, request: Request, rows: StepPrompts) -> Texts:
    """What is encoded for a step: with guidance the negative prompt and the conditional ones, else these alone.

    An editing model that is guided by its picture too has the negative one twice: for neither, and the picture alone.
    """
    return (rows.negative,) * (rows_of(manifest, request) - 1), rows.conditional


def rows_of(manifest: Manifest, request: Request) -> int:
    """How many rows a step of a checked request has, where its prompt has one part."""
    if manifest.conditions.guidance_width is not None or not uses_guidance(request):
        return 1
    return 3 if manifest.conditions.beside == "picture" and given(request.image_guidance_scale) != 1 else 2


def clip_states(manifest: Manifest, request: Request, texts: Texts, encode: Encode) -> dict[str, AnyArray]:
    """Stable Diffusion 1 and 2: the hidden states of one encoder, a row for each text."""
    (encoder,) = manifest.text_encoders
    rows = [encode(encoder, text)[encoder.output] for part in texts for text in part]
    return {"encoder_hidden_states": np.concatenate(rows)}


def sdxl_states(manifest: Manifest, request: Request, texts: Texts, encode: Encode) -> dict[str, AnyArray]:
    """SDXL, arXiv:2307.01952: the states of its encoders side by side, a pooled one, and the picture's sizes."""
    return _two_encoders(manifest, texts, encode, [_flat(_sizes(request))] * sum(map(len, texts)))


def refiner_states(manifest: Manifest, request: Request, texts: Texts, encode: Encode) -> dict[str, AnyArray]:
    """SDXL's refiner: as its base model, with how pleasing the picture shall be instead of the size it is made at."""
    negatives, conditionals = texts
    scores = [request.negative_aesthetic_score] * len(negatives) + [request.aesthetic_score] * len(conditionals)
    return _two_encoders(manifest, texts, encode, [[*_flat(_sizes(request)[:2]), score] for score in scores])


def _two_encoders(
    manifest: Manifest, texts: Texts, encode: Encode, ids: Sequence[Sequence[float]]
) -> dict[str, AnyArray]:
    def both(text: str) -> tuple[AnyArray, AnyArray]:
        """(1, S, C), (1, P)."""
        outputs = [encode(encoder, text) for encoder in manifest.text_encoders]
        states = [each[encoder.output] for each, encoder in zip(outputs, manifest.text_encoders, strict=True)]
        return np.concatenate(states, axis=-1), outputs[-1][str(manifest.text_encoders[-1].pooled)]

    def without(text: str) -> tuple[AnyArray, AnyArray]:
        states, pooled = both(text)
        zero = manifest.conditions.zero_negative and text == ""
        return (np.zeros_like(states), np.zeros_like(pooled)) if zero else (states, pooled)

    negatives, conditionals = texts
    rows = [*map(without, negatives), *map(both, conditionals)]
    states, pooled = (np.concatenate(each) for each in zip(*rows, strict=True))
    return {"encoder_hidden_states": states, "text_embeds": pooled, "time_ids": np.array(ids, np.float32)}


def _sizes(request: Request) -> list[Sequence[int]]:
    """(height, width) of the picture that the one to make is as if cut from, where it begins there, and its own."""
    own = given(request.width), given(request.height)
    original, target = (own if size is None else size for size in (request.original_size, request.target_size))
    return [original[::-1], (0, 0) if request.crop_top_left is None else request.crop_top_left, target[::-1]]


def _flat(pairs: Sequence[Sequence[int]]) -> list[int]:
    return [number for pair in pairs for number in pair]


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
