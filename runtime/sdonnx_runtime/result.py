"""What a generation gives back."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.arrays import Array
from sdonnx_runtime.execution.timings import Timings
from sdonnx_runtime.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a generation made."""

    images: "tuple[Image, ...]"
    """RGB pictures."""
    seeds: tuple[int, ...]
    """The seed of each image."""
    latents: Array
    """(num_images, C, height / `Latents.downscale`, width / `Latents.downscale`), as the sampler left them."""
    request: Request
    """The request with every choice made."""
    model: str
    """Name of the package."""
    timings: Timings
    vae: str | None = None
    """Name of the package whose VAE decoded instead of the model's own."""
    refiner: str | None = None
    """Name of the package that took the last steps; None if none did."""
    loras: tuple[Lora, ...] = ()
    """The adapters that were applied."""
    controls: tuple[str, ...] = ()
    """Names of the packages that steered."""
