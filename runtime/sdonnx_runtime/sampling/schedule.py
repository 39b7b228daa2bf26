"""Schedules: the timesteps and sigmas of a sampling loop, from a scheduler config and a request.

States are in the variance-exploding parametrisation x = x0 + sigma * noise; a model trained on
sqrt(alpha) x0 + sqrt(1 - alpha) noise is at sigma = sqrt((1 - alpha) / alpha).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.sampling.scheduler_config import (
    DISTILLED,
    SPACINGS,
    WHOLE_TIMESTEPS,
    SchedulerConfig,
    sigma_schedule,
)
from sdonnx_runtime.sampling.sigmas import SCHEDULES, Sigmas, round_to_float32, training_sigmas
from sdonnx_runtime.sampling.timesteps import KINDS, ScheduleSpec, sigma_space
from sdonnx_runtime.sampling.types import Schedule

MAX_SIGMA = 1e6
"""The highest custom sigma: above it single precision leaves nothing of an image."""

_ALTERNATIVE = "use euler or dpmpp_2m"
_DIVIDE_BY_STEPS = ("deis", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "lms", "unipc")


def make_schedule(
    config: SchedulerConfig,
    sampler: str,
    num_inference_steps: int,
    *,
    schedule: str | None = None,
    spacing: str | None = None,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    strength: float = 1.0,
) -> Schedule:
    """Make the schedule of diffusers' class for ``sampler``, with what the request changes of it.

    ``schedule`` is a name of SCHEDULES and ``spacing`` one of SPACINGS; None is the config's. ``sigmas`` or
    ``timesteps`` are those at which the steps start, instead of ``num_inference_steps``, in descending order: sigmas
    up to MAX_SIGMA, to which a closing 0 may belong, or timesteps from the highest of training to 0. ``strength``,
    above 0 to 1, is the lower part of the timesteps of distillation that a sampler of DISTILLED chooses from.

    Raises:
        RequestError: the number of steps is out of range or makes duplicate sigmas; sigmas or timesteps don't
            decrease; the sampler doesn't support the schedule.
        PackageError: the sampler doesn't support a setting of the config.
    """
    _check_choices(sampler, schedule, spacing, sigmas, timesteps)
    replaces_spacing = spacing is not None or sigmas is not None or timesteps is not None
    config = config.for_sampler(sampler, overridden=("timestep_spacing",) if replaces_spacing else ())
    if spacing is not None:
        config = replace(config, timestep_spacing=spacing)
    num_train = config.num_train_timesteps
    custom_sigmas = None if sigmas is None else _parse_sigmas(sigmas)
    custom_timesteps = None if timesteps is None else _parse_timesteps(timesteps, num_train, sampler)
    custom = custom_sigmas if custom_sigmas is not None else custom_timesteps
    steps = num_inference_steps if custom is None else len(custom)
    if not 1 <= steps <= num_train:
        raise RequestError(f"num_inference_steps is {steps}; give a whole number from 1 to {num_train}")
    spec = ScheduleSpec(
        config=config,
        steps=steps,
        schedule=schedule if schedule is not None or custom is not None else sigma_schedule(config, sampler),
        sigmas=custom_sigmas,
        timesteps=custom_timesteps,
        strength=strength,
        train_sigmas=training_sigmas(config),
    )
    result = KINDS.get(sampler, sigma_space)(spec)
    if sampler in _DIVIDE_BY_STEPS and (np.diff(result.sigmas[:-1]) >= 0).any():
        raise RequestError(f"duplicate sigmas for {steps} steps; use fewer steps or another sampler")
    return result


def _check_choices(
    sampler: str,
    schedule: str | None,
    spacing: str | None,
    sigmas: Sequence[float] | None,
    timesteps: Sequence[float] | None,
) -> None:
    if schedule is not None and schedule not in SCHEDULES:
        raise RequestError(f"there is no schedule '{schedule}'; choose from {', '.join(SCHEDULES)}")
    if spacing is not None and spacing not in SPACINGS:
        raise RequestError(f"there is no spacing '{spacing}'; choose from {', '.join(SPACINGS)}")
    if sigmas is not None and timesteps is not None:
        raise RequestError("sigmas and timesteps exclude each other; give one of them")
    if (sigmas is not None or timesteps is not None) and (schedule is not None or spacing is not None):
        raise RequestError("sigmas and timesteps exclude schedule and spacing; give one of them")
    if sampler in WHOLE_TIMESTEPS and (schedule is not None or sigmas is not None):
        unsupported = "custom sigmas" if schedule is None else f"schedule {schedule}"
        raise RequestError(f"{sampler} does not support {unsupported}; {_ALTERNATIVE}")
    if sampler in DISTILLED and spacing is not None:
        raise RequestError(f"{sampler} does not support spacing {spacing}; {_ALTERNATIVE}")
    if sampler == "pndm" and timesteps is not None:
        raise RequestError("pndm requires evenly spaced timesteps; use ddim, euler or dpmpp_2m for custom timesteps")


def parse_numbers(name: str, values: object) -> tuple[float, ...]:
    """Parse a list, a tuple or an array of one axis.

    Raises:
        RequestError: it is something else, or empty.
    """
    try:
        array = np.asarray(values)
    except ValueError:  # lists of unequal lengths
        array = np.empty(0)
    if array.ndim != 1 or len(array) == 0 or array.dtype.kind not in "iuf":
        shown = " ".join(repr(values).split())[:80]
        raise RequestError(f"{name} is {shown}; give a list of numbers, at least one, in descending order")
    return tuple(float(value) for value in array)


def _parse_sigmas(sigmas: Sequence[float]) -> Sigmas:
    """Check custom sigmas, round them to float32 and remove a closing 0."""
    values = parse_numbers("sigmas", sigmas)
    if values == (0.0,):
        raise RequestError("sigmas has only a 0; give one sigma per step, such as 14.6, 3.2, 0.7")
    rounded = _parse_descending("sigmas", values[:-1] if values[-1] == 0 else values, MAX_SIGMA)
    if rounded[-1] == 0:
        lowest = min(filter(None, values))
        raise RequestError(f"the lowest sigma, {lowest:g}, is 0 in single precision; give a higher one")
    return rounded


def _parse_timesteps(timesteps: Sequence[float], num_train: int, sampler: str) -> Sigmas:
    rounded = _parse_descending("timesteps", parse_numbers("timesteps", timesteps), math.inf)
    if rounded[0] > num_train - 1:
        raise RequestError(
            f"timestep {rounded[0]:g} is above the highest of training; give timesteps from {num_train - 1} to 0"
        )
    if sampler in WHOLE_TIMESTEPS and (rounded != np.round(rounded)).any():
        raise RequestError(f"{sampler} requires whole timesteps; round them, or {_ALTERNATIVE}")
    return rounded


def _parse_descending(name: str, values: tuple[float, ...], maximum: float) -> Sigmas:
    highest, lowest = max(values), min(values)
    if not all(math.isfinite(value) for value in values) or lowest < 0:
        raise RequestError(f"{name} is {values!r}; give finite numbers of 0 or more")
    if highest > maximum:
        raise RequestError(f"{name} has {highest:g}; give numbers up to {maximum:g}")
    rounded = round_to_float32(np.array(values))
    if (np.diff(rounded) >= 0).any():
        raise RequestError(f"{name} is {values!r}; give numbers that decrease in single precision")
    return rounded
