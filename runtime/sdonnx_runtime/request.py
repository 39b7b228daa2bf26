"""What a generation is asked for and what it gives back."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, TypeVar

from PIL.Image import Image

from sdonnx_runtime.errors import RequestError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Control:
    """What one of a pipeline's ControlNets or T2I-Adapters is asked for."""

    image: Image = field(repr=False)
    """What it reads: edges, depths, a pose. Brought to the picture's size as an ``image`` is; no transparent parts."""
    scale: float = 1.0
    """-10 to 10: what it adds is multiplied by this; 0 is without it."""
    start: float = 0.0
    """0 to 1: the share of the steps after which it begins."""
    end: float = 1.0
    """0 to 1: the share of the steps after which it ends."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A generation request; None stands for what the package suggests (and a random seed)."""

    prompt: str
    """What to draw."""
    negative_prompt: str = ""
    """What to keep away from; without effect at ``guidance_scale`` 1."""
    prompt_syntax: str = "a1111"
    """How both are read: a1111, with AUTOMATIC1111's syntax, or plain, as they stand, cut where they are too long."""
    weighting: str = "a1111"
    """What weights in a prompt do: a1111, comfy or compel, as these programs have it."""
    clip_skip: int | None = None
    """Which of a text encoder's layers is read: 1 is the last, 2 the one before, and so on; None is the package's own.

    AUTOMATIC1111 counts so. Of diffusers' ``clip_skip`` it is 1 more, of SDXL 2 more."""
    width: int | None = None
    """Pixels, a multiple of the package's `Latents.downscale` (8 for Stable Diffusion).

    With an ``image`` None is what `suitable_size` makes of its size."""
    height: int | None = None
    """Pixels, a multiple as ``width``; given or left out together with ``width`` where there is an ``image``."""
    num_inference_steps: int | None = None
    """Denoising steps, 1 to the model's 1000."""
    guidance_scale: float | None = None
    """Classifier-free guidance, arXiv:2207.12598, -1000 to 1000; 1 and 0 are none and halve the work.

    A model that was distilled to take it embedded is told it, and does no more work for it."""
    image_guidance_scale: float | None = None
    """-1000 to 1000, of models that edit a picture: how much of it remains, arXiv:2211.09800; None is 1.5."""
    seed: int | None = None
    """0 to 2**63 - 1; image i of several is made with ``seed + i``, unless there is a ``variation``."""
    variation: tuple[int, float] | None = None
    """(seed, strength): all noise goes from ``seed``'s towards this one's by a share from 0 to 1.

    At 1 the picture is that of the variation's seed. Image i of several goes towards that of the variation's
    seed + i."""
    num_images: int = 1
    """Images to make, one after another."""
    sampler: str | None = None
    """A sampler: a key of SAMPLERS, a diffusers class, or AUTOMATIC1111's name, which may end in a schedule's."""
    schedule: str | None = None
    """How noise levels are laid: a name of SCHEDULES; None is as the package's scheduler config says."""
    spacing: str | None = None
    """How timesteps are spaced: leading, linspace or trailing; None is as the package's scheduler config says."""
    sigmas: tuple[float, ...] | None = None
    """The noise level of each step, decreasing, up to 1e6; instead of ``num_inference_steps`` and the two above."""
    timesteps: tuple[float, ...] | None = None
    """The timestep of each step, decreasing; instead of ``num_inference_steps`` and the two above."""
    eta: float | None = None
    """0 to 1: how much noise comes in with each step, for samplers that have a choice; None is the sampler's own."""
    s_churn: float | None = None
    """0 to 1000: how much noise comes in over all of euler's steps, arXiv:2206.00364, algorithm 2."""
    s_noise: float | None = None
    """0 to 1000: what the noise that comes in is multiplied by."""
    guidance_rescale: float = 0.0
    """0 to 1: how much of the spread that guidance adds is taken back, arXiv:2305.08891, section 3.4."""
    guidance_interval: tuple[float, float] | None = None
    """(low, high), 0 to 1e6: guidance where low < sigma <= high, the noise level, and none elsewhere, at half the work.

    arXiv:2404.07724. None is everywhere."""
    guidance_steps: tuple[float, float] | None = None
    """(start, end), 0 to 1: the same by steps, guidance between these shares of a pass' steps; None is in all."""
    reuse: int = 1
    """1 to 1000: of so many steps one runs the whole U-Net, the others its outermost part; DeepCache, arXiv:2312.00858.

    1 is without. The first step and the last are whole."""
    token_downsampling: bool = False
    """Whether keys and values of the highest resolution's self-attention come from every other row and column.

    ToDo, arXiv:2402.13573."""
    image: Image | None = field(default=None, repr=False)
    """A picture to start from; transparent parts lie on white."""
    strength: float | None = None
    """0 to 1, with an ``image``: the share of the steps that is taken, from as much noise. 0 only encodes and decodes.

    None is 0.75, or 1 with a mask."""
    fit: str = "crop"
    """How an ``image`` of other proportions is brought to the size: one of FITS."""
    mask_image: Image | None = field(default=None, repr=False)
    """White where the ``image`` is painted anew, of its size; transparent parts are kept."""
    mask_blur: int = 4
    """Pixels over which what is pasted fades out towards the mask's edge, inwards."""
    paste: bool = True
    """Whether pixels that the mask keeps are the ``image``'s own, bit by bit, and not what the VAE makes of them.

    If so, latent cells are made anew that the mask touches; if not, those whose first pixel it has, as in diffusers."""
    depth_image: Image | None = field(default=None, repr=False)
    """For models that are given one: a depth map, brighter where it is nearer; of any size and unit, stretched."""
    controls: tuple[Control, ...] = ()
    """One for each of the pipeline's controls, in their order; what they add is summed."""
    control_guess: bool = False
    """ControlNet's guess mode: it runs for the conditional row alone, and adds less at higher resolutions."""
    padding_mask_crop: int | None = None
    """Pixels: works only in the mask and so many around it, at width and height, and puts that into the ``image``.

    Width and height are then the model's where they are left out. None works in the whole ``image``."""
    hires_scale: float | None = None
    """1 to 8: makes the picture, enlarges it so many times, and goes over it once more at that size as img2img does."""
    hires_strength: float | None = None
    """0 to 1: the second pass' ``strength``; None is 0.55."""
    hires_steps: int | None = None
    """The steps that ``hires_strength`` is a share of; None is ``num_inference_steps``."""
    hires_upscaler: str | None = None
    """One of UPSCALERS: latent interpolates the latents bilinearly; lanczos decodes, enlarges the pixels, and encodes.

    None is latent."""
    refiner_start: float | None = None
    """0 to 1, with a refiner: the share of the noise levels that is walked without it; None is 0.8."""
    original_size: tuple[int, int] | None = None
    """SDXL's: (width, height) of the picture that it shall look as if made of; None is ``width`` and ``height``."""
    crop_top_left: tuple[int, int] | None = None
    """SDXL's: (top, left) of where it shall look cut from that picture; None is its corner."""
    target_size: tuple[int, int] | None = None
    """SDXL's: (width, height) that it shall look made for; None is ``width`` and ``height``."""
    aesthetic_score: float = 6.0
    """0 to 10, of SDXL's refiner: how pleasing the picture shall be."""
    negative_aesthetic_score: float = 2.5
    """0 to 10, of SDXL's refiner: the same of what to keep away from."""


