"""Resolved requests: complete, with parsed prompts and schedules."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.packages.manifest import Latents
from sdonnx_runtime.request import CompleteRequest
from sdonnx_runtime.sampling.types import Schedule
from sdonnx_runtime.text.prompt_schedule import PromptSchedule


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One denoising loop of each image: the request's own, or the second one of hires fix."""

    width: int
    """Pixels, as ``height``."""
    height: int
    strength: float | None
    """Denoising strength; None starts from noise."""
    schedule: Schedule
    """Without the steps that img2img skips."""
    steps: int
    """Steps of the sampler."""

    def latent_shape(self, space: Latents) -> tuple[int, int, int, int]:
        """The shape (1, C, h, w) of an image's latents."""
        return (1, space.channels, self.height // space.downscale, self.width // space.downscale)


@dataclass(frozen=True, kw_only=True, eq=False)
class ResolvedRequest:
    """A request resolved for one pipeline, before anything runs."""

    request: CompleteRequest
    """The request with every choice made."""
    passes: tuple[Pass, ...]
    """One, or two with hires fix; the last is the largest."""
    prompts: tuple[PromptSchedule, ...]
    """The parsed prompts of each image; images with the same prompts have the same object."""
    loras: tuple[tuple[Lora, ...], ...]
    """The files of the LoRAs that the prompts of each image name."""
    sampler_options: Mapping[str, Any]
    """The sampler's keyword arguments."""
    refiner_timestep: int | None
    """The timestep below which the refiner's U-Net runs; None without a refiner."""

    @property
    def steps(self) -> int:
        """Steps of each image, over all passes."""
        return sum(each.steps for each in self.passes)

    def split_by_loras(self) -> "list[ResolvedRequest]":
        """Split it into requests for the images that follow each other and have the same LoRAs, in their order."""
        groups = [(loras, len(list(group))) for loras, group in groupby(self.loras)]
        if len(groups) == 1:
            return [self]
        parts = list[ResolvedRequest]()
        first = 0
        for _, count in groups:
            images = slice(first, first + count)
            own = {"prompts": self.prompts[images], "loras": self.loras[images]}
            parts.append(replace(self, request=self.request.for_images(first, count), **own))
            first += count
        return parts
