"""One generation: text and picture in, noise to latents, latents to pictures, one component in memory at a time."""

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from sdonnx_runtime.adapters.merging import Adapters
from sdonnx_runtime.arrays import AnyArray, Array
from sdonnx_runtime.denoising.control import ControlledUNet, control_components, make_control
from sdonnx_runtime.denoising.denoiser import Model, inpaint_denoiser, per_step_model, predict_x0, refiner_handoff
from sdonnx_runtime.denoising.init_image import (
    InitImage,
    InitLatents,
    apply_overlay,
    encode_image,
    encode_init_image,
    resize_latents,
    seen_beside,
)
from sdonnx_runtime.denoising.step_cache import DeepCache, unet_graphs
from sdonnx_runtime.errors import PackageError, RequestError
from sdonnx_runtime.execution.components import REFINER, Runner
from sdonnx_runtime.execution.strategy import ExecutionStrategy
from sdonnx_runtime.images.crop import CropRegion
from sdonnx_runtime.images.preprocess import to_images
from sdonnx_runtime.packages.manifest import Manifest
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.request import Request, for_image, given, passes, seeds_of
from sdonnx_runtime.result import Result
from sdonnx_runtime.sampling.noise import Noise, interpolate_noise
from sdonnx_runtime.sampling.registry import SAMPLERS, sampler_options, steps_taken
from sdonnx_runtime.sampling.schedule import make_schedule
from sdonnx_runtime.sampling.scheduler_config import SchedulerConfig, clip_or_threshold_x0
from sdonnx_runtime.sampling.types import Denoise, NoiseSource, Schedule
from sdonnx_runtime.text.encoding import Conditioning, encode_prompts
from sdonnx_runtime.text.prompt_schedule import schedule_prompts


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One denoising step, done."""

    image: int
    """Which image, from 0."""
    num_images: int
    """How many there will be."""
    step: int
    """Which step of this image, from 0, counted over its passes."""
    num_steps: int
    """How many steps each image takes, over its passes."""
    seconds: float
    """What the step took."""
    latents: Array
    """(1, C, h, w): the state after the step, noise included; larger in a second pass."""
    denoised: Array
    """(1, C, h, w): what the model takes the clean latents to be."""
    projection: Array | None = field(default=None, repr=False)
    """(C + 1, 3): the package's `Latents.preview`."""
    decoder: Callable[[Array], Image.Image] | None = field(default=None, repr=False)
    """Makes a picture of ``denoised`` with the pipeline's ``preview_vae``."""

    def preview(self) -> Image.Image:
        """What the picture is becoming, RGB: a cheap guess, one pixel for each latent cell, without the VAE.

        With a ``preview_vae`` it is that VAE's picture of ``denoised``, in full size.

        Raises:
            PackageError: the package has no projection for it; or as `Pipeline.decode` does.
            DeviceError: as `Pipeline.decode` does.
        """
        if self.decoder is not None:
            return self.decoder(self.denoised)
        if self.projection is None:
            raise PackageError("the package has no preview; run 'sdonnx export' again to have one")
        cells = np.moveaxis(self.denoised, 1, 3)  # (1, h, w, C)
        return to_images(np.moveaxis(cells @ self.projection[:-1] + self.projection[-1], 3, 1))[0]


def schedule_pass(scheduler: SchedulerConfig, request: Request) -> tuple[Schedule, dict[str, Any]]:
    """The schedule of a checked request and its sampler's options; img2img leaves out the first steps.

    Raises:
        RequestError, PackageError: as `make_schedule` and `sampler_options` do; or too little strength for a step.
    """
    sampler = str(request.sampler)
    schedule = make_schedule(
        scheduler,
        sampler,
        given(request.num_inference_steps),
        schedule=request.schedule,
        spacing=request.spacing,
        sigmas=request.sigmas,
        timesteps=request.timesteps,
    )
    options = sampler_options(scheduler, sampler, eta=request.eta, s_churn=request.s_churn, s_noise=request.s_noise)
    if request.strength is not None:
        taken = int(schedule.steps * request.strength)  # as diffusers' img2img counts them
        if taken == 0 and request.strength > 0:
            raise RequestError(
                f"strength {request.strength:g} of {schedule.steps} steps is less than one; "
                f"give {_rounded_up(1 / schedule.steps)} or more, or 0"
            )
        schedule = schedule.starting_at(schedule.steps - taken)
    return schedule, options


def _rounded_up(share: float) -> float:
    """A share above 0 and up to 1, with two digits that count."""
    scale = 10 ** (1 - math.floor(math.log10(share)))
    return math.ceil(share * scale) / scale


