"""Timesteps and sigmas of each scheduler class: one function per kind."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sdonnx_runtime.errors import PackageError, RequestError
from sdonnx_runtime.sampling.scheduler_config import NO_SIGNAL, SchedulerConfig
from sdonnx_runtime.sampling.sigmas import (
    SIGMA_RANGE_SCHEDULES,
    TIMESTEP_SCHEDULES,
    Sigmas,
    round_to_float32,
    sigma_to_t,
    t_to_sigma,
)
from sdonnx_runtime.sampling.types import Schedule

_SIGMAS = (1e-6, 1e6)
"""The lowest and the highest ``sigma_min`` and ``sigma_max``."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """The inputs of a schedule."""

    config: SchedulerConfig
    """The package's, with the sampler's defaults."""
    steps: int
    """1 or more."""
    schedule: str | None
    """A name of SCHEDULES, or None for the class's own timesteps."""
    sigmas: Sigmas | None
    """(steps,): custom sigmas, without a closing 0."""
    timesteps: Sigmas | None
    """(steps,): custom timesteps."""
    strength: float = 1.0
    """Above 0 to 1: the part of the timesteps of distillation, from the lowest, that `lcm` and `tcd` choose from."""
    train_sigmas: Sigmas
    """(num_train_timesteps,): the sigmas of training, lowest first."""

    @property
    def num_train_timesteps(self) -> int:
        """The number of timesteps that the model was trained with."""
        return self.config.num_train_timesteps

    @property
    def last_sigma(self) -> float:
        """The sigma of the last step's end, for classes that read ``final_sigmas_type``."""
        ends_low = self.config.final_sigmas_type == "sigma_min" and self.sigmas is None
        return float(self.train_sigmas[0]) if ends_low else 0.0


def sigma_space(spec: ScheduleSpec, last: float = 0.0) -> Schedule:
    """Make the schedule of k-diffusion's samplers: sigmas are interpolated between those of training."""
    timesteps = _spaced(spec, spec.config.timestep_spacing or "linspace", whole=False)
    default_sigmas = np.interp(timesteps, np.arange(spec.num_train_timesteps), spec.train_sigmas)
    timesteps, sigmas = _apply_schedule(spec, timesteps, default_sigmas, default_sigmas[[-1, 0]])
    return _variance_exploding(spec, timesteps, np.append(sigmas, last))


def euler(spec: ScheduleSpec) -> Schedule:
    """Euler: `sigma_space` with settings of its own."""
    settings = spec.config.settings
    is_ranged = spec.sigmas is None and spec.timesteps is None and spec.schedule in (None, *SIGMA_RANGE_SCHEDULES)
    is_log_linear = is_ranged and settings.get("interpolation_type") == "log_linear"
    schedule = _log_linear(spec) if is_log_linear else sigma_space(spec, spec.last_sigma)
    if settings.get("timestep_type") == "continuous" and spec.config.prediction_type == "v_prediction":
        c_noise = 0.25 * np.log(schedule.sigmas[:-1])  # arXiv:2206.00364, table 1, VP
        return replace(schedule, timesteps=c_noise)
    return schedule


def _log_linear(spec: ScheduleSpec) -> Schedule:
    """Sigmas even in log(sigma) with the class's own timesteps; the last step ends at the lowest sigma."""
    timesteps = _spaced(spec, spec.config.timestep_spacing or "linspace", whole=False)
    lowest, highest = float(spec.train_sigmas[0]), float(spec.train_sigmas[-1])
    sigmas = SIGMA_RANGE_SCHEDULES["exponential"](lowest, highest, spec.steps + 1)
    if spec.schedule is not None:
        timesteps, sigmas = _apply_schedule(spec, timesteps, sigmas, spec.train_sigmas[[0, -1]])
        sigmas = np.append(sigmas, spec.last_sigma)
    return _variance_exploding(spec, timesteps, sigmas)


def dpm2(spec: ScheduleSpec) -> Schedule:
    """DPM2: `sigma_space`, with whole timesteps for Karras sigmas."""
    schedule = sigma_space(spec)
    return replace(schedule, timesteps=np.round(schedule.timesteps)) if spec.schedule == "karras" else schedule


