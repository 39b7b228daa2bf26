"""Resolve a request for a package: make every choice, parse the prompts, make the schedules."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from sdonnx_runtime.adapters.lora import find_lora
from sdonnx_runtime.denoising.control import check_sizes
from sdonnx_runtime.denoising.step_cache import unet_graphs
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.packages.concat import CONCAT
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.request import CompleteRequest, Request, complete_request
from sdonnx_runtime.resolved import Pass, ResolvedRequest
from sdonnx_runtime.sampling.registry import num_sampler_steps, resolve_sampler, sampler_options
from sdonnx_runtime.sampling.schedule import make_schedule
from sdonnx_runtime.sampling.scheduler_config import SchedulerConfig, default_sampler
from sdonnx_runtime.sampling.types import Schedule
from sdonnx_runtime.text.prompt_schedule import schedule_prompts
from sdonnx_runtime.validation import check_request, check_size


def resolve_request(
    request: Request,
    package: Package,
    scheduler: SchedulerConfig,
    *,
    random_seed: int,
    refiner: Package | None = None,
    controls: Sequence[Package] = (),
    lora_folder: Path | None = None,
) -> ResolvedRequest:
    """Check a request and make every choice it leaves open; nothing runs.

    ``scheduler`` is the package's; ``random_seed`` is for a request without a seed; ``lora_folder`` has the LoRAs that
    prompts name.

    Raises:
        RequestError: a value is out of range, or the package does not support it.
        PackageError: the package's scheduler config is not supported.
    """
    manifest = package.manifest
    concat, multiple = manifest.conditions.concat, manifest.latents.downscale
    checked = check_request(
        request, manifest, random_seed=random_seed, has_refiner=refiner is not None, num_controls=len(controls)
    )
    complete = _choose_sampler(checked, scheduler)
    sizes = _sizes(complete, multiple)
    for width, height in sizes:
        check_sizes(controls, width, height)
    complete, schedules = _make_schedules(complete, scheduler)
    options = sampler_options(
        scheduler, complete.sampler, eta=complete.eta, s_churn=complete.s_churn, s_noise=complete.s_noise
    )
    steps = [complete.num_inference_steps, complete.hires_steps or complete.num_inference_steps][: len(sizes)]
    prompts = schedule_prompts(complete.prompt, complete.negative_prompt, complete.prompt_syntax, steps)
    if concat is not None and CONCAT[concat].edits and len(prompts.weights) > 1:
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
                prompts=texts,
            )
            for (width, height), strength, schedule, texts in zip(
                sizes, (complete.strength, complete.hires_strength), schedules, prompts.passes, strict=False
            )
        ),
        prompts=prompts,
        loras=tuple(find_lora(lora_folder, tag.name, tag.weight) for tag in prompts.loras),
        sampler_options=options,
        refiner_timestep=None if start is None else round(scheduler.num_train_timesteps * (1 - start)),
    )
    _check_components(complete, package, refiner, controls)
    return resolved


def _choose_sampler(request: Request, scheduler: SchedulerConfig) -> CompleteRequest:
    sampler, schedule = default_sampler(scheduler), None
    if request.sampler is not None:
        sampler, schedule = resolve_sampler(request.sampler)
    schedule = schedule if request.schedule is None else request.schedule
    return complete_request(replace(request, sampler=sampler, schedule=schedule))


def _make_schedules(request: CompleteRequest, scheduler: SchedulerConfig) -> tuple[CompleteRequest, list[Schedule]]:
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
    second = first = make(request.num_inference_steps)
    if request.sigmas is not None or request.timesteps is not None:
        request = replace(request, num_inference_steps=first.total)
    elif request.hires_scale is not None:
        steps = request.hires_steps or request.num_inference_steps
        request = replace(request, hires_steps=steps)
        second = first if steps == request.num_inference_steps else make(steps)
    schedules = [_skip_steps(first, request.strength)]
    if request.hires_scale is not None:
        schedules.append(_skip_steps(second, request.hires_strength))
    return request, schedules


def _skip_steps(schedule: Schedule, strength: float | None) -> Schedule:
    """Skip the first steps, as img2img does."""
    if strength is None:
        return schedule
    steps = int(schedule.steps * strength)  # as diffusers' img2img counts them
    if steps == 0 and strength > 0:
        minimum = 1 / schedule.steps
        scale = 10 ** (1 - math.floor(math.log10(minimum)))  # to two significant digits
        raise RequestError(
            f"strength {strength:g} of {schedule.steps} steps is less than one step; "
            f"give {math.ceil(minimum * scale) / scale} or more, or 0"
        )
    return schedule.starting_at(schedule.steps - steps)


def _sizes(request: CompleteRequest, multiple: int) -> list[tuple[int, int]]:
    """Width and height of each pass; the second one's are rounded to multiples of ``multiple``."""
    sides = (request.width, request.height)
    if request.hires_scale is None:
        return [sides]
    width, height = (round(side * request.hires_scale / multiple) * multiple for side in sides)
    check_size("the second pass's width", width, multiple)
    check_size("the second pass's height", height, multiple)
    return [sides, (width, height)]


def _check_components(
    request: CompleteRequest, package: Package, refiner: Package | None, controls: Sequence[Package]
) -> None:
    """Check that the packages have the graphs that the request runs."""
    encodes = request.image is not None or request.hires_upscaler == "lanczos"
    if encodes and "vae_encoder" not in package.manifest.components:
        raise RequestError(f"{package.name} has no VAE encoder, so it does not support images; export it again")
    for each, controlled in ((package, len(controls) > 0), (refiner, False)):
        if each is None:
            continue
        options = {"token_downsampling": request.token_downsampling, "controlled": controlled}
        for graph in unet_graphs(request.cache_interval, **options):
            if graph.name not in each.manifest.components["unet"].graphs:
                reason = "a control" if controlled else "cache_interval or token_downsampling"
                raise RequestError(
                    f"{each.name} has no U-Net graph '{graph.name}', which {reason} requires; "
                    "export its checkpoint again, not --via optimum, or leave them out"
                )
