"""Schedules: at which noise levels a sampler evaluates the model, after a package's scheduler config.

States are in the variance-exploding parametrisation x = x0 + sigma * noise; a model trained on
sqrt(alpha) x0 + sqrt(1 - alpha) noise is at sigma = sqrt((1 - alpha) / alpha).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.scheduler_config import SchedulerConfig, check_settings, refusal, respacing
from sdonnx_runtime.sigmas import RESPACED, Levels, single, timesteps_of, trained_sigmas


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a sampler walks along."""

    timesteps: Levels
    """(n,): what the model is told at each step's first evaluation."""
    sigmas: Levels
    """(n + 1,): the noise level of each evaluation, and the last one that is reached."""
    sources: Levels
    """(n,): where each step starts; not ``sigmas[:-1]`` where a step is taken anew."""
    targets: Levels
    """(n,): where each step ends; not ``sigmas[1:]`` where the next evaluation is at another timestep."""
    prediction_type: str
    """epsilon, v_prediction or sample."""
    init_scale: float
    """What unit noise is multiplied by to make the first state."""
    final_scale: float
    """What the last state is multiplied by to make the latents."""
    trained: Levels
    """(num_train_timesteps,): the noise levels of training, lowest first."""

    def timestep(self, sigma: float) -> float:
        """What the model is told at a noise level between those of the steps."""
        return float(timesteps_of(np.array(sigma), self.trained))


def make_schedule(
    config: SchedulerConfig, sampler: str, num_inference_steps: int, schedule: str | None = None
) -> Schedule:
    """The schedule that diffusers' class for ``sampler`` (a key of SAMPLERS) makes of a config.

    Args:
        config: the package's.
        sampler: a key of SAMPLERS.
        num_inference_steps: 1 to the number of timesteps trained with.
        schedule: a key of RESPACED, to lay the noise levels so; None is as the config says.

    Raises:
        RequestError: more steps than the model was trained with or the sampler can tell apart, or fewer than 1.
        PackageError: the config has a setting that changes the result in a way this sampler can't follow.
    """
    check_settings(config, sampler)
    config = config.for_sampler(sampler)
    if schedule is not None and schedule not in RESPACED:
        raise RequestError(f"there is no schedule '{schedule}'; choose from {', '.join(RESPACED)}")
    if schedule is not None and sampler in _KEEP_TO_TIMESTEPS:
        raise RequestError(
            f"{sampler} keeps to the model's own timesteps; for schedule {schedule} take another sampler"
        )
    train = config.num_train_timesteps
    if not 1 <= num_inference_steps <= train:
        raise RequestError(f"num_inference_steps is {num_inference_steps}; give a whole number from 1 to {train}")
    made = _KINDS[sampler](config, num_inference_steps, respacing(config, sampler) if schedule is None else schedule)
    if sampler in _DIVIDE_BY_STEPS and (np.diff(made.sigmas[:-1]) >= 0).any():
        raise RequestError(f"{num_inference_steps} steps come to one noise level twice; take fewer or another sampler")
    return made


def _euler(config: SchedulerConfig, steps: int, respaced: str | None) -> Schedule:
    """Euler: as the others in sigmas, but it may stop at the lowest level trained with."""
    return _sigma_space(config, steps, respaced, _last_sigma(config))


def _last_sigma(config: SchedulerConfig) -> float:
    return float(trained_sigmas(config)[0]) if config.final_sigmas_type == "sigma_min" else 0.0


def _sigma_space(config: SchedulerConfig, steps: int, respaced: str | None, last: float = 0.0) -> Schedule:
    """k-diffusion's samplers: sigmas between those trained with are interpolated."""
    spacing = config.timestep_spacing or "linspace"
    train, trained = config.num_train_timesteps, trained_sigmas(config)
    timesteps = np.linspace(0, train - 1, steps)[::-1] if spacing == "linspace" else _whole(config, spacing, steps)
    sigmas = np.interp(timesteps, np.arange(train), trained)
    if respaced is not None:
        sigmas = RESPACED[respaced](sigmas[-1], sigmas[0], steps)
        timesteps = timesteps_of(sigmas, trained)
    sigmas = single(np.append(sigmas, last))
    highest = float(sigmas.max())
    return _plain(
        config,
        timesteps,
        sigmas,
        math.hypot(highest, 1.0) if spacing == "leading" else highest,
        final_scale=1.0,
    )


def _dpm2(config: SchedulerConfig, steps: int, respaced: str | None) -> Schedule:
    """DPM2: as the others in sigmas, but Karras levels are told to the model as whole timesteps."""
    made = _sigma_space(config, steps, respaced)
    return replace(made, timesteps=np.round(made.timesteps)) if respaced == "karras" else made


