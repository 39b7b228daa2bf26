"""A package's scheduler_config.json, and the settings that each sampler supports."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import PackageError


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """A diffusers scheduler_config.json; None is the scheduler class's default."""

    class_name: str
    num_train_timesteps: int
    beta_start: float | None
    beta_end: float | None
    beta_schedule: str | None
    trained_betas: tuple[float, ...] | None
    """(num_train_timesteps,): explicit betas, which go before the three above; the last is 1 at zero terminal SNR."""
    prediction_type: str
    settings: Mapping[str, Any]
    """The whole JSON; after `for_sampler` without what the sampler doesn't read."""
    terminal_alpha: float | None = None
    """alphas_cumprod of the last timestep with zero terminal SNR; None is not rescaled."""
    timestep_spacing: str | None = None
    """This and the next two are set by `for_sampler`."""
    set_alpha_to_one: bool | None = None
    final_sigmas_type: str = "zero"

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "SchedulerConfig":
        """Parse the JSON as published: what describes the model is checked; what a sampler reads, in `for_sampler`.

        An absent key gets the default of the sampler's class later, as with diffusers' ``from_config``.

        Raises:
            PackageError: no sampler supports a value.
        """
        for key, supported in _MODEL_CHOICES.items():
            if key in config and config[key] not in supported:
                raise unsupported_setting(key, config[key], supported)
        count = parse_number(config, "num_train_timesteps", 1000, int, (1, MAX_TRAIN_TIMESTEPS))
        return cls(
            class_name=str(config.get("_class_name", "PNDMScheduler")),
            num_train_timesteps=count,
            beta_start=parse_number(config, "beta_start", None, float, _BETA_RANGE),
            beta_end=parse_number(config, "beta_end", None, float, _BETA_RANGE),
            beta_schedule=config.get("beta_schedule"),
            trained_betas=_betas(config, count),
            prediction_type=str(config.get("prediction_type", "epsilon")),
            settings=config,
        )

    def for_sampler(self, sampler: str, *, overridden: Collection[str] = ()) -> "SchedulerConfig":
        """Read what the sampler's class reads, with its defaults, as diffusers' ``from_config`` does.

        Settings that were written for another class and have another meaning there are left out; ``overridden`` are
        those that the request replaces.

        Raises:
            PackageError: the sampler's own class has a setting that changes the image and isn't supported.
        """
        settings = _readable_settings(self, sampler, overridden)
        schedule, start, end = _BETAS.get(sampler, ("linear", 0.0001, 0.02))
        rescaled = sampler not in _NEVER_RESCALED and settings.get("rescale_betas_zero_snr")
        rescaled = rescaled or (self.trained_betas is not None and self.trained_betas[-1] == 1)  # already
        return replace(
            self,
            beta_schedule=schedule if self.beta_schedule is None else self.beta_schedule,
            beta_start=start if self.beta_start is None else self.beta_start,
            beta_end=end if self.beta_end is None else self.beta_end,
            terminal_alpha=(NO_SIGNAL if sampler in WHOLE_TIMESTEPS else 2.0**-24) if rescaled else None,
            timestep_spacing=settings.get("timestep_spacing"),
            set_alpha_to_one=settings.get("set_alpha_to_one"),
            final_sigmas_type=settings.get("final_sigmas_type", "zero"),
            settings=settings,
        )

    def number(self, key: str, default: float, limits: tuple[float, float] = (-math.inf, math.inf)) -> float:
        """Read a number of the settings; raises PackageError if it is none, or out of range."""
        return parse_number(self.settings, key, default, float, limits)

    def whole_number(self, key: str, default: int, limits: tuple[float, float]) -> int:
        """Read a whole number of the settings; raises PackageError if it is none, or out of range."""
        return parse_number(self.settings, key, default, int, limits)


MAX_TRAIN_TIMESTEPS = 100_000
"""Far above any model's, and far below what fills the memory."""

_BETA_RANGE = (1e-9, 0.999)

NO_SIGNAL = 2.0**-60
"""Replaces an alpha of 0, whose sigma is infinite; classes in terms of sigma use 2**-24, as in diffusers."""

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
"""What a U-Net may predict."""

_MODEL_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": PREDICTION_TYPES,
}
"""Supported values of what a model was trained with."""

SPACINGS = ("leading", "linspace", "trailing")
"""Timestep spacings: table 2 of arXiv:2305.08891."""

