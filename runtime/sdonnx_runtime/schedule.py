"""Schedules: at which noise levels a sampler evaluates the model, after a package's scheduler config.

States are in the variance-exploding parametrisation x = x0 + sigma * noise; a model trained on
sqrt(alpha) x0 + sqrt(1 - alpha) noise is at sigma = sqrt((1 - alpha) / alpha).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdonnx_runtime.errors import PackageError, RequestError

Levels = NDArray[np.float64]
"""Sigmas or timesteps, (n,)."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a sampler walks along."""

    timesteps: Levels
    """(n,): what the model is told at each evaluation."""
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


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """A diffusers scheduler_config.json; None where it leaves a choice to the scheduler class."""

    class_name: str
    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    prediction_type: str
    timestep_spacing: str | None
    steps_offset: int
    set_alpha_to_one: bool | None
    final_sigmas_type: str
    settings: Mapping[str, Any]
    """The whole JSON, for what concerns one class alone."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "SchedulerConfig":
        """Parse the JSON as published.

        A key that is absent gets the default of the class that is asked for later, as diffusers' ``from_config``
        does it.

        Raises:
            PackageError: a value is of a kind that no sampler here can follow.
        """
        for key, works in _CHOICES.items():
            if key in config and config[key] not in works:
                raise _refusal(key, config[key], works)
        return cls(
            class_name=str(config.get("_class_name", "PNDMScheduler")),
            num_train_timesteps=_number(config, "num_train_timesteps", 1000, int),
            beta_start=_number(config, "beta_start", 0.0001, float),
            beta_end=_number(config, "beta_end", 0.02, float),
            beta_schedule=str(config.get("beta_schedule", "linear")),
            prediction_type=str(config.get("prediction_type", "epsilon")),
            timestep_spacing=config.get("timestep_spacing"),
            steps_offset=_number(config, "steps_offset", 0, int),
            set_alpha_to_one=config.get("set_alpha_to_one"),
            final_sigmas_type=str(config.get("final_sigmas_type", "zero")),
            settings=config,
        )


_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "set_alpha_to_one": (False, True),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "trained_betas": (None,),
}

_OFF = (False, None)
_RESPACED: Mapping[str, tuple[Any, ...]] = {
    "use_beta_sigmas": _OFF,
    "use_exponential_sigmas": _OFF,
    "use_karras_sigmas": _OFF,
}
_ONLY: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "ddim": {"clip_sample": _OFF, "rescale_betas_zero_snr": _OFF, "thresholding": _OFF},
    "dpmpp_2m": {
        **_RESPACED,
        "algorithm_type": ("dpmsolver++", "deis"),  # the latter belongs to another class, as do three solver types
        "lambda_min_clipped": (-math.inf, "-inf", "-Infinity"),
        "lower_order_final": (True,),
        "rescale_betas_zero_snr": _OFF,
        "solver_order": (2,),
        "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
        "thresholding": _OFF,
        "use_flow_sigmas": _OFF,
        "use_lu_lambdas": _OFF,
    },
    "euler": {
        **_RESPACED,
        "interpolation_type": ("linear",),
        "rescale_betas_zero_snr": _OFF,
        "sigma_max": (None,),
        "sigma_min": (None,),
        "timestep_type": ("discrete",),
    },
    "euler_ancestral": {"rescale_betas_zero_snr": _OFF},
    "lms": _RESPACED,
    "pndm": {"skip_prk_steps": (True,)},
}
"""Keys of the classes behind the samplers, of which other values would give another picture."""

_ABSENT = {"clip_sample": True, "skip_prk_steps": False}
"""What diffusers takes where one of these keys is absent; for the others it is the first value above."""


def default_sampler(config: SchedulerConfig) -> str:
    """The sampler that a package was published with.

    Raises:
        PackageError: it is one that this version doesn't have.
    """
    if config.class_name not in _CLASSES:
        raise PackageError(
            f"the package's scheduler is {config.class_name}; this version has {', '.join(_CLASSES)}: "
            "name a sampler, or export with another scheduler_config.json"
        )
    return _CLASSES[config.class_name]


_CLASSES = {
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
}


def make_schedule(config: SchedulerConfig, sampler: str, num_inference_steps: int) -> Schedule:
    """The schedule that diffusers' class for ``sampler`` (a key of SAMPLERS) makes of a config.

    Raises:
        RequestError: more steps than the model was trained with or the sampler can tell apart, or fewer than 1.
        PackageError: the config has a setting that changes the result in a way this sampler can't follow.
    """
    for key, works in _ONLY[sampler].items():
        found = config.settings.get(key, _ABSENT.get(key, works[0]))
        if found not in works:
            raise _refusal(key, found, works)
    train = config.num_train_timesteps
    if not 1 <= num_inference_steps <= train:
        raise RequestError(f"num_inference_steps is {num_inference_steps}; give a whole number from 1 to {train}")
    schedule = _KINDS[sampler](config, num_inference_steps)
    if sampler in _DIVIDE_BY_STEPS and (np.diff(schedule.sigmas) >= 0).any():
        raise RequestError(f"{num_inference_steps} steps come to one noise level twice; take fewer or another sampler")
    return schedule


def _euler(config: SchedulerConfig, steps: int) -> Schedule:
    """Euler: as the others in sigmas, but it may stop at the lowest level trained with."""
    return _sigma_space(config, steps, _last_sigma(config))


def _last_sigma(config: SchedulerConfig) -> float:
    return float(_trained_sigmas(config)[0]) if config.final_sigmas_type == "sigma_min" else 0.0


def _sigma_space(config: SchedulerConfig, steps: int, last: float = 0.0) -> Schedule:
    """Euler and LMS (k-diffusion): sigmas between those trained with are interpolated."""
    spacing = config.timestep_spacing or "linspace"
    train = config.num_train_timesteps
    timesteps = np.linspace(0, train - 1, steps)[::-1] if spacing == "linspace" else _whole(config, spacing, steps)
    sigmas = _single(np.append(np.interp(timesteps, np.arange(train), _trained_sigmas(config)), last))
    highest = float(sigmas.max())
    return _plain(
        config,
        timesteps,
        sigmas,
        math.hypot(highest, 1.0) if spacing == "leading" else highest,
        final_scale=1.0,
    )


def _dpm_solver(config: SchedulerConfig, steps: int) -> Schedule:
    """DPM-Solver++: like the others in whole timesteps, but spaced as if there were one step more."""
    if config.final_sigmas_type == "sigma_min" and config.settings.get("euler_at_final"):
        raise _refusal("euler_at_final", True, _OFF)
    spacing = config.timestep_spacing or "linspace"
    train = config.num_train_timesteps
    if spacing == "linspace":
        timesteps = np.round(np.linspace(0, train - 1, steps + 1))[::-1][:-1]
    elif spacing == "leading":
        timesteps = (np.arange(steps + 1) * (train // (steps + 1)))[::-1][:-1].astype(float) + config.steps_offset
    else:
        timesteps = _whole(config, spacing, steps)
    interpolated = np.interp(timesteps, np.arange(train), _trained_sigmas(config))
    sigmas = _single(np.append(interpolated, _last_sigma(config)))
    return _plain(config, timesteps, sigmas, math.hypot(sigmas[0], 1.0), 1.0 / math.hypot(sigmas[-1], 1.0))


def _ddim(config: SchedulerConfig, steps: int) -> Schedule:
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
    )


def _plms(config: SchedulerConfig, steps: int) -> Schedule:
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
    )


_DIVIDE_BY_STEPS = ("dpmpp_2m", "lms")

_KINDS: Mapping[str, Callable[[SchedulerConfig, int], Schedule]] = {
    "ddim": _ddim,
    "dpmpp_2m": _dpm_solver,
    "euler": _euler,
    "euler_ancestral": _sigma_space,
    "lms": _sigma_space,
    "pndm": _plms,
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
    end = 0.0 if ends_clean else _trained_sigmas(config)[0]
    return np.where(lower >= 0, _at(config, np.maximum(lower, 0)), end)


def _at(config: SchedulerConfig, timesteps: Levels) -> Levels:
    highest = config.num_train_timesteps - 1
    if timesteps.max() > highest:
        raise RequestError(
            f"these steps begin at timestep {timesteps.max():.0f}, above the last one trained with ({highest}); "
            "take fewer steps or another sampler"
        )
    return _trained_sigmas(config)[timesteps.astype(int)]


def _trained_sigmas(config: SchedulerConfig) -> Levels:
    """The noise levels of training, (num_train_timesteps,), lowest first; in single precision, as published."""
    count, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.beta_schedule == "linear":
        betas = np.linspace(start, end, count)
    elif config.beta_schedule == "scaled_linear":
        betas = _single(np.linspace(math.sqrt(start), math.sqrt(end), count)) ** 2
    else:  # arXiv:2102.09672, equation 17
        bars = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bars[1:] / bars[:-1], 0.999)
    alphas = _single(1 - _single(betas))
    products = _single(np.cumprod(alphas, dtype=np.float64))
    return _single(np.sqrt(_single(_single(1 - products) / products)))


def _single(values: NDArray[Any]) -> Levels:
    """Rounded to float32, kept as float64."""
    return values.astype(np.float32).astype(np.float64)


def _number(config: Mapping[str, Any], key: str, default: float, kind: type[Any]) -> Any:
    found = config.get(key, default)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or kind(found) != found:
        raise PackageError(f"the scheduler config's '{key}' is {found!r}; expected a number; export again")
    return kind(found)


def _refusal(key: str, found: Any, works: tuple[Any, ...]) -> PackageError:
    listed = " or ".join(repr(value) for value in works)
    return PackageError(
        f"the scheduler config's '{key}' is {found!r}; what works here is {listed}; choose another sampler"
    )