def _dpm_solver(config: SchedulerConfig, steps: int, respaced: str | None) -> Schedule:
    """DPM-Solver++: like the others in whole timesteps, but spaced as if there were one step more."""
    if config.final_sigmas_type == "sigma_min" and config.settings.get("euler_at_final"):
        raise refusal("euler_at_final", True, (False, None))
    spacing = config.timestep_spacing or "linspace"
    train, trained = config.num_train_timesteps, trained_sigmas(config)
    if respaced is not None:
        sigmas = RESPACED[respaced](trained[0], trained[-1], steps)
        timesteps = timesteps_of(sigmas, trained)
        timesteps = np.round(timesteps) if respaced in ("karras", "lu") else np.trunc(timesteps)
    else:
        if spacing == "linspace":
            timesteps = np.round(np.linspace(0, train - 1, steps + 1))[::-1][:-1]
        elif spacing == "leading":
            timesteps = (np.arange(steps + 1) * (train // (steps + 1)))[::-1][:-1].astype(float) + config.steps_offset
        else:
            timesteps = _whole(config, spacing, steps)
        sigmas = np.interp(timesteps, np.arange(train), trained)
    sigmas = single(np.append(sigmas, _last_sigma(config)))
    return _plain(config, timesteps, sigmas, math.hypot(sigmas[0], 1.0), 1.0 / math.hypot(sigmas[-1], 1.0))


def _deis(config: SchedulerConfig, steps: int, respaced: str | None) -> Schedule:
    """DEIS: it always stops at the lowest level trained with."""
    return _dpm_solver(replace(config, final_sigmas_type="sigma_min"), steps, respaced)


def _ddim(config: SchedulerConfig, steps: int, _respaced: str | None) -> Schedule:
    """DDIM: each step goes down by the same number of timesteps, whatever comes next."""
    timesteps = _whole(config, config.timestep_spacing or "leading", steps)
    ends_clean = config.set_alpha_to_one is None or config.set_alpha_to_one
    targets = _lower(config, timesteps, steps, ends_clean=ends_clean)
    sigmas = np.append(_at(config, timesteps), targets[-1])
    return Schedule(
        timesteps=timesteps,
        sigmas=sigmas,
        sources=sigmas[:-1],
        targets=targets,
        prediction_type=config.prediction_type,
        init_scale=math.hypot(sigmas[0], 1.0),
        final_scale=1.0 / math.hypot(sigmas[-1], 1.0),
        trained=trained_sigmas(config),
    )


def _plms(config: SchedulerConfig, steps: int, _respaced: str | None) -> Schedule:
    """PNDM without Runge-Kutta steps: the first step is taken twice, the second time with what it led to."""
    once = _whole(config, config.timestep_spacing or "leading", steps)
    timesteps = np.insert(once, 1, once[1:2]) if steps > 1 else once  # t0, t1, t1, t2, …
    targets = _lower(config, timesteps, steps, ends_clean=bool(config.set_alpha_to_one))
    sigmas = np.append(_at(config, timesteps), targets[-1])
    sources = np.array(sigmas[:-1])
    if steps > 1:
        sources[1] = _at(config, timesteps[1:2] + config.num_train_timesteps // steps)[0]
        targets[1] = sigmas[1]
    return Schedule(
        timesteps=timesteps,
        sigmas=sigmas,
        sources=sources,
        targets=targets,
        prediction_type=config.prediction_type,
        init_scale=math.hypot(sigmas[0], 1.0),
        final_scale=1.0 / math.hypot(sigmas[-1], 1.0),
        trained=trained_sigmas(config),
    )


_DIVIDE_BY_STEPS = ("deis", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "lms", "unipc")
_KEEP_TO_TIMESTEPS = ("ddim", "pndm")

_KINDS: Mapping[str, Callable[[SchedulerConfig, int, str | None], Schedule]] = {
    "ddim": _ddim,
    "deis": _deis,
    "dpm2": _dpm2,
    "dpm2_ancestral": _dpm2,
    "dpmpp_2m": _dpm_solver,
    "dpmpp_2m_sde": _dpm_solver,
    "dpmpp_2s_ancestral": _sigma_space,
    "dpmpp_3m_sde": _sigma_space,
    "dpmpp_sde": _sigma_space,
    "euler": _euler,
    "euler_ancestral": _sigma_space,
    "heun": _sigma_space,
    "lms": _sigma_space,
    "pndm": _plms,
    "unipc": _dpm_solver,
}


def _plain(
    config: SchedulerConfig, timesteps: Levels, sigmas: Levels, init_scale: float, final_scale: float
) -> Schedule:
    """A schedule whose every step ends where the next begins."""
    return Schedule(
        timesteps=timesteps,
        sigmas=sigmas,
        sources=sigmas[:-1],
        targets=sigmas[1:],
        prediction_type=config.prediction_type,
        init_scale=init_scale,
        final_scale=final_scale,
        trained=trained_sigmas(config),
    )


def _whole(config: SchedulerConfig, spacing: str, steps: int) -> Levels:
    """Whole timesteps, highest first: table 2 of arXiv:2305.08891."""
    train = config.num_train_timesteps
    if spacing == "linspace":
        return np.round(np.linspace(0, train - 1, steps))[::-1]
    if spacing == "leading":
        return (np.arange(steps) * (train // steps))[::-1].astype(float) + config.steps_offset
    return np.round(np.arange(train, 0, -train / steps)) - 1


def _lower(config: SchedulerConfig, timesteps: Levels, steps: int, *, ends_clean: bool) -> Levels:
    """Sigmas a step's length below timesteps; below the lowest it is zero, or the lowest one trained with."""
    lower = timesteps - config.num_train_timesteps // steps
    end = 0.0 if ends_clean else trained_sigmas(config)[0]
    return np.where(lower >= 0, _at(config, np.maximum(lower, 0)), end)


def _at(config: SchedulerConfig, timesteps: Levels) -> Levels:
    highest = config.num_train_timesteps - 1
    if timesteps.max() > highest:
        raise RequestError(
            f"these steps begin at timestep {timesteps.max():.0f}, above the last one trained with ({highest}); "
            "take fewer steps or another sampler"
        )
    return trained_sigmas(config)[timesteps.astype(int)]