_LAST_SIGMA: Mapping[str, tuple[Any, ...]] = {"final_sigmas_type": ("zero", "sigma_min")}
_LAST_ALPHA: Mapping[str, tuple[Any, ...]] = {"set_alpha_to_one": (False, True)}
_MULTISTEP = {"lower_order_final": (True, False), "solver_order": (2, 1, 3), "use_flow_sigmas": (False, None)}
_DPM_SOLVER: Mapping[str, tuple[Any, ...]] = {
    **_MULTISTEP,
    **_LAST_SIGMA,
    "euler_at_final": (False, True),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),  # the last three belong to other classes
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),  # not learned
}
_SUPPORTED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "ddim": _LAST_ALPHA,
    "ddpm": {"variance_type": ("fixed_small", "fixed_small_log", "fixed_large", None)},
    "deis": _MULTISTEP,
    "dpmpp_2m": _DPM_SOLVER,
    "dpmpp_2m_sde": {**_DPM_SOLVER, "solver_order": (2, 1)},
    "euler": {
        **_LAST_SIGMA,
        "interpolation_type": ("linear", "log_linear"),
        "timestep_type": ("discrete", "continuous"),
    },
    "pndm": {**_LAST_ALPHA, "skip_prk_steps": (False, True)},
    "unipc": {
        **_MULTISTEP,
        **_LAST_SIGMA,
        "predict_x0": (True,),
        "solver_p": (None,),
        "solver_type": ("bh2", "bh1", "midpoint", "heun", "logrho"),  # the last three belong to other classes
    },
}
"""The values that each sampler supports, of keys that change the image."""

_BETAS = {
    **dict.fromkeys(("dpm2", "dpm2_ancestral", "heun"), ("linear", 0.00085, 0.012)),
    **dict.fromkeys(("lcm", "tcd"), ("scaled_linear", 0.00085, 0.012)),
}
"""diffusers' default betas, where they aren't linear from 0.0001 to 0.02."""

_NEVER_RESCALED = ("deis", "dpm2", "dpm2_ancestral", "heun", "lms", "pndm")
"""Samplers whose classes don't read ``rescale_betas_zero_snr``."""

WHOLE_TIMESTEPS = ("ddim", "ddpm", "lcm", "pndm", "tcd")
"""Samplers that evaluate the model at whole training timesteps only."""

DISTILLED = ("lcm", "tcd")
"""Samplers whose timesteps are among those of distillation."""

_READS_SIGMA_SCHEDULE = ("deis", "dpm2", "dpm2_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "euler", "heun", "lms", "unipc")
"""Samplers whose classes read ``use_karras_sigmas`` and similar keys."""

PUBLISHED_NAMES: Mapping[str, tuple[str, str | None]] = {
    "ddim": ("DDIM", "DDIMScheduler"), "ddpm": ("DDPM", "DDPMScheduler"),
    "deis": ("DEIS", "DEISMultistepScheduler"), "dpm2": ("DPM2", "KDPM2DiscreteScheduler"),
    "dpm2_ancestral": ("DPM2 a", "KDPM2AncestralDiscreteScheduler"),
    "dpmpp_2m": ("DPM++ 2M", "DPMSolverMultistepScheduler"),
    "dpmpp_2m_sde": ("DPM++ 2M SDE", "DPMSolverMultistepScheduler"), "dpmpp_2s_ancestral": ("DPM++ 2S a", None),
    "dpmpp_3m_sde": ("DPM++ 3M SDE", None), "dpmpp_sde": ("DPM++ SDE", None),
    "euler": ("Euler", "EulerDiscreteScheduler"), "euler_ancestral": ("Euler a", "EulerAncestralDiscreteScheduler"),
    "heun": ("Heun", "HeunDiscreteScheduler"), "ipndm": ("IPNDM", None),
    "lcm": ("LCM", "LCMScheduler"), "lms": ("LMS", "LMSDiscreteScheduler"), "pndm": ("PLMS", "PNDMScheduler"),
    "restart": ("Restart", None), "tcd": ("TCD", "TCDScheduler"), "unipc": ("UniPC", "UniPCMultistepScheduler"),
}  # fmt: skip
"""AUTOMATIC1111's name, which its infotext has, and diffusers' class of each sampler; None is no class."""

CLASSES = {sampler: name for sampler, (_, name) in PUBLISHED_NAMES.items() if name is not None}
"""diffusers' class for each sampler, where it has one."""


def _readable_settings(config: SchedulerConfig, sampler: str, overridden: Collection[str]) -> dict[str, Any]:
    """The settings without those that another class means otherwise; a value that isn't supported is an error."""
    foreign = _foreign_settings(config, sampler)
    settings = {key: value for key, value in config.settings.items() if key not in foreign}
    spacings = {} if sampler in DISTILLED else {"timestep_spacing": SPACINGS}
    for key, supported in {**spacings, **_SUPPORTED.get(sampler, {})}.items():
        if key in settings and settings[key] not in supported and key not in overridden:
            raise unsupported_setting(key, settings[key], supported)
    return settings


def _foreign_settings(config: SchedulerConfig, sampler: str) -> set[str]:
    """Settings that the class which the config was written for means otherwise than the sampler's."""
    published, is_known = published_sampler(config), config.class_name in CLASSES.values()
    foreign = set[str]() if is_known else {"sigma_min", "sigma_max"}  # of the model itself, as EDM's
    is_other_solver = not is_known or published in ("deis", "dpmpp_2m", "unipc", None)
    if sampler == "dpmpp_2m_sde" and is_other_solver and config.settings.get("solver_order") == 3:
        foreign.add("solver_order")
    return foreign


_CLIPPING: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("ddim", "ddpm", "lcm"), ("thresholding", "clip_sample")),
    **dict.fromkeys(("deis", "dpmpp_2m", "dpmpp_2m_sde", "unipc"), ("thresholding",)),
    "heun": ("clip_sample",),
}
"""The settings that each class reads; the first that is set applies."""


