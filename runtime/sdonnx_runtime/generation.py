"""Generation: encode the prompts, denoise in one or two passes, decode; one component in memory at a time."""

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sdonnx_runtime.adapters.merging import Adapters
from sdonnx_runtime.arrays import Array
from sdonnx_runtime.denoising.control import component_prefix
from sdonnx_runtime.denoising.controlled_unet import ControlledUNet, make_controlled_unet
from sdonnx_runtime.denoising.decoding import decode
from sdonnx_runtime.denoising.denoiser import Model, PerStepModel, inpaint_denoiser, predict_x0, refiner_handoff
from sdonnx_runtime.denoising.init_image import (
    ConcatImages,
    InitImage,
    InitLatents,
    apply_overlay,
    concat_latents,
    encode_concat_images,
    encode_init_image,
)
from sdonnx_runtime.denoising.ip_adapter import ImagePrompt, encode_image_prompts
from sdonnx_runtime.denoising.step_cache import DeepCache, RunUNetGraph, unet_graphs
from sdonnx_runtime.execution.components import REFINER, Runner
from sdonnx_runtime.execution.strategy import ExecutionPlan
from sdonnx_runtime.hires import upscale_images, upscale_latents
from sdonnx_runtime.packages.manifest import Manifest
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.packages.variant import CACHED_FEATURES
from sdonnx_runtime.progress import Progress, SampledLatents
from sdonnx_runtime.request import CompleteRequest
from sdonnx_runtime.resolved import ResolvedRequest
from sdonnx_runtime.result import Result
from sdonnx_runtime.safety.policy import SafetyPolicy, check_images
from sdonnx_runtime.sampling.noise import Noise, interpolate_noise
from sdonnx_runtime.sampling.registry import SAMPLERS
from sdonnx_runtime.sampling.scheduler_config import SchedulerConfig, clip_or_threshold_x0
from sdonnx_runtime.sampling.types import Denoise, NoiseSource, Schedule
from sdonnx_runtime.text.encoding import Conditioning, encode_prompts
from sdonnx_runtime.text.prompt_schedule import PromptSchedule


@dataclass(frozen=True, kw_only=True)
class Models:
    """The packages and adapters of a generation, and what runs them."""

    run: Runner
    """Runs the components of all packages; a refiner's have the prefix REFINER, a control's `component_prefix`, an
    upscaler's UPSCALER."""
    package: Package
    scheduler: SchedulerConfig
    """The package's."""
    refiner: Package | None = None
    """The package whose U-Net takes the last steps."""
    controls: Sequence[Package] = ()
    ip_adapters: Sequence[Package] = ()
    upscaler: Package | None = None
    """Enlarges images between the passes."""
    adapters: Adapters = field(default_factory=Adapters)
    safety: SafetyPolicy | None = None

    @property
    def manifest(self) -> Manifest:
        """The package's."""
        return self.package.manifest

    @property
    def denoisers(self) -> dict[str, Package]:
        """The packages with a U-Net, in the order of running, by the prefix of their components."""
        return {"": self.package} | ({} if self.refiner is None else {REFINER: self.refiner})

    def unload_base(self) -> None:
        """Unload the package's U-Net and the controls."""
        controls = (f"{component_prefix(index)}{each.kind.value}" for index, each in enumerate(self.controls))
        for name in ("unet", *controls):
            self.run.components.unload(name)


@dataclass(frozen=True, kw_only=True)
class PassConditioning:
    """What the models are conditioned on in one pass."""

    index: int
    """Which pass, from 0."""
    texts: Mapping[str, Mapping[PromptSchedule, Sequence[Conditioning]]]
    """Of each pass, by the prefix of a U-Net's components and the prompts of an image."""
    concat: ConcatImages | None
    """Of the package's U-Net."""
    init: InitImage | None
    """The request's image."""
    image_prompts: Sequence[ImagePrompt]
    """Of the IP-Adapters."""


