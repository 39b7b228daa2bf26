"""The result of a generation."""

from dataclasses import dataclass

from PIL.Image import Image

from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.arrays import Array
from sdonnx_runtime.execution.timings import Timings
from sdonnx_runtime.request import CompleteRequest, Prompts


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a generation."""

    images: tuple[Image, ...]
    """RGB images."""
    seeds: tuple[int, ...]
    """The seed of each image."""
    latents: Array
    """(num_images, C, height / `Latents.downscale`, width / `Latents.downscale`), as the sampler left them."""
    request: CompleteRequest
    """The request with every choice made."""
    model: str
    """Name of the package."""
    timings: Timings
    vae: str | None = None
    """Name of the package whose VAE replaced the model's own."""
    refiner: str | None = None
    """Name of the package that took the last steps; None without a refiner."""
    loras: tuple[Lora, ...] = ()
    """The LoRAs that were set; not those that the prompts name."""
    controls: tuple[str, ...] = ()
    """Names of the packages of ControlNets and T2I-Adapters."""

    @property
    def prompts(self) -> tuple[Prompts, ...]:
        """The prompts of each image, with alternatives and wildcards drawn."""
        return self.request.prompts
