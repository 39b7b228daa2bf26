"""Generation of images whose prompts name different LoRAs: one group after another, as one generation."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sdonnx_runtime.execution.strategy import ExecutionPlan
from sdonnx_runtime.generation import Models, generate_images
from sdonnx_runtime.progress import Progress, SampledLatents
from sdonnx_runtime.request import CompleteRequest
from sdonnx_runtime.resolved import ResolvedRequest
from sdonnx_runtime.result import Result
from sdonnx_runtime.safety.policy import log_flagged


@dataclass(frozen=True, kw_only=True)
class LoraGroup:
    """Images that follow each other and have the same LoRAs."""

    models: Models
    """With these LoRAs; all groups have the same runner."""
    resolved: ResolvedRequest
    """Of these images."""
    plan: ExecutionPlan | None


def generate_groups(
    request: CompleteRequest, groups: Sequence[LoraGroup]
) -> Generator[Progress | SampledLatents, None, Result]:
    """Generate the images of a request group by group; events, result and errors are `generate_images`'."""
    if len(groups) == 1:
        result = yield from generate_images(groups[0].models, groups[0].resolved, groups[0].plan)
    else:
        result = yield from _generate_all(request, groups)
    log_flagged(result.safety)
    return result


def _generate_all(
    request: CompleteRequest, groups: Sequence[LoraGroup]
) -> Generator[Progress | SampledLatents, None, Result]:
    """Generate one group after another, and join their results."""
    results = list[Result]()
    for group in groups:
        result = yield from _generate_group(request, group, results, last=group is groups[-1])
        results.append(result)
    return replace(
        results[-1],
        images=tuple(image for each in results for image in each.images),
        seeds=request.seeds,
        latents=np.concatenate([each.latents for each in results]),
        request=request,
        safety=tuple(safety for each in results for safety in each.safety),
        timings=replace(results[-1].timings, steps=tuple(step for each in results for step in each.timings.steps)),
    )


def _generate_group(
    request: CompleteRequest, group: LoraGroup, before: Sequence[Result], *, last: bool
) -> Generator[Progress | SampledLatents, None, Result]:
    """Generate a group's images, with events that count the images ``before`` them."""
    done = sum(len(each.images) for each in before)
    events = generate_images(group.models, group.resolved, group.plan)
    try:
        while True:
            event = next(events)
            if isinstance(event, Progress):
                yield replace(event, image=done + event.image, num_images=request.num_images)
            elif event.last:  # of an earlier pass the groups have different sizes
                latents = np.concatenate([*(each.latents for each in before), event.latents])
                yield SampledLatents(latents=latents, request=request.for_images(0, len(latents)), last=last)
            elif not before:
                yield replace(event, last=False)
    except StopIteration as end:
        return end.value
    finally:
        events.close()