FAST: Mapping[str, Any] = MappingProxyType({"reuse": 3, "token_downsampling": True})
"""Fields of a request that make it fast at some loss: the preset ``--fast``."""


def generation_parameters(request: Request) -> dict[str, Any]:
    """The request without its pictures, as JSON can hold it."""
    values = {item.name: getattr(request, item.name) for item in fields(request)}
    return {name: value for name, value in values.items() if name not in (*IMAGE_FIELDS, "controls")}


IMAGE_FIELDS = ("image", "mask_image", "depth_image")
"""A request's fields that are pictures."""


def uses_guidance(request: Request) -> bool:
    """Whether there is classifier-free guidance: 1 is none by its formula, 0 by what models without it are told."""
    return request.guidance_scale not in (0, 1)


def passes(request: Request, multiple: int) -> list[Request]:
    """What a checked request does one after another: itself, and img2img of what that gave, where it has a second pass.

    The second pass' sides are the nearest multiples of ``multiple``.
    """
    if request.hires_scale is None:
        return [request]
    nothing = dict.fromkeys(("hires_scale", "hires_strength", "hires_steps", "hires_upscaler"))
    width, height = (
        round(given(side) * request.hires_scale / multiple) * multiple for side in (request.width, request.height)
    )
    steps = request.num_inference_steps if request.hires_steps is None else request.hires_steps
    second = {"width": width, "height": height, "strength": request.hires_strength, "num_inference_steps": steps}
    return [replace(request, **nothing), replace(request, **{**nothing, **second})]


def seeds_of(request: Request) -> tuple[int, ...]:
    """The seed of each image of a checked request."""
    first, count = given(request.seed), request.num_images
    return (first,) * count if request.variation is not None else tuple(range(first, first + count))


def for_image(request: Request, index: int) -> Request:
    """The checked request that makes image ``index`` alone."""
    variation = request.variation
    return replace(
        request,
        seed=seeds_of(request)[index],
        num_images=1,
        variation=None if variation is None else (variation[0] + index, variation[1]),
    )


def given(value: T | None) -> T:
    """What `check_request` has filled in.

    Raises:
        RequestError: the request was not checked.
    """
    if value is None:
        raise RequestError("the request was not checked; make it with Pipeline.stream or Pipeline.generate")
    return value