def lms(spec: ScheduleSpec) -> Schedule:
    """LMS: `sigma_space`; its Karras sigmas ignore ``sigma_min`` and ``sigma_max``."""
    if spec.schedule != "karras":
        return sigma_space(spec)
    return sigma_space(_without_settings(spec, "sigma_min", "sigma_max"))


def _without_settings(spec: ScheduleSpec, *keys: str) -> ScheduleSpec:
    settings = {key: value for key, value in spec.config.settings.items() if key not in keys}
    return replace(spec, config=replace(spec.config, settings=settings))


def dpm_solver(spec: ScheduleSpec) -> Schedule:
    """DPM-Solver++: whole timesteps, spaced as for one step more."""
    config, steps = spec.config, spec.steps
    spacing = config.timestep_spacing or "linspace"
    is_clipped = config.settings.get("lambda_min_clipped") not in (None, -math.inf)  # of cosine schedules
    lowest = config.number("lambda_min_clipped", 0.0) if is_clipped else -math.inf
    highest = spec.num_train_timesteps - int(np.searchsorted(-np.log(spec.train_sigmas[::-1]), lowest))
    if spec.timesteps is not None:
        timesteps = spec.timesteps
    elif spacing == "linspace":
        timesteps = np.round(np.linspace(0, highest - 1, steps + 1))[::-1][:-1]
    elif spacing == "leading":
        timesteps = (np.arange(steps + 1) * (highest // (steps + 1)))[::-1][:-1].astype(float) + _offset(config)
    else:
        timesteps = np.round(np.arange(highest, 0, -spec.num_train_timesteps / steps)) - 1
    default_sigmas = np.interp(timesteps, np.arange(spec.num_train_timesteps), spec.train_sigmas)
    timesteps, sigmas = _apply_schedule(spec, timesteps, default_sigmas, spec.train_sigmas[[0, -1]])
    if spec.schedule in ("karras", "lu") and config.beta_schedule != "squaredcos_cap_v2":
        timesteps = np.round(timesteps)
    elif spec.schedule in SIGMA_RANGE_SCHEDULES:
        timesteps = np.trunc(timesteps)
    return _variance_preserving(spec, timesteps, round_to_float32(np.append(sigmas, spec.last_sigma)))


def unipc(spec: ScheduleSpec) -> Schedule:
    """UniPC: `dpm_solver`, with rounded Karras timesteps and without ``lambda_min_clipped``."""
    schedule = dpm_solver(_without_settings(spec, "lambda_min_clipped"))
    if spec.schedule == "karras":
        schedule = replace(schedule, timesteps=np.round(sigma_to_t(schedule.sigmas[:-1], spec.train_sigmas)))
    if spec.schedule in SIGMA_RANGE_SCHEDULES and spec.config.final_sigmas_type == "sigma_min":
        sigmas = np.append(schedule.sigmas[:-1], schedule.sigmas[-2])
        schedule = _variance_preserving(spec, schedule.timesteps, sigmas)
    return schedule


def deis(spec: ScheduleSpec) -> Schedule:
    """DEIS: `unipc`, which always ends at the lowest sigma."""
    return unipc(replace(spec, config=replace(spec.config, final_sigmas_type="sigma_min")))


def ddim(spec: ScheduleSpec) -> Schedule:
    """DDIM: each step goes down by the same number of timesteps, whichever the next one is."""
    timesteps = _spaced(spec, spec.config.timestep_spacing or "leading", whole=True)
    ends_at_zero = spec.config.set_alpha_to_one in (None, True)
    if spec.timesteps is None:
        sigmas_to = _next_sigmas(spec, timesteps, ends_at_zero=ends_at_zero)
    else:
        sigmas_to = np.append(_sigmas_at(spec, timesteps)[1:], 0.0 if ends_at_zero else spec.train_sigmas[0])
    return _at_training_timesteps(spec, timesteps, sigmas_to)


def pndm(spec: ScheduleSpec) -> Schedule:
    """PNDM: without Runge-Kutta steps its first step is repeated, from one of ``repeat_sigmas``."""
    timesteps = _spaced(spec, spec.config.timestep_spacing or "leading", whole=True)
    sigmas_to = _next_sigmas(spec, timesteps, ends_at_zero=bool(spec.config.set_alpha_to_one))
    schedule = _at_training_timesteps(spec, timesteps, sigmas_to)
    sigmas_above = _sigmas_at(spec, timesteps[1:] + spec.num_train_timesteps // spec.steps)
    return replace(schedule, repeat_sigmas=np.append(sigmas_above, schedule.sigmas[-2]))


def ddpm(spec: ScheduleSpec) -> Schedule:
    """DDPM: each step ends at the next timestep, the last at sigma 0."""
    timesteps = _spaced(spec, spec.config.timestep_spacing or "leading", whole=True)
    return _at_training_timesteps(spec, timesteps, np.append(_sigmas_at(spec, timesteps)[1:], 0.0))


def lcm(spec: ScheduleSpec) -> Schedule:
    """LCM: evenly chosen timesteps of distillation, from the last."""
    timesteps = _distilled_timesteps(spec)
    return _at_training_timesteps(spec, timesteps, np.append(_sigmas_at(spec, timesteps)[1:], 0.0))


def tcd(spec: ScheduleSpec) -> Schedule:
    """TCD: `lcm`, whose last step ends at timestep 0."""
    timesteps = _distilled_timesteps(spec)
    return _at_training_timesteps(spec, timesteps, np.append(_sigmas_at(spec, timesteps)[1:], spec.train_sigmas[0]))


def _distilled_timesteps(spec: ScheduleSpec) -> Sigmas:
    if spec.timesteps is not None:
        return spec.timesteps
    count = spec.config.whole_number("original_inference_steps", 50, (1, spec.num_train_timesteps))
    left = int(count * spec.strength)
    if spec.steps > left:
        is_shortened = spec.strength < 1
        which = f", of which strength {spec.strength:g} leaves {left}" if is_shortened else ""
        remedy = "more strength, fewer steps" if is_shortened else "fewer steps"
        raise RequestError(
            f"the model was distilled to {count} steps{which}; {spec.steps} were requested; "
            f"use {remedy} or another sampler"
        )
    distilled = (np.arange(1, left + 1) * (spec.num_train_timesteps // count) - 1)[::-1].astype(float)
    return distilled[np.floor(np.linspace(0, left, spec.steps, endpoint=False)).astype(int)]


KINDS: Mapping[str, Callable[[ScheduleSpec], Schedule]] = {
    "ddim": ddim, "ddpm": ddpm, "deis": deis, "dpm2": dpm2, "dpm2_ancestral": dpm2, "dpmpp_2m": dpm_solver,
    "dpmpp_2m_sde": dpm_solver, "euler": euler, "lcm": lcm, "lms": lms, "pndm": pndm, "tcd": tcd, "unipc": unipc,
}  # fmt: skip
"""The schedules of samplers other than k-diffusion's, which have `sigma_space`."""


def _spaced(spec: ScheduleSpec, spacing: str, *, whole: bool) -> Sigmas:
    """Space timesteps, highest first: table 2 of arXiv:2305.08891."""
    train, steps = spec.num_train_timesteps, spec.steps
    if spec.timesteps is not None:
        return spec.timesteps
    if spacing == "linspace":
        even = np.linspace(0, train - 1, steps)[::-1]
        return np.round(even) if whole else even
    if spacing == "leading":
        return (np.arange(steps) * (train // steps))[::-1].astype(float) + _offset(spec.config)
    return np.round(np.arange(train, 0, -train / steps)) - 1


def _offset(config: SchedulerConfig) -> int:
    return config.whole_number("steps_offset", 0, (0, config.num_train_timesteps))


def _apply_schedule(
    spec: ScheduleSpec, timesteps: Sigmas, sigmas: Sigmas, sigma_range: Sigmas
) -> tuple[Sigmas, Sigmas]:
    """Timesteps and sigmas of the spec's schedule within a range, or the class's own ``timesteps`` and ``sigmas``."""
    if spec.sigmas is not None:
        return sigma_to_t(spec.sigmas, spec.train_sigmas), spec.sigmas
    if spec.schedule is not None and spec.schedule in TIMESTEP_SCHEDULES:
        timesteps = TIMESTEP_SCHEDULES[spec.schedule](spec.train_sigmas, spec.steps)
        return timesteps, t_to_sigma(timesteps, spec.train_sigmas)
    if spec.schedule is not None:
        lowest, highest = (float(sigma) for sigma in sigma_range)
        if spec.schedule != "lu":
            lowest = spec.config.number("sigma_min", lowest, _SIGMAS)
            highest = spec.config.number("sigma_max", highest, _SIGMAS)
        sigmas = SIGMA_RANGE_SCHEDULES[spec.schedule](lowest, highest, spec.steps)
        return sigma_to_t(sigmas, spec.train_sigmas), sigmas
    return timesteps, sigmas


def _variance_exploding(spec: ScheduleSpec, timesteps: Sigmas, sigmas: Sigmas) -> Schedule:
    """Make a schedule of k-diffusion's states, which begin as noise of the highest sigma."""
    sigmas = round_to_float32(sigmas)
    highest = float(sigmas[:-1].max())
    scale = math.hypot(highest, 1.0) if spec.config.timestep_spacing == "leading" else highest
    return _make_schedule(spec, timesteps, sigmas, init_scale=scale)


def _variance_preserving(spec: ScheduleSpec, timesteps: Sigmas, sigmas: Sigmas) -> Schedule:
    """Make a schedule of states that begin as unit noise."""
    first, last = math.hypot(sigmas[0], 1.0), math.hypot(sigmas[-1], 1.0)
    return _make_schedule(spec, timesteps, sigmas, init_scale=first, output_scale=1.0 / last)


def _make_schedule(spec: ScheduleSpec, timesteps: Sigmas, sigmas: Sigmas, **scales: float) -> Schedule:
    kind = spec.config.prediction_type
    fields: dict[str, Any] = {"timesteps": timesteps, "train_sigmas": spec.train_sigmas, "prediction_type": kind}
    return Schedule.from_sigmas(sigmas, **fields, **scales)


def _at_training_timesteps(spec: ScheduleSpec, timesteps: Sigmas, sigmas_to: Sigmas) -> Schedule:
    """Make a schedule at whole timesteps, whose steps end at ``sigmas_to``."""
    schedule = _variance_preserving(spec, timesteps, np.append(_sigmas_at(spec, timesteps), sigmas_to[-1]))
    has_no_signal = spec.config.terminal_alpha == NO_SIGNAL and timesteps[0] == spec.num_train_timesteps - 1
    if has_no_signal and spec.config.prediction_type == "epsilon":
        raise PackageError(
            "the scheduler config's 'rescale_betas_zero_snr' leaves no signal to an 'epsilon' model at its last "
            "timestep; use euler, or spacing leading"
        )
    return replace(schedule, sigmas_to=sigmas_to)


def _next_sigmas(spec: ScheduleSpec, timesteps: Sigmas, *, ends_at_zero: bool) -> Sigmas:
    """Sigmas one step length below timesteps; below the lowest timestep 0, or the lowest of training."""
    next_timesteps = timesteps - spec.num_train_timesteps // spec.steps
    last = 0.0 if ends_at_zero else spec.train_sigmas[0]
    return np.where(next_timesteps >= 0, _sigmas_at(spec, np.maximum(next_timesteps, 0)), last)


def _sigmas_at(spec: ScheduleSpec, timesteps: Sigmas) -> Sigmas:
    highest = spec.num_train_timesteps - 1
    if len(timesteps) > 0 and timesteps.max() > highest:
        raise RequestError(
            f"these steps begin at timestep {timesteps.max():.0f}, above the highest of training, {highest}; "
            "use fewer steps or another sampler"
        )
    return spec.train_sigmas[timesteps.astype(int)]