class Generation:
    """What `Pipeline.stream` sets going; ``result`` is there once ``steps`` has run to its end.

    Args:
        package: whose model draws.
        run: runs its components.
        scheduler: the package's.
        request: with every choice made.
        refiner: whose U-Net takes the last steps; its components are those of ``run`` behind REFINER.
        adapters: what is applied to the package.
        controls: what steers the package's U-Net; their components are those behind `controls.place`.
        ways: how components are run.
    """

    def __init__(
        self,
        package: Package,
        run: Runner,
        scheduler: SchedulerConfig,
        request: Request,
        refiner: Package | None = None,
        adapters: Adapters | None = None,
        controls: Sequence[Package] = (),
        ways: Mapping[str, ExecutionStrategy] | None = None,
    ) -> None:
        self.result: Result | None = None
        self.latents: Array | None = None
        self.latents_request = self.request = request
        self.before_decoding: Callable[[Array, Request], None] | None = None
        self._package, self._run, self._scheduler, self._refiner = package, run, scheduler, refiner
        self._requests = passes(request, package.manifest.latents.downscale)
        self._script = schedule_prompts(self._requests)
        self._manifest, self._controls, self._ways = package.manifest, controls, ways
        self._adapters = Adapters() if adapters is None else adapters

    def steps(self) -> Generator[Progress, None, None]:
        """Runs everything, handing over each denoising step."""
        with self._run.components.reserved(self._adapters.changes, self._ways):
            conditions = [
                encode_prompts(package, place, self._run, self.request, self._script, self._adapters.embeddings)
                for place, package in self._models().items()
            ]
            start = encode_init_image(self._run, self._manifest, self.request)
            self._run.components.release("vae_encoder")
            seconds: list[float] = []
            for progress in self._passes(conditions, start):
                seconds.append(progress.seconds)
                yield progress
            self._leave()
            self._run.components.release(f"{REFINER}unet")
            assert self.latents is not None  # noqa: S101 — for the type checker
            if self.before_decoding is not None:
                self.before_decoding(self.latents, self.latents_request)
            images = decode(self._run, self._manifest, self.latents)
            self.result = Result(
                images=images if start is None else tuple(apply_overlay(made, start, self.request) for made in images),
                seeds=seeds_of(self.request),
                latents=self.latents,
                request=self.request,
                model=self._package.name,
                timings=self._run.timings(seconds),
                vae=None if self._package.vae is None else self._package.vae.name,
                loras=self._adapters.loras,
                refiner=None if self._refiner is None else self._refiner.name,
                controls=tuple(net.name for net in self._controls),
            )

    def _models(self) -> dict[str, Package]:
        """What denoises, in its order, by what the names of its components begin with."""
        return {"": self._package, **({REFINER: self._refiner} if self._refiner is not None else {})}

    def _passes(self, conditions: Sequence[Conditioning], start: InitImage | None) -> Iterator[Progress]:
        """Every step of every image, pass after pass, numbered over all passes."""
        requests = self._requests
        counts = [
            steps_taken(str(self.request.sampler), *schedule_pass(self._scheduler, request)) for request in requests
        ]
        origins: list[InitImage | InitLatents | None] = [start] * self.request.num_images
        for index, request in enumerate(requests):
            if self.latents is not None:
                origins = self._enlarged(self.latents, request)
            made: list[Array] = []
            for image, origin in enumerate(origins):
                noise = self._noise(image)
                original = origin.draw(noise) if isinstance(origin, InitImage) else origin
                latents = None if original is None else original.latents  # what remains where strength 0 leaves no step
                told = [[each[rows] for rows in self._script.passes[index]] for each in conditions]
                walk = self._sample(request, image, noise, told, original, start)
                for progress in walk:
                    latents = progress.latents
                    yield replace(progress, step=sum(counts[:index]) + progress.step, num_steps=sum(counts))
                made += [] if latents is None else [latents]
            self.latents, self.latents_request = np.concatenate(made), request if index == 0 else self.request

    def _enlarged(self, latents: Array, request: Request) -> list[InitImage | InitLatents | None]:
        """What each image of the second pass starts from, of the latents (N, C, h, w) that the first one gave."""
        height, width = self._latent_shape(request)[2:]
        if self.request.hires_upscaler == "latent":
            return [InitLatents(latents=resize_latents(one[None], height, width)) for one in latents]
        self._leave()
        pictures = decode(self._run, self._manifest, latents)
        self._run.components.release("vae_decoder")
        size = given(request.width), given(request.height)
        larger = [picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures]
        space = self._manifest.latents
        starts = [
            InitImage(space=space, moments=encode_image(self._run, picture), picture=picture) for picture in larger
        ]
        self._run.components.release("vae_encoder")
        return [*starts]

    def _sample(
        self,
        request: Request,
        image: int,
        noise: NoiseSource,
        told: Sequence[Sequence[Mapping[str, AnyArray]]],
        original: InitLatents | None,
        start: InitImage | None,
    ) -> Iterator[Progress]:
        """Denoises one image in one pass: x (1, C, h, w) from its first state to the latents in the last progress.

        Each U-Net is ``told`` something at each step.
        """
        schedule, options = schedule_pass(self._scheduler, request)
        preview = self._manifest.latents.preview
        projection = None if preview is None else np.array(preview, np.float32)
        unit = noise(self._latent_shape(request))
        beside = seen_beside(self._manifest, request, start, noise)
        steps = steps_taken(str(request.sampler), schedule, options)
        controlled = self._controlled(request, None if start is None else start.region, steps)
        unets = [self._unet(place, request, controlled) for place in self._models()]
        models = [
            per_step_model(unet, inputs, beside, self._script.weights, request)
            for unet, inputs in zip(unets, told, strict=True)
        ]
        x, denoise = self._begin(schedule, noise, unit, self._denoiser(models), original)
        before = time.perf_counter()
        for step in SAMPLERS[str(request.sampler)](denoise, x, schedule, noise, **options):
            now = time.perf_counter()
            latents = step.x
            if step.index == step.total - 1:
                latents = latents * np.float32(schedule.final_scale)
                latents = latents if original is None else original.kept(latents)
            yield Progress(
                image=image,
                num_images=request.num_images,
                step=step.index,
                num_steps=step.total,
                seconds=now - before,
                latents=latents,
                denoised=step.x0,
                projection=projection,
            )
            for unet in unets:
                unet.next_step(last=step.index + 2 == step.total)
            for model in models:
                model.next_step()
            controlled.next_step()
            before = time.perf_counter()

    def _begin(
        self, schedule: Schedule, noise: NoiseSource, unit: Array, denoise: Denoise, original: InitLatents | None
    ) -> tuple[Array, Denoise]:
        """The first state, (1, C, h, w), and the denoiser that goes with it."""
        alone = unit * np.float32(schedule.init_scale)
        if original is None:
            return alone, denoise
        noised = original.latents + unit * np.float32(schedule.sigmas[0])
        if original.mask is None:
            return noised, denoise
        if original.drawn:
            noise(unit.shape)  # diffusers draws from the masked picture's posterior here
        anew = self.request.strength == 1  # the original is then not in the first state, as in diffusers
        highest = float(schedule.sigmas[0]) if anew else math.inf
        return (alone if anew else noised), inpaint_denoiser(denoise, original.mask, original.latents, unit, highest)

    def _noise(self, image: int) -> NoiseSource:
        request = for_image(self.request, image)
        own = Noise(given(request.seed))
        return (
            own
            if request.variation is None
            else interpolate_noise(own, Noise(request.variation[0]), request.variation[1])
        )

    def _unet(self, place: str, request: Request, controlled: ControlledUNet) -> DeepCache:
        steered = place == "" and len(self._controls) > 0
        graphs = unet_graphs(request.reuse, token_downsampling=request.token_downsampling, controlled=steered)
        return DeepCache(controlled if steered else partial(self._run, f"{place}unet"), graphs, request.reuse)

    def _controlled(self, request: Request, region: CropRegion | None, steps: int) -> ControlledUNet:
        """The package's U-Net with what steers it in one image of a pass."""
        nets = [make_control(index, net, self._run, request, region) for index, net in enumerate(self._controls)]
        run = partial(self._run, "unet")
        return ControlledUNet(run, self._package, nets, guess=request.control_guess, steps=steps)

    def _leave(self) -> None:
        """Unloads the package's U-Net and what steers it."""
        for name in ("unet", *control_components(self._controls)):
            self._run.components.release(name)

    def _denoiser(self, models: Sequence[Model]) -> Denoise:
        """Of the package's model, and of the refiner's where there is one."""
        sampler = str(self.request.sampler)
        model, *refiner = models
        if refiner:
            self._run.components.release(f"{REFINER}unet")  # of the image before
            below = round(self._scheduler.num_train_timesteps * (1 - given(self.request.refiner_start)))
            model = refiner_handoff(model, refiner[0], below, self._leave)
        limit = None if sampler == "ddim" else clip_or_threshold_x0(self._scheduler, sampler)
        return predict_x0(model, self._scheduler.prediction_type, limit)

    def _latent_shape(self, request: Request) -> tuple[int, int, int, int]:
        latents = self._manifest.latents
        height, width = given(request.height), given(request.width)
        return (1, latents.channels, height // latents.downscale, width // latents.downscale)


def decode(run: Runner, manifest: Manifest, latents: Array) -> tuple[Image.Image, ...]:
    """Pictures of latents, (N, C, h, w), one after another."""
    space = manifest.latents
    unscaled = latents / np.float32(space.scaling_factor) + np.float32(space.shift_factor)
    made = [run("vae_decoder", {"latent_sample": one[None]}) for one in unscaled]
    return to_images(np.concatenate([picture for outputs in made for picture in outputs.values()]))
