"""Generation requests."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from PIL.Image import Image

from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.field_spec import FieldSpec, field_specs, option, spec
from sdonnx_runtime.images.preprocess import FITS, MAX_SIDE
from sdonnx_runtime.sampling.registry import MAX_CHURN
from sdonnx_runtime.sampling.schedule import MAX_SIGMA
from sdonnx_runtime.sampling.scheduler_config import SPACINGS
from sdonnx_runtime.sampling.sigmas import SCHEDULES

MAX_SEED = 2**63 - 1
"""The largest seed that every tool that reads a PNG's parameters can hold."""

MAX_GUIDANCE = 1000
"""Far beyond any use, and far below where the arithmetic overflows."""

SYNTAXES = ("a1111", "plain")
"""How prompts are parsed: with AUTOMATIC1111's syntax, or not at all."""

WEIGHTINGS = ("a1111", "comfy", "compel")
"""How the weight of a word is applied, by the program that does so."""

_SIDES = ((1, MAX_SIDE), (1, MAX_SIDE))
TILINGS = ("x", "y", "xy")
"""The axes along which an image tiles: to the right, downwards, or both."""

IMAGE_TO_IMAGE, _SAMPLING, SPEED = "Image to image, inpainting and control", "Sampling", "Speed/quality trade-offs"
"""Panels of the command line's help."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """The conditioning of one of a pipeline's ControlNets or T2I-Adapters."""

    image: Image = field(repr=False, metadata=spec("Conditioning image."))
    """Edges, depth, a pose; resized as ``image`` is. Transparent parts become white."""
    scale: float = option(1.0, "Conditioning scale: factor of the residuals; 0 disables.", (-10, 10))
    start: float = option(0.0, "Fraction of the steps at which it starts.", (0, 1))
    end: float = option(1.0, "Fraction of the steps at which it ends.", (0, 1))


@dataclass(frozen=True, kw_only=True)
class IPAdapter:
    """The image prompt of one of a pipeline's IP-Adapters."""

    image: Image = field(repr=False, metadata=spec("Image prompt."))
    """Any size; its middle square is what counts. Transparent parts become white."""
    scale: float = option(1.0, "How much the image counts beside the prompt; 0 disables.", (-10, 10))
    start: float = option(0.0, "Fraction of the steps at which it starts.", (0, 1))
    end: float = option(1.0, "Fraction of the steps at which it ends.", (0, 1))


