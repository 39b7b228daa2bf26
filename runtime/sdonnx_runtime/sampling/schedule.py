"""Schedules: at which noise levels a sampler evaluates the model, after a package's scheduler config and a request.

States are in the variance-exploding parametrisation x = x0 + sigma * noise; a model trained on
sqrt(alpha) x0 + sqrt(1 - alpha) noise is at sigma = sqrt((1 - alpha) / alpha).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.sampling.scheduler_config import WHOLE_TIMESTEPS, SchedulerConfig, check_settings, sigma_schedule
from sdonnx_runtime.sampling.sigmas import SCHEDULES, Sigmas, round_to_float32, trained_sigmas
from sdonnx_runtime.sampling.timesteps import KINDS, ScheduleSpec
from sdonnx_runtime.sampling.types import Schedule

SPACINGS = ("leading", "linspace", "trailing")
"""How timesteps are spaced: table 2 of arXiv:2305.08891."""

MAX_SIGMA = 1e6
"""The highest noise level that may be given: beyond it single precision leaves nothing of a picture."""

_ELSEWHERE = "take euler or dpmpp_2m"
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
) -> Schedule:
    """The schedule that diffusers' class for ``sampler`` makes of a config, as far as the request leaves it to that.

    Args:
        config: the package's.
        sampler: a key of SAMPLERS.
        num_inference_steps: 1 to the number of timesteps trained with; without effect beside the last two.
        schedule: a name of SCHEDULES, to lay the noise levels so; None is as the config says.
        spacing: a name of SPACINGS; None is as the config says.
        sigmas: the noise level at which each step starts, decreasing, above 0 and up to MAX_SIGMA. The last step
            ends at 0, which may be given as a last level or left out.
        timesteps: the timestep at which each step starts, decreasing, 0 to the last one trained with.

    Raises:
        RequestError: more steps than the model was trained with or the sampler can tell apart, or fewer than 1;
            levels that don't decrease; a schedule that the sampler can't serve.
        PackageError: the config has a setting that changes the result in a way this sampler can't follow.
    """
    _check_choices(sampler, schedule, spacing, sigmas, timesteps)
    check_settings(config, sampler)
    config = config.for_sampler(sampler)
    if spacing is not None:
        config = replace(config, timestep_spacing=spacing)
    train = config.num_train_timesteps
    levels = None if sigmas is None else _levels(sigmas)
    times = None if timesteps is None else _timesteps(timesteps, train, sampler)
    given = levels if levels is not None else times
    steps = num_inference_steps if given is None else len(given)
    if not 1 <= steps <= train:
        raise RequestError(f"num_inference_steps is {steps}; give a whole number from 1 to {train}")
    respaced = schedule if schedule is not None or given is not None else sigma_schedule(config, sampler)
    trained = trained_sigmas(config)
    wish = ScheduleSpec(config=config, steps=steps, respaced=respaced, sigmas=levels, timesteps=times, trained=trained)
    made = KINDS[sampler](wish)
    if sampler in _DIVIDE_BY_STEPS and (np.diff(made.sigmas[:-1]) >= 0).any():
        raise RequestError(f"{steps} steps come to one noise level twice; take fewer or another sampler")
    return made


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
        raise RequestError("sigmas and timesteps are both given; give one of them")
    if (sigmas is not None or timesteps is not None) and (schedule is not None or spacing is not None):
        raise RequestError("sigmas or timesteps are given along with a schedule or spacing; give one of them")
    if sampler in WHOLE_TIMESTEPS and (schedule is not None or sigmas is not None):
        asked = "given sigmas" if schedule is None else f"schedule {schedule}"
        raise RequestError(f"{sampler} keeps to the model's own timesteps; for {asked} {_ELSEWHERE}")
    if sampler in ("lcm", "tcd") and spacing is not None:
        raise RequestError(f"{sampler} keeps to the timesteps of distillation; for spacing {spacing} {_ELSEWHERE}")
    if sampler == "pndm" and timesteps is not None:
        raise RequestError(f"pndm wants evenly spaced timesteps; for given ones take ddim, or {_ELSEWHERE[5:]}")


def listed(name: str, values: object) -> tuple[float, ...]:
    """The numbers of a list, a tuple or an array of one axis.

    Raises:
        RequestError: it is something else, or empty.
    """
    try:
        found = np.asarray(values)
    except ValueError:  # lists of unequal lengths
        found = np.empty(0)
    if found.ndim != 1 or len(found) == 0 or found.dtype.kind not in "iuf":
        shown = " ".join(repr(values).split())[:80]
        raise RequestError(f"{name} are {shown}; give numbers in a list, at least one, the highest first")
    return tuple(float(value) for value in found)


def _levels(sigmas: Sequence[float]) -> Sigmas:
    """Given sigmas in the single precision that samplers work with, a closing 0 taken off."""
    values = listed("sigmas", sigmas)
    if values == (0.0,):
        raise RequestError("sigmas are 0 alone; give one for each step, such as 14.6, 3.2, 0.7")
    levels = _decreasing("sigmas", values[:-1] if values[-1] == 0 else values, MAX_SIGMA)
    if levels[-1] == 0:
        raise RequestError(
            f"the lowest of the sigmas, {min(filter(None, values)):g}, is 0 in single precision; give a higher one"
        )
    return levels


def _timesteps(timesteps: Sequence[float], train: int, sampler: str) -> Sigmas:
    times = _decreasing("timesteps", listed("timesteps", timesteps), math.inf)
    if times[0] > train - 1:
        raise RequestError(f"timestep {times[0]:g} is above the last one trained with; give them from {train - 1} to 0")
    if sampler in WHOLE_TIMESTEPS and (times != np.round(times)).any():
        raise RequestError(f"{sampler} keeps to whole timesteps; round them, or {_ELSEWHERE}")
    return times


def _decreasing(name: str, values: tuple[float, ...], most: float) -> Sigmas:
    highest, lowest = max(values), min(values)
    if not all(math.isfinite(value) for value in values) or lowest < 0:
        raise RequestError(f"{name} are {values!r}; give finite numbers of 0 or more")
    if highest > most:
        raise RequestError(f"{name} go up to {highest:g}; give numbers of at most {most:g}")
    levels = round_to_float32(np.array(values))
    if (np.diff(levels) >= 0).any():
        raise RequestError(f"{name} are {values!r}; give them decreasing in single precision, the highest first")
    return levels