def generate_images(
    models: Models, resolved: ResolvedRequest, plan: ExecutionPlan | None = None
) -> Generator[Progress | SampledLatents, None, Result]:
    """Generate the images of a request; yields each denoising step, and the latents after each pass.

    ``plan`` says how components are run; None is as ``models.run`` has them without one.

    Raises:
        RequestError: the mask is empty at latent resolution; or as `encode_prompts` does.
        PackageError, DeviceError: as `Runner` does.
    """
    run, request = models.run, resolved.request
    with run.components.exclusive(models.adapters.deltas, plan, request.tiling or ""):
        sizes = [(each.width, each.height) for each in resolved.passes]
        encoded = {
            prefix: encode_prompts(package, prefix, run, request, resolved.prompts, models.adapters.embeddings, sizes)
            for prefix, package in models.denoisers.items()
        }
        image_prompts = encode_image_prompts(run, models.ip_adapters, request)
        init = encode_init_image(run, models.manifest, request)
        concats = [encode_concat_images(run, models.manifest, request, init, size) for size in sizes]
        run.components.unload("vae_encoder")
        one_pass = replace(request, hires_scale=None, hires_strength=None, hires_steps=None, hires_upscaler=None)
        latents, seconds = np.empty(0, np.float32), list[float]()
        for index in range(len(resolved.passes)):
            if index == 0:
                states: Sequence[InitImage | InitLatents | None] = [init] * request.num_images
            else:
                states = _second_states(models, resolved, index, latents)
            conditioning = PassConditioning(
                index=index, texts=encoded, concat=concats[index], init=init, image_prompts=image_prompts
            )
            latents = yield from _denoise_pass(models, resolved, conditioning, states, seconds)
            last = index == len(resolved.passes) - 1
            if last:
                models.unload_base()
                run.components.unload(f"{REFINER}unet")
            yield SampledLatents(latents=latents, request=request if last else one_pass, last=last)
        images = decode(run, models.manifest, latents)
        images = images if init is None else tuple(apply_overlay(image, init, request) for image in images)
        checked = check_images(models.safety, run, images, latents)
        return Result(
            images=checked.images,
            seeds=request.seeds,
            latents=checked.latents,
            request=request,
            model=models.package.name,
            timings=run.timings(seconds),
            compute=checked.compute,
            vae=None if models.package.vae is None else models.package.vae.name,
            loras=models.adapters.loras,
            refiner=None if models.refiner is None else models.refiner.name,
            controls=tuple(control.name for control in models.controls),
            ip_adapters=tuple(adapter.name for adapter in models.ip_adapters),
            safety=checked.safety,
        )


def run_to_end(events: Generator[Progress | SampledLatents, None, Result]) -> Result:
    """Run `generate_images` to its result."""
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value


def _denoise_pass(
    models: Models,
    resolved: ResolvedRequest,
    conditioning: PassConditioning,
    initial_states: Sequence[InitImage | InitLatents | None],
    seconds: list[float],
) -> Generator[Progress, None, Array]:
    """Denoise all images of a pass to latents (num_images, C, h, w); adds the seconds of each step to ``seconds``."""
    previous_steps = sum(each.steps for each in resolved.passes[: conditioning.index])
    all_latents = list[Array]()
    for image, initial in enumerate(initial_states):
        own = resolved.request.for_image(image)
        noise = Noise(own.seed)
        if own.variation is not None:
            noise = interpolate_noise(noise, Noise(own.variation[0]), own.variation[1])
        original = initial.init_latents(noise) if isinstance(initial, InitImage) else initial
        latents = None if original is None else original.latents  # the result where strength 0 leaves no step
        steps = _denoise_image(models, resolved, image, noise, conditioning, original)
        for progress in steps:
            latents = progress.latents
            seconds.append(progress.seconds)
            yield replace(progress, step=previous_steps + progress.step, num_steps=resolved.steps)
        all_latents += [] if latents is None else [latents]
    return np.concatenate(all_latents)


def _second_states(
    models: Models, resolved: ResolvedRequest, index: int, latents: Array
) -> Sequence[InitImage | InitLatents]:
    """Upscale the latents (N, C, h, w) of the first pass to the start of each image of the second."""
    request, second = resolved.request, resolved.passes[index]
    upscaler, circular = request.hires_upscaler, request.tiling or ""
    if upscaler == "latent":
        return upscale_latents(latents, second, models.manifest.latents, circular)
    models.unload_base()
    models.run.components.unload(f"{REFINER}unet")
    package = models.upscaler if models.upscaler is not None and upscaler == models.upscaler.name else None
    return upscale_images(models.run, models.manifest, latents, second, package, circular)


