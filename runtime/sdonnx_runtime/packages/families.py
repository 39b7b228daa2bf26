"""Kinds of packages and model families: the one table of what each is and of the numbers that are its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum


class PackageKind(Enum):
    """What a package is used for; the value of every kind but MODEL is its one family."""

    MODEL = "model"
    """Generates images by itself."""
    VAE = "vae"
    """Replaces the VAE of a model."""
    CONTROLNET = "controlnet"
    T2I_ADAPTER = "adapter"
    """These two control the U-Net of a model; their one component has the kind's value as its name."""
    IP_ADAPTER = "ip_adapter"
    """Prompts the U-Net of a model with images."""
    UPSCALER = "upscaler"
    """Enlarges images; so has its."""

    @property
    def is_control(self) -> bool:
        """Whether it is a ControlNet or a T2I-Adapter."""
        return self in (PackageKind.CONTROLNET, PackageKind.T2I_ADAPTER)

    @property
    def has_latents(self) -> bool:
        """Whether it works on latents, or makes them."""
        return self in (PackageKind.MODEL, PackageKind.VAE)


REQUIRED_COMPONENTS: Mapping[PackageKind, tuple[str, ...]] = {
    PackageKind.MODEL: ("unet", "vae_decoder"),
    PackageKind.VAE: ("vae_decoder",),
    PackageKind.CONTROLNET: ("controlnet",),
    PackageKind.T2I_ADAPTER: ("adapter",),
    PackageKind.IP_ADAPTER: ("ip_adapter", "image_encoder"),
    PackageKind.UPSCALER: ("upscaler",),
}
"""The components of each kind, the one that tells it first; a model also has the text encoders of its manifest."""

COMPONENT_NAMES = (
    "text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder", "controlnet", "adapter", "safety_checker",
    "image_encoder", "ip_adapter", "upscaler",
)  # fmt: skip
"""Every component of a package, of any kind."""

TARGETS = ("generic", "cuda", "directml", "webgpu", "openvino")
"""What graphs are made for: every device, or the one of this name."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family; numbers are those of its published models."""

    title: str
    kind: PackageKind = PackageKind.MODEL
    sample_sizes: Mapping[str, int] = field(default_factory=lambda: {"epsilon": 64})
    """Width and height of the latents it was trained on, by prediction type. Every family has ``epsilon``; the first
    type is that of a checkpoint that names none."""
    scaling_factor: float = 0.18215
    """Of the VAE's latents."""
    attention_heads: int | None = None
    """On each level of the U-Net; None is one head for every 64 channels."""
    time_ids: int = 0
    """Numbers of SDXL's micro-conditioning (arXiv:2307.01952): sizes, crop, aesthetic score; 0 is none."""
    text_encoders: tuple[str, ...] = ("text_encoder",)
    """Components, in the order of their states."""
    pooled_width: int = 0
    """Width of the pooled text state that is added to the timestep embedding; 0 is none."""
    num_inference_steps: int = 20
    """What suits the model, with fewer steps than in diffusers."""
    guidance_scale: float = 7.5
    """What suits the model, as in diffusers' pipelines."""


_SDXL = Family(
    title="Stable Diffusion XL", sample_sizes={"epsilon": 128}, scaling_factor=0.13025,
    text_encoders=("text_encoder", "text_encoder_2"), time_ids=6, pooled_width=1280, num_inference_steps=30,
    guidance_scale=5.0,
)  # fmt: skip

FAMILIES: Mapping[str, Family] = {
    "sd1": Family(title="Stable Diffusion 1", attention_heads=8),
    "sd2": Family(title="Stable Diffusion 2", sample_sizes={"v_prediction": 96, "epsilon": 64}),
    "sdxl": _SDXL,
    "sdxl-refiner": replace(
        _SDXL, title="Stable Diffusion XL's refiner", text_encoders=("text_encoder_2",), time_ids=5
    ),
    "vae": Family(title="a VAE", kind=PackageKind.VAE, text_encoders=()),
    "controlnet": Family(title="a ControlNet", kind=PackageKind.CONTROLNET, text_encoders=()),
    "adapter": Family(title="a T2I-Adapter", kind=PackageKind.T2I_ADAPTER, text_encoders=()),
    "ip_adapter": Family(title="an IP-Adapter", kind=PackageKind.IP_ADAPTER, text_encoders=()),
    "upscaler": Family(title="an upscaler", kind=PackageKind.UPSCALER, text_encoders=()),
}
"""What this version runs, by its name in manifests."""
