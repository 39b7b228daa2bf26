"""U-Net conditioning per model family."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sdonnx_runtime.arrays import AnyArray, Array
from sdonnx_runtime.packages.concat import CONCAT
from sdonnx_runtime.packages.manifest import Manifest, TextEncoder
from sdonnx_runtime.request import CompleteRequest, uses_guidance
from sdonnx_runtime.text.prompt_schedule import StepPrompts

Encode = Callable[[TextEncoder, str], Mapping[str, AnyArray]]
"""``encode(encoder, text)``: a text encoder's outputs, each of batch size 1."""

Texts = tuple[Sequence[str], Sequence[str]]
"""The texts of the unconditional batch entries, none or more, and of the conditional ones."""

Inputs = dict[str, AnyArray]
"""A U-Net's inputs other than latents and timestep, a batch entry per text."""


@dataclass(frozen=True, kw_only=True)
class SizeConditioning:
    """SDXL's micro-conditioning, arXiv:2307.01952, of one pass."""

    sizes: tuple[int, ...]
    """original_size, crop_top_left and target_size, each (height, width)."""
    scores: tuple[float, float]
    """The refiner's aesthetic scores, of unconditional and conditional batch entries."""

    @classmethod
    def of_pass(cls, request: CompleteRequest, width: int, height: int) -> "SizeConditioning":
        """That of a pass; what the request leaves open is the size of the pass, as in diffusers' pipelines."""
        own, crop = (width, height), (0, 0) if request.crop_top_left is None else request.crop_top_left
        original, target = (own if each is None else each for each in (request.original_size, request.target_size))
        return cls(
            sizes=(*original[::-1], *crop, *target[::-1]),
            scores=(request.negative_aesthetic_score, request.aesthetic_score),
        )


def make_conditioning(
    manifest: Manifest, request: CompleteRequest, prompts: StepPrompts, encode: Encode, size: tuple[int, int]
) -> Inputs:
    """Make the U-Net's inputs of one step, a batch entry per text of `encoder_texts`, unconditional ones first.

    ``size`` is (width, height) of the pass.
    """
    texts = encoder_texts(manifest, request, prompts)
    inputs = CONDITIONING[manifest.family](manifest, SizeConditioning.of_pass(request, *size), texts, encode)
    if manifest.conditions.guidance_width is not None:
        scale = request.guidance_scale - 1
        embedding = guidance_embedding(scale, manifest.conditions.guidance_width)
        inputs["timestep_cond"] = np.repeat(embedding, len(texts[1]), axis=0)
    return inputs


def encoder_texts(manifest: Manifest, request: CompleteRequest, prompts: StepPrompts) -> Texts:
    """Get the texts that a step encodes: with guidance the negative prompt and the conditional ones, else only these.

    With image guidance (InstructPix2Pix) the negative prompt is there twice: without the image, and with it.
    """
    return (prompts.negative,) * (batch_size(manifest, request) - 1), prompts.conditional


def batch_size(manifest: Manifest, request: CompleteRequest) -> int:
    """Count a step's batch entries, for a prompt without AND."""
    if manifest.conditions.guidance_width is not None or not uses_guidance(request):
        return 1
    concat = manifest.conditions.concat
    return 3 if concat is not None and CONCAT[concat].edits and request.image_guidance_scale != 1 else 2


def clip_conditioning(manifest: Manifest, _size: SizeConditioning, texts: Texts, encode: Encode) -> Inputs:
    """Stable Diffusion 1 and 2: the hidden states of one encoder."""
    (encoder,) = manifest.text_encoders
    states = [encode(encoder, text)[encoder.output] for part in texts for text in part]
    return {"encoder_hidden_states": np.concatenate(states)}


def sdxl_conditioning(manifest: Manifest, size: SizeConditioning, texts: Texts, encode: Encode) -> Inputs:
    """SDXL, arXiv:2307.01952: concatenated states of both encoders, a pooled state, and size micro-conditioning."""
    return _two_encoders(manifest, texts, encode, [size.sizes] * sum(map(len, texts)))


def refiner_conditioning(manifest: Manifest, size: SizeConditioning, texts: Texts, encode: Encode) -> Inputs:
    """SDXL's refiner: as its base model, with an aesthetic score instead of the target size."""
    ids = [[*size.sizes[:4], score] for score, part in zip(size.scores, texts, strict=True) for _ in part]
    return _two_encoders(manifest, texts, encode, ids)


def _two_encoders(manifest: Manifest, texts: Texts, encode: Encode, ids: Sequence[Sequence[float]]) -> Inputs:
    def encode_both(text: str) -> tuple[AnyArray, AnyArray]:
        """Encode to (1, S, C), (1, P)."""
        outputs = [encode(encoder, text) for encoder in manifest.text_encoders]
        states = [each[encoder.output] for each, encoder in zip(outputs, manifest.text_encoders, strict=True)]
        return np.concatenate(states, axis=-1), outputs[-1][str(manifest.text_encoders[-1].pooled)]

    def encode_negative(text: str) -> tuple[AnyArray, AnyArray]:
        states, pooled = encode_both(text)
        zero = manifest.conditions.zero_negative and text == ""
        return (np.zeros_like(states), np.zeros_like(pooled)) if zero else (states, pooled)

    negatives, conditionals = texts
    encoded = [*map(encode_negative, negatives), *map(encode_both, conditionals)]
    states, pooled = (np.concatenate(each) for each in zip(*encoded, strict=True))
    return {"encoder_hidden_states": states, "text_embeds": pooled, "time_ids": np.array(ids, np.float32)}


def guidance_embedding(scale: float, width: int) -> Array:
    """Embed a guidance scale less 1 as sinusoids, (1, width); arXiv:2310.04378, section 4.2."""
    half = width // 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-np.log(10000.0) / (half - 1)))
    angles = np.float32(1000 * scale) * frequencies
    waves = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2, np.float32)])
    return waves[None].astype(np.float32)


CONDITIONING: Mapping[str, Callable[[Manifest, SizeConditioning, Texts, Encode], Inputs]] = {
    "sd1": clip_conditioning, "sd2": clip_conditioning,
    "sdxl": sdxl_conditioning, "sdxl-refiner": refiner_conditioning,
}  # fmt: skip