def _denoise_image(
    models: Models,
    resolved: ResolvedRequest,
    image: int,
    noise: NoiseSource,
    conditioning: PassConditioning,
    original: InitLatents | None,
) -> Iterator[Progress]:
    """Denoise one image in one pass: x (1, C, h, w) from its initial state to the latents of the last progress."""
    request, index, prompts = resolved.request, conditioning.index, resolved.prompts[image]
    pass_, schedule = resolved.passes[index], resolved.passes[index].schedule
    is_hidden = models.safety is not None and models.safety.hides_images
    preview = None if is_hidden else models.manifest.latents.preview
    unit_noise = noise(pass_.latent_shape(models.manifest.latents))
    concat = concat_latents(models.manifest, request, conditioning.concat, noise)
    region = None if conditioning.init is None else conditioning.init.region
    controlled = make_controlled_unet(
        _unet(models.run, ""), models.run, models.package, models.controls, conditioning.image_prompts, request, pass_,
        region, num_conditional=len(prompts.weights),
    )  # fmt: skip
    unets = {prefix: _cached_unet(models, request, prefix, controlled) for prefix in models.denoisers}
    per_step_models = [
        PerStepModel(
            unet, conditioning.texts[prefix][prompts][index], prompts.passes[index], concat, prompts.weights, request
        )
        for prefix, unet in unets.items()
    ]

    def unload_base() -> None:
        for each in (unets[""], *([] if controlled is None else [controlled])):
            each.forget()
        models.unload_base()

    denoise = _make_denoiser(models, resolved, per_step_models, unload_base)
    x, denoise = _initial_state(request, schedule, noise, unit_noise, denoise, original)
    before = time.perf_counter()
    for step in SAMPLERS[request.sampler](denoise, x, schedule, noise, **resolved.sampler_options):
        now = time.perf_counter()
        latents = step.x
        if step.index == step.total - 1:
            latents = latents * np.float32(schedule.output_scale)
            latents = latents if original is None else original.restore(latents)
        yield Progress(
            image=image,
            num_images=request.num_images,
            step=step.index,
            num_steps=step.total,
            seconds=now - before,
            latents=latents,
            denoised=step.x0,
            projection=None if preview is None else np.array(preview, np.float32),
        )
        for unet in unets.values():
            unet.next_step(last=step.index + 2 == step.total)
        for each in (*per_step_models, *([] if controlled is None else [controlled])):
            each.next_step()
        before = time.perf_counter()


def _initial_state(
    request: CompleteRequest,
    schedule: Schedule,
    noise: NoiseSource,
    unit_noise: Array,
    denoise: Denoise,
    original: InitLatents | None,
) -> tuple[Array, Denoise]:
    """Make the first state, (1, C, h, w), and the denoiser that goes with it."""
    pure_noise = unit_noise * np.float32(schedule.init_scale)
    if original is None:
        return pure_noise, denoise
    noised = original.latents + unit_noise * np.float32(schedule.sigmas[0])
    if original.mask is None:
        return noised, denoise
    if original.is_sampled:
        noise(unit_noise.shape)  # diffusers samples the masked image's posterior here
    from_noise = request.strength == 1  # the first state is then without the original, as in diffusers
    max_masked_sigma = float(schedule.sigmas[0]) if from_noise else math.inf
    inpaint = inpaint_denoiser(denoise, original.mask, original.latents, unit_noise, max_masked_sigma)
    return (pure_noise if from_noise else noised), inpaint


def _cached_unet(models: Models, request: CompleteRequest, prefix: str, controlled: ControlledUNet | None) -> DeepCache:
    controlled = controlled if prefix == "" else None  # the refiner has no controls and IP-Adapters
    options = {"token_downsampling": request.token_downsampling, "controlled": controlled is not None}
    graphs = unet_graphs(request.cache_interval, **options)
    return DeepCache(controlled or _unet(models.run, prefix), graphs, request.cache_interval)


def _unet(run: Runner, prefix: str) -> RunUNetGraph:
    return lambda inputs, graph: run(f"{prefix}unet", inputs, graph.name, (CACHED_FEATURES,))


def _make_denoiser(
    models: Models, resolved: ResolvedRequest, step_models: Sequence[Model], on_refiner: Callable[[], None]
) -> Denoise:
    """Make a denoiser of the package's model, and of the refiner's where there is one; ``on_refiner`` is in between."""
    scheduler, sampler = models.scheduler, resolved.request.sampler
    model, *refiner = step_models
    if refiner and resolved.refiner_timestep is not None:
        models.run.components.unload(f"{REFINER}unet")  # of the image before
        model = refiner_handoff(model, refiner[0], resolved.refiner_timestep, on_refiner)
    limit = None if sampler == "ddim" else clip_or_threshold_x0(scheduler, sampler)
    return predict_x0(model, scheduler.prediction_type, limit)