@dataclass(frozen=True, kw_only=True)
class Request:
    """A generation request; None stands for the package's default, or for a random seed.

    `FIELDS` has the help, range and names of each field; a docstring says what these don't.
    """

    # fmt: off
    prompt: str = field(metadata=spec("The prompt."))
    negative_prompt: str = option("", "Negative prompt; without effect at guidance scale 1.", cli="--negative TEXT")
    prompt_syntax: str = option(
        "a1111", "a1111: parse (word:1.3), [from:to:0.5], <lora:…>; plain: use the text verbatim.", choices=SYNTAXES,
        cli="--prompt-syntax", panel="Prompts"
    )
    weighting: str = option(
        "a1111", "How (word:weight) is applied: as in a1111, ComfyUI or compel.", choices=WEIGHTINGS,
        infotext="Weighting", cli="--weighting", panel="Prompts"
    )
    clip_skip: int | None = option(
        None, "CLIP skip: 1 uses the last text-encoder layer, 2 the one before. Default: the model's own.", (1, 100),
        infotext="Clip skip", cli="--clip-skip N", panel="Prompts"
    )
    """As AUTOMATIC1111 counts: 1 more than diffusers' ``clip_skip``, for SDXL 2 more."""
    styles: tuple[str, ...] = option((), "Style of the --styles file. Repeatable.", cli="--style NAME", panel="Prompts")
    """They are merged with the prompts, in this order."""
    width: int | None = option(
        None, "Size in pixels; Stable Diffusion requires multiples of 8. Default: the model's own.", (1, MAX_SIDE),
        infotext="Size", cli="--size WxH"
    )
    """A multiple of the package's `Latents.downscale`. With an ``image`` None is its `suitable_size`."""
    height: int | None = option(None, "Height in pixels.", (1, MAX_SIDE), cli="--size")
    """As ``width``; with an ``image`` both are None or neither."""
    tiling: str | None = option(
        None, "Seamless tiling: the right edge continues at the left (x), the bottom at the top (y), or both (xy).",
        choices=TILINGS, infotext="Tiling", cli="--tiling"
    )
    """Convolutions of U-Net, VAE and controls pad with the opposite border instead of zeros."""
    num_inference_steps: int | None = option(
        None, "Denoising steps. Default: the model's own.", (1, 1000), infotext="Steps", cli="--steps N"
    )
    guidance_scale: float | None = option(
        None, "Guidance (CFG) scale; 1 disables it and halves the time. Default: the model's own.",
        (-MAX_GUIDANCE, MAX_GUIDANCE), infotext="CFG scale", cli="--guidance G"
    )
    """arXiv:2207.12598; 0 disables it too. Models with embedded guidance take it as an input."""
    image_guidance_scale: float | None = option(
        None, "Image guidance scale (InstructPix2Pix). Default: 1.5.", (-MAX_GUIDANCE, MAX_GUIDANCE),
        infotext="Image CFG scale", cli="--image-guidance G", panel=IMAGE_TO_IMAGE
    )
    """arXiv:2211.09800."""
    seed: int | None = option(None, "Random seed. Default: random.", (0, MAX_SEED), infotext="Seed", cli="--seed S")
    """Image i has the seed ``seed + i``, unless there is a ``variation``."""
    variation: tuple[int, float] | None = option(
        None, "Variation seed and its strength, 0 to 1.", (0, MAX_SEED), (0, 1), infotext="Variation seed",
        cli="--variation SEED:STRENGTH"
    )
    """All noise is interpolated from that of ``seed`` to that of the variation seed; image i's is this seed + i."""
    num_images: int = option(1, "Number of images (seeds S, S+1, …).", (1, 10_000), cli="--count N")
    sampler: str | None = option(
        None, "Sampler (see 'sdonnx samplers'; diffusers, A1111 and ComfyUI names work). Default: the model's own.",
        infotext="Sampler", cli="--sampler NAME"
    )
    """A key of SAMPLERS, a diffusers class, or AUTOMATIC1111's name, which may end in a schedule's."""
    schedule: str | None = option(
        None, f"Sigma schedule: {', '.join(SCHEDULES)}. Default: the model's own.", choices=tuple(SCHEDULES),
        infotext="Schedule type", cli="--schedule NAME", panel=_SAMPLING
    )
    timestep_spacing: str | None = option(
        None, "Timestep spacing: leading, linspace or trailing. Default: the model's own.", choices=SPACINGS,
        cli="--timestep-spacing", panel=_SAMPLING
    )
    sigmas: tuple[float, ...] | None = option(
        None, "Custom sigmas, descending; replaces --steps.", cli="--sigmas S,S,…", panel=_SAMPLING
    )
    """Up to 1e6; replaces ``num_inference_steps``, ``schedule`` and ``timestep_spacing``."""
    timesteps: tuple[float, ...] | None = option(
        None, "Custom timesteps, descending; replaces --steps.", cli="--timesteps T,T,…", panel=_SAMPLING
    )
    """Replaces the same fields."""
    eta: float | None = option(
        None, "Eta: noise added per step, 0 (deterministic) to 1. Default: the sampler's own.", (0, 1), cli="--eta E",
        panel=_SAMPLING
    )
    s_churn: float | None = option(None, "Noise added over all steps.", (0, MAX_CHURN))
    """Of euler; arXiv:2206.00364, algorithm 2."""
    s_noise: float | None = option(None, "Factor of the noise added.", (0, MAX_CHURN))
    guidance_rescale: float = option(
        0.0, "Guidance rescale, 0 to 1; 0.7 for zero-terminal-SNR models.", (0, 1), cli="--guidance-rescale R",
        panel=_SAMPLING
    )
    """Fraction of guidance's standard deviation that is taken back, arXiv:2305.08891, section 3.4."""
    guidance_interval: tuple[float, float] | None = option(
        None, "Apply guidance only between these sigmas (LOW,HIGH) or step fractions (A:B); steps outside cost half.",
        (0, MAX_SIGMA), (0, MAX_SIGMA), cli="--guidance-interval LOW,HIGH|A:B", panel=SPEED
    )
    """Guidance where low < sigma <= high, arXiv:2404.07724."""
    guidance_steps: tuple[float, float] | None = option(
        None, "Apply guidance only between these step fractions.", (0, 1), (0, 1), cli="--guidance-interval"
    )
    """Fractions of a pass's steps."""
    cache_interval: int = option(
        1, "DeepCache: full U-Net every N steps, cached deep features in between.", (1, 1000),
        cli="--cache-interval N", panel=SPEED
    )
    """arXiv:2312.00858; 1 disables. The last step is full too."""
    token_downsampling: bool = option(
        False, "Downsample keys/values of the largest self-attention by 2 (arXiv:2402.13573).",
        cli="--token-downsampling/--no-token-downsampling", panel=SPEED
    )
    image: Image | None = field(
        default=None, repr=False, metadata=spec("Init image (img2img).", cli="--image FILE", panel=IMAGE_TO_IMAGE)
    )
    """Transparent parts become white."""
    strength: float | None = option(
        None, "Denoising strength, 0 to 1. Default: 0.75, or 1 with a mask.", (0, 1), infotext="Denoising strength",
        cli="--strength S", panel=IMAGE_TO_IMAGE
    )
    """Fraction of the steps that img2img takes; 0 only encodes and decodes."""
    fit: str = option(
        "crop", "How the image is resized if its aspect ratio differs: crop, pad or stretch.", choices=FITS,
        cli="--fit", panel=IMAGE_TO_IMAGE
    )
    mask_image: Image | None = field(
        default=None, repr=False,
        metadata=spec("Inpainting mask: white areas are repainted.", cli="--mask FILE", panel=IMAGE_TO_IMAGE)
    )
    """Of the ``image``'s size; transparent parts are not repainted."""
    mask_blur: int = option(
        4, "Mask blur in pixels.", (0, 1024), infotext="Mask blur", cli="--mask-blur PX", panel=IMAGE_TO_IMAGE
    )
    """Pixels over which the overlay fades at the mask's edge, inwards."""
    paste: bool = option(
        True, "Paste the original pixels back outside the mask.", cli="--paste/--no-paste", panel=IMAGE_TO_IMAGE
    )
    """True repaints latent pixels that the mask touches; False those whose first pixel it has, as in diffusers."""
    depth_image: Image | None = field(
        default=None, repr=False,
        metadata=spec("Depth map; brighter is nearer.", cli="--depth FILE", panel=IMAGE_TO_IMAGE)
    )
    """Any size and unit; stretched."""
    controls: tuple[Control, ...] = option(
        (), "ControlNet or T2I-Adapter with its conditioning image, scale and start/end (fractions of the steps).",
        cli="--control PACKAGE:FILE[:S[:START[:END]]]", panel=IMAGE_TO_IMAGE
    )
    """One for each of the pipeline's controls, in their order; their residuals are summed."""
    control_guess: bool = option(
        False, "ControlNet guess mode: run the ControlNet on the positive prompt only.",
        cli="--control-guess", panel=IMAGE_TO_IMAGE
    )
    """Only the conditional batch entry, with smaller scales at higher resolutions."""
    ip_adapters: tuple[IPAdapter, ...] = option(
        (), "IP-Adapter with an image as a prompt, its scale and start/end (fractions of the steps).",
        cli="--ip-adapter PACKAGE:FILE[:S[:START[:END]]]", panel=IMAGE_TO_IMAGE
    )
    """One for each of the pipeline's IP-Adapters, in their order; arXiv:2308.06721."""
    padding_mask_crop: int | None = option(
        None, "Inpaint only the masked area plus this padding (A1111 'Only masked'); 32 is usual.", (0, MAX_SIDE),
        infotext="Masked area padding", cli="--only-masked PX", panel=IMAGE_TO_IMAGE
    )
    """Inpaints this crop at width and height, by default the model's, and pastes it back."""
    hires_scale: float | None = option(
        None, "Hires fix: upscale factor, denoising strength (0.55), steps.", (1, 8), infotext="Hires upscale",
        cli="--hires 2x[:S[:N]]"
    )
    """Factor by which a second, img2img pass is larger."""
    hires_strength: float | None = option(None, "Denoising strength of the second pass.", (0, 1), cli="--hires")
    hires_steps: int | None = option(None, "The second pass's steps.", (1, 1000), infotext="Hires steps", cli="--hires")
    """The steps that ``hires_strength`` is a fraction of; None is ``num_inference_steps``."""
    hires_upscaler: str | None = option(
        None, "Upscaler for --hires: latent; in pixel space (needs more memory) lanczos, or an upscaler package.",
        infotext="Hires upscaler", cli="--hires-upscaler latent|lanczos|PACKAGE"
    )
    """latent (bilinear); lanczos, which decodes, resizes the pixels and encodes; or the name of the pipeline's
    upscaler, which decodes, runs it, resizes to the size and encodes. None is that upscaler, or without one latent."""
    refiner_start: float | None = option(
        None, "Refiner package and where it takes over (0.8 = after 80 % of the timesteps).", (0, 1),
        infotext="Refiner switch at", cli="--refiner PACKAGE[:0.8]"
    )
    """None is 0.8 with a refiner."""
    original_size: tuple[int, int] | None = option(None, "SDXL's original size.", *_SIDES)
    """Micro-conditioning: (width, height) of the original image; None is ``width`` and ``height``."""
    crop_top_left: tuple[int, int] | None = option(None, "SDXL's crop coordinates.", (0, MAX_SIDE), (0, MAX_SIDE))
    """Micro-conditioning: (top, left) of the crop; None is (0, 0)."""
    target_size: tuple[int, int] | None = option(None, "SDXL's target size.", *_SIDES)
    """Micro-conditioning: (width, height) of the target; None is ``width`` and ``height``."""
    aesthetic_score: float = option(6.0, "Aesthetic score of SDXL's refiner.", (0, 10))
    negative_aesthetic_score: float = option(2.5, "Negative aesthetic score of SDXL's refiner.", (0, 10))
    # fmt: on


