"""One generation: text to conditioning, noise to latents, latents to pictures, one component in memory at a time."""

import logging
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from sdonnx_runtime.arrays import AnyArray, Array
from sdonnx_runtime.components import Runner
from sdonnx_runtime.conditioning import CONDITIONING
from sdonnx_runtime.denoise import guide, predict
from sdonnx_runtime.images import to_images
from sdonnx_runtime.manifest import TextEncoder
from sdonnx_runtime.noise import Noise
from sdonnx_runtime.package import Package
from sdonnx_runtime.request import Request, Result, given
from sdonnx_runtime.samplers import SAMPLERS
from sdonnx_runtime.schedule import make_schedule
from sdonnx_runtime.scheduler_config import SchedulerConfig
from sdonnx_runtime.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One denoising step, done."""

    image: int
    """Which image, from 0."""
    num_images: int
    """How many there will be."""
    step: int
    """Which step of this image, from 0."""
    num_steps: int
    """How many steps each image takes."""
    seconds: float
    """What the step took."""
    latents: Array
    """(1, C, h, w): the state after the step, noise included."""
    denoised: Array
    """(1, C, h, w): what the model takes the clean latents to be."""


class Generation:
    """What `Pipeline.stream` sets going; ``result`` is there once ``steps`` has run to its end."""

    def __init__(self, package: Package, run: Runner, scheduler: SchedulerConfig, request: Request) -> None:
        self.result: Result | None = None
        self.request = request
        self._package, self._run, self._scheduler = package, run, scheduler
        self._manifest = package.manifest

    def steps(self) -> Generator[Progress, None, None]:
        """Runs everything, handing over each denoising step."""
        with self._run.components.reserved():
            conditioning = self._condition()
            seeds = tuple(range(given(self.request.seed), given(self.request.seed) + self.request.num_images))
            latents: dict[int, Array] = {}
            seconds: list[float] = []
            for image, seed in enumerate(seeds):
                for progress in self._sample(image, seed, conditioning):
                    seconds.append(progress.seconds)
                    latents[image] = progress.latents
                    yield progress
            self._run.components.release("unet")
            images = tuple(image for state in latents.values() for image in to_images(self._decode(state)))
            self.result = Result(
                images=images,
                seeds=seeds,
                latents=np.concatenate(list(latents.values())),
                request=self.request,
                model=self._package.name,
                timings=self._run.timings(seconds),
            )

    def _condition(self) -> dict[str, AnyArray]:
        """What the U-Net is given besides latents and time, a row for each prompt."""
        encoders, request = self._manifest.text_encoders, self.request
        prompts = [request.prompt] if request.guidance_scale == 1 else [request.negative_prompt, request.prompt]
        conditioning = CONDITIONING[self._manifest.family](encoders, prompts, self._encode)
        for encoder in encoders:
            self._run.components.release(encoder.component)
        return conditioning

    def _encode(self, encoder: TextEncoder, prompt: str) -> Array:
        tokenizer = Tokenizer.open(self._package.root / encoder.tokenizer, length=encoder.length)
        tokens = tokenizer.encode(prompt)
        if tokens.truncated:
            logger.warning("the prompt is longer than %d tokens; cut: %s", tokenizer.length, tokens.truncated)
        return self._run(encoder.component, {"input_ids": tokens.ids})[encoder.output]  # (1, S, C)

    def _sample(self, image: int, seed: int, conditioning: Mapping[str, AnyArray]) -> Iterator[Progress]:
        """Denoises one image: x (1, C, h, w) from noise to the latents in the last progress."""
        request = self.request
        denoise = predict(self._predict, self._scheduler.prediction_type, conditioning)
        if request.guidance_scale != 1:
            denoise = guide(denoise, given(request.guidance_scale))
        sampler, steps = str(request.sampler), given(request.num_inference_steps)
        schedule = make_schedule(self._scheduler, sampler, steps, request.schedule)
        noise = Noise(seed)
        x = noise(self._latent_shape()) * np.float32(schedule.init_scale)
        before = time.perf_counter()
        for step in SAMPLERS[sampler](denoise, x, schedule, noise):
            now = time.perf_counter()
            last = step.index == step.total - 1
            yield Progress(
                image=image,
                num_images=request.num_images,
                step=step.index,
                num_steps=step.total,
                seconds=now - before,
                latents=step.x * np.float32(schedule.final_scale) if last else step.x,
                denoised=step.x0,
            )
            before = time.perf_counter()

    def _latent_shape(self) -> tuple[int, int, int, int]:
        latents, request = self._manifest.latents, self.request
        height, width = given(request.height), given(request.width)
        return (1, latents.channels, height // latents.downscale, width // latents.downscale)

    def _predict(self, inputs: Mapping[str, AnyArray]) -> Array:
        (output,) = self._run("unet", inputs).values()
        return output

    def _decode(self, latents: Array) -> Array:
        space = self._manifest.latents
        unscaled = latents / np.float32(space.scaling_factor) + np.float32(space.shift_factor)
        (pictures,) = self._run("vae_decoder", {"latent_sample": unscaled}).values()
        return pictures  # (1, 3, H, W)