def clip_or_threshold_x0(config: SchedulerConfig, sampler: str) -> Callable[[Array], Array] | None:
    """Get the config's clipping or thresholding of predicted x0, (B, ...); None is neither.

    `ddim` has this as an option of its own instead.
    """
    settings = config.settings
    clips = settings.get("clip_sample", sampler in ("ddim", "ddpm"))
    enabled = [key for key in _CLIPPING.get(sampler, ()) if (clips if key == "clip_sample" else settings.get(key))]
    if not enabled:
        return None
    if enabled[0] == "clip_sample":
        clip_sample_range = config.number("clip_sample_range", 1.0)
        return lambda x0: np.clip(x0, -clip_sample_range, clip_sample_range)
    ratio, maximum = config.number("dynamic_thresholding_ratio", 0.995, (0, 1)), config.number("sample_max_value", 1.0)
    return lambda x0: _dynamic_threshold(x0, ratio, maximum)


def _dynamic_threshold(x0: Array, ratio: float, maximum: float) -> Array:
    """Dynamic thresholding, arXiv:2205.11487, section 2.3, with a quantile for each batch entry."""
    quantiles = np.quantile(np.abs(x0).reshape(len(x0), -1), ratio, axis=1)
    s = np.minimum(np.maximum(quantiles, 1.0), maximum).astype(np.float32).reshape(-1, *[1] * (x0.ndim - 1))
    return np.clip(x0, -s, s) / s


def sigma_schedule(config: SchedulerConfig, sampler: str) -> str | None:
    """The name in SCHEDULES of the config's sigma schedule, if the sampler's class reads it."""
    names = ("karras", "exponential", "beta") if sampler in _READS_SIGMA_SCHEDULE else ()
    enabled = [name for name in names if config.settings.get(f"use_{name}_sigmas")]
    if sampler in ("dpmpp_2m", "dpmpp_2m_sde") and config.settings.get("use_lu_lambdas"):
        enabled.append("lu")
    return enabled[0] if enabled else None


def published_sampler(config: SchedulerConfig) -> str | None:
    """The sampler that the config was written for; None is one that this version doesn't have."""
    names = {diffusers: name for name, diffusers in CLASSES.items() if name != "dpmpp_2m_sde"}
    if config.class_name != CLASSES["dpmpp_2m"]:
        return names.get(config.class_name)
    algorithms = {"dpmsolver++": "dpmpp_2m", "sde-dpmsolver++": "dpmpp_2m_sde", "deis": "dpmpp_2m"}
    return algorithms.get(str(config.settings.get("algorithm_type", "dpmsolver++")))


def default_sampler(config: SchedulerConfig) -> str:
    """Get the sampler that a package was published with.

    Raises:
        PackageError: this version doesn't have it.
    """
    sampler = published_sampler(config)
    if sampler is None:
        algorithm = config.settings.get("algorithm_type")
        name = config.class_name if algorithm is None else f"{config.class_name} with algorithm_type {algorithm!r:.40}"
        raise PackageError(
            f"the package's scheduler {name} is not supported (supported: {', '.join(dict.fromkeys(CLASSES.values()))})"
            "; name a sampler, such as euler"
        )
    return sampler


def _betas(config: Mapping[str, Any], count: int) -> tuple[float, ...] | None:
    found = config.get("trained_betas")
    if found is None:
        return None
    betas = cast("list[Any]", found) if isinstance(found, list) else []
    is_valid = len(betas) == count and all(isinstance(beta, (int, float)) and 0 < beta <= 1 for beta in betas)
    if not is_valid or 1 in betas[:-1]:
        raise PackageError(
            f"the scheduler config's 'trained_betas' are not {count} numbers above 0 and below 1, which the last one "
            "may be; export again"
        )
    return tuple(float(beta) for beta in betas)


def parse_number(
    config: Mapping[str, Any], key: str, default: float | None, kind: type[Any], limits: tuple[float, float]
) -> Any:
    """Read a number of a scheduler config, ``kind`` int or float; absent or null is ``default``."""
    found = default if config.get(key) is None else config[key]
    if found is None:
        return None
    is_number = isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)
    if not is_number or kind(found) != found or not limits[0] <= found <= limits[1]:
        limited = "" if math.inf in limits else f" from {limits[0]:g} to {limits[1]:g}"
        whole = ", whole" if kind is int else ""
        raise PackageError(
            f"the scheduler config's '{key}' is {found!r:.40}; expected a number{limited}{whole}; export again"
        )
    return kind(found)


def unsupported_setting(key: str, found: Any, supported: tuple[Any, ...]) -> PackageError:
    """Make the error that names a setting and the values that are supported."""
    values = ", ".join(repr(value) for value in supported)
    return PackageError(f"the scheduler config's '{key}' is {found!r:.80}; supported: {values}; choose another sampler")
