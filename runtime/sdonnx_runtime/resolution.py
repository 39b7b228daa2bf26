"""Resolve a request for a package: make every choice, parse the prompts, make the schedules."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from sdonnx_runtime.adapters.lora import find_lora
from sdonnx_runtime.denoising.control import check_sizes
from sdonnx_runtime.denoising.init_image import encodes_images
from sdonnx_runtime.denoising.step_cache import unet_graphs
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.packages.concat import CONCAT
from sdonnx_runtime.packages.manifest import Manifest
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.request import CompleteRequest, Prompts, Request, complete_request
from sdonnx_runtime.resolved import Pass, ResolvedRequest
from sdonnx_runtime.sampling.registry import num_sampler_steps, resolve_sampler, sampler_options
from sdonnx_runtime.sampling.schedule import make_schedule
from sdonnx_runtime.sampling.scheduler_config import SchedulerConfig, default_sampler
from sdonnx_runtime.sampling.types import Schedule
from sdonnx_runtime.text.prompt_schedule import schedule_prompts
from sdonnx_runtime.text.styles import apply_styles, find_styles
from sdonnx_runtime.text.wildcards import draw_texts
from sdonnx_runtime.validation import check_request, check_size


def resolve_request(
    request: Request,
    package: Package,
    scheduler: SchedulerConfig,
    *,
    random_seed: int,
    refiner: Package | None = None,
    controls: Sequence[Package] = (),
    ip_adapters: Sequence[Package] = (),
    upscaler: Package | None = None,
    lora_folder: Path | None = None,
    wildcard_folder: Path | None = None,
    styles: Path | None = None,
) -> ResolvedRequest:
    """Check a request and make every choice it leaves open; nothing runs.

    ``scheduler`` is the package's; ``random_seed`` is for a request without a seed; ``lora_folder`` has the LoRAs that
    prompts name, ``wildcard_folder`` the files of their wildcards; ``styles`` is the file of styles.

    Raises:
        RequestError: a value is out of range, or the package does not support it.
        PackageError: the package's scheduler config is not supported.
    """
    manifest = package.manifest
    concat, multiple = manifest.conditions.concat, manifest.latents.downscale
    checked = check_request(
        request,
        manifest,
        random_seed=random_seed,
        has_refiner=refiner is not None,
        num_controls=len(controls),
        num_ip_adapters=len(ip_adapters),
        upscaler=None if upscaler is None else upscaler.name,
    )
    complete = _draw_prompts(_choose_sampler(_apply_styles(checked, styles), scheduler), wildcard_folder)
    sizes = _sizes(complete, multiple)
    for width, height in sizes:
        check_sizes(controls, width, height)
    complete, schedules = _make_schedules(complete, scheduler, distilled=_shortens_schedule(manifest, complete))
    options = sampler_options(
        scheduler, complete.sampler, eta=complete.eta, s_churn=complete.s_churn, s_noise=complete.s_noise
    )
    steps = [complete.num_inference_steps, complete.hires_steps or complete.num_inference_steps][: len(sizes)]
    prompts = {
        each: schedule_prompts(each.prompt, each.negative_prompt, complete.prompt_syntax, steps)
        for each in dict.fromkeys(complete.prompts)
    }
    loras = {
        each: tuple(find_lora(lora_folder, tag.name, tag.unet_weight, tag.text_encoder_weight) for tag in parsed.loras)
        for each, parsed in prompts.items()
    }
    if concat is not None and CONCAT[concat].edits and any(len(each.weights) > 1 for each in prompts.values()):
        raise RequestError(f"{concat} models do not support AND in the prompt; give one text")
    start = complete.refiner_start
    resolved = ResolvedRequest(
        request=complete,
        passes=tuple(
            Pass(
                width=width,
                height=height,
                strength=strength,
                schedule=schedule,
                steps=num_sampler_steps(complete.sampler, schedule, options),
            )
            for (width, height), strength, schedule in zip(
                sizes, (complete.strength, complete.hires_strength), schedules, strict=False
            )
        ),
        prompts=tuple(prompts[each] for each in complete.prompts),
        loras=tuple(loras[each] for each in complete.prompts),
        sampler_options=options,
        refiner_timestep=None if start is None else round(scheduler.num_train_timesteps * (1 - start)),
    )
    _check_components(complete, package, refiner, controlled=len(controls) + len(ip_adapters) > 0)
    return resolved


def _apply_styles(request: Request, path: Path | None) -> Request:
    """Merge the prompts with those of the styles."""
    styles = find_styles(path, request.styles)
    prompt = apply_styles(request.prompt, (each.prompt for each in styles))
    negative = apply_styles(request.negative_prompt, (each.negative_prompt for each in styles))
    return replace(request, prompt=prompt, negative_prompt=negative, styles=())


def _draw_prompts(request: CompleteRequest, folder: Path | None) -> CompleteRequest:
    """Draw the prompts of each image by its seed, if they are templates."""
    texts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    drawn = draw_texts(texts, request.prompt_syntax, folder, request.seeds)
    return replace(request, drawn=tuple(Prompts(**drawn[seed]) for seed in request.seeds)) if drawn else request


def _choose_sampler(request: Request, scheduler: SchedulerConfig) -> CompleteRequest:
    named = request.sampler
    sampler, schedule = (default_sampler(scheduler), None) if named is None else resolve_sampler(named)
    schedule = schedule if request.schedule is None else request.schedule
    return complete_request(replace(request, sampler=sampler, schedule=schedule))


def _shortens_schedule(manifest: Manifest, request: CompleteRequest) -> bool:
    """Whether all steps are taken in img2img, from a lower timestep: as LatentConsistencyModelImg2ImgPipeline does.

    diffusers' other pipelines skip steps with this sampler too.
    """
    is_lcm = manifest.conditions.guidance_width is not None and manifest.family in ("sd1", "sd2")
    custom = request.sigmas is not None or request.timesteps is not None
    return is_lcm and request.sampler == "lcm" and request.mask_image is None and not custom


def _make_schedules(
    request: CompleteRequest, scheduler: SchedulerConfig, *, distilled: bool
) -> tuple[CompleteRequest, list[Schedule]]:
    """Make the schedule of each pass, without the steps that img2img skips, and count the steps in the request."""
    make = partial(
        make_schedule,
        scheduler,
        request.sampler,
        schedule=request.schedule,
        spacing=request.timestep_spacing,
        sigmas=request.sigmas,
        timesteps=request.timesteps,
    )
    first = make(request.num_inference_steps)
    if request.sigmas is not None or request.timesteps is not None:
        request = replace(request, num_inference_steps=first.total)
    elif request.hires_scale is not None:
        request = replace(request, hires_steps=request.hires_steps or request.num_inference_steps)

    def shorten(steps: int, strength: float | None) -> Schedule:
        if distilled and strength is not None and strength > 0:
            return make(steps, strength=strength)
        return _skip_steps(make(steps), steps, strength)

    schedules = [shorten(request.num_inference_steps, request.strength)]
    if request.hires_scale is not None:
        schedules.append(shorten(request.hires_steps or request.num_inference_steps, request.hires_strength))
    return request, schedules


def _skip_steps(schedule: Schedule, count: int, strength: float | None) -> Schedule:
    """Skip the first of ``count`` steps, as img2img does."""
    if strength is None:
        return schedule
    steps = int(count * strength)  # as diffusers' img2img counts them
    if steps == 0 and strength > 0:
        minimum = 1 / count
        scale = 10 ** (1 - math.floor(math.log10(minimum)))  # to two significant digits
        raise RequestError(
            f"strength {strength:g} of {count} steps is less than one step; "
            f"give {math.ceil(minimum * scale) / scale} or more, or 0"
        )
    return schedule.starting_at(schedule.steps if steps == 0 else count - steps)


def _sizes(request: CompleteRequest, multiple: int) -> list[tuple[int, int]]:
    """Width and height of each pass; the second one's are rounded to multiples of ``multiple``."""
    sides = (request.width, request.height)
    if request.hires_scale is None:
        return [sides]
    width, height = (round(side * request.hires_scale / multiple) * multiple for side in sides)
    check_size("the second pass's width", width, multiple)
    check_size("the second pass's height", height, multiple)
    return [sides, (width, height)]


def _check_components(request: CompleteRequest, package: Package, refiner: Package | None, *, controlled: bool) -> None:
    """Check that the packages have the graphs that the request runs."""
    if encodes_images(package.manifest, request) and "vae_encoder" not in package.manifest.components:
        raise RequestError(f"{package.name} has no VAE encoder, so it does not support images; export it again")
    for each in (package, refiner):
        if each is None:
            continue
        is_controlled = controlled and each is package
        options = {"token_downsampling": request.token_downsampling, "controlled": is_controlled}
        for graph in unet_graphs(request.cache_interval, **options):
            if graph.name not in each.manifest.components["unet"].graphs:
                reason = "a control or an IP-Adapter" if is_controlled else "cache_interval or token_downsampling"
                raise RequestError(
                    f"{each.name} has no U-Net graph '{graph.name}', which {reason} requires; "
                    "export its checkpoint again, not --via optimum, or leave them out"
                )