FIELDS: Mapping[str, FieldSpec] = field_specs(Request)
"""Ranges, names and help of a request's fields."""

CONTROL_FIELDS: Mapping[str, FieldSpec] = field_specs(Control)
"""The same of a control's."""

IP_ADAPTER_FIELDS: Mapping[str, FieldSpec] = field_specs(IPAdapter)
"""The same of an IP-Adapter's."""

PACKAGE_FIELDS = ("controls", "ip_adapters")
"""A request's fields that go with packages of their own, one with each."""

IMAGE_FIELDS = tuple(name for name, each in FIELDS.items() if each.kind is Image)
"""A request's fields that are images."""

FAST: Mapping[str, Any] = MappingProxyType({"cache_interval": 3, "token_downsampling": True})
"""Fields of a request that trade quality for speed: the preset ``--fast``."""


def generation_parameters(request: Request) -> dict[str, Any]:
    """The request without its images, as JSON can hold it."""
    return {name: getattr(request, name) for name in FIELDS if name not in (*IMAGE_FIELDS, *PACKAGE_FIELDS)}


def uses_guidance(request: Request) -> bool:
    """Whether there is classifier-free guidance: 1 disables it by its formula, 0 as in models without it."""
    return request.guidance_scale not in (0, 1)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A prompt and its negative one."""

    prompt: str
    negative_prompt: str


@dataclass(frozen=True, kw_only=True)
class CompleteRequest(Request):
    """A request with every choice made: what is saved with an image."""

    width: int = field()
    height: int = field()
    num_inference_steps: int = field()
    guidance_scale: float = field()
    seed: int = field()
    sampler: str = field()
    drawn: tuple[Prompts, ...] = ()
    """The prompts of each image, where the request's own are templates that its seed draws from; otherwise empty."""
    template: Prompts | None = None
    """Of one image's request, what its prompts were drawn from."""

    @property
    def prompts(self) -> tuple[Prompts, ...]:
        """The prompts of each image."""
        return self.drawn or (Prompts(prompt=self.prompt, negative_prompt=self.negative_prompt),) * self.num_images

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each image."""
        count = self.num_images
        return (self.seed,) * count if self.variation is not None else tuple(range(self.seed, self.seed + count))

    def for_image(self, index: int) -> "CompleteRequest":
        """The request that makes one of the images alone, with its own prompts."""
        alone = self.for_images(index, 1)
        if not alone.drawn:
            return alone
        template = Prompts(prompt=self.prompt, negative_prompt=self.negative_prompt)
        (own,) = alone.drawn
        texts = {"prompt": own.prompt, "negative_prompt": own.negative_prompt}
        return replace(alone, **texts, drawn=(), template=template)

    def for_images(self, first: int, count: int) -> "CompleteRequest":
        """The request that makes so many of the images, from the ``first``."""
        variation = None if self.variation is None else (self.variation[0] + first, self.variation[1])
        drawn = self.drawn[first : first + count]
        return replace(self, seed=self.seeds[first], num_images=count, variation=variation, drawn=drawn)


REQUIRED = ("width", "height", "num_inference_steps", "guidance_scale", "seed", "sampler")
"""The fields that a complete request always has."""


def complete_request(request: Request) -> CompleteRequest:
    """Convert a request; raises RequestError if a field of REQUIRED is None."""
    missing = [name for name in REQUIRED if getattr(request, name) is None]
    if missing:
        raise RequestError(f"{missing[0]} is missing")
    return CompleteRequest(**{name: getattr(request, name) for name in FIELDS})
