"""A package's scheduler_config.json, and the settings that each sampler supports."""

from collections.abc import Callable, Mapping
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
    """(num_train_timesteps,): explicit betas, which go before the three above."""
    prediction_type: str
    timestep_spacing: str | None
    steps_offset: int
    set_alpha_to_one: bool | None
    final_sigmas_type: str
    settings: Mapping[str, Any]
    """The whole JSON, for keys of one class."""
    terminal_alpha: float | None = None
    """alphas_cumprod of the last timestep with zero terminal SNR; None is not rescaled."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "SchedulerConfig":
        """Parse the JSON as published.

        An absent key gets the default of the sampler's class later, as with diffusers' ``from_config``.

        Raises:
            PackageError: no sampler supports a value.
        """
        for key, supported in _CHOICES.items():
            if key in config and config[key] not in supported:
                raise unsupported_setting(key, config[key], supported)
        return cls(
            class_name=str(config.get("_class_name", "PNDMScheduler")),
            num_train_timesteps=_number(config, "num_train_timesteps", 1000, int),
            beta_start=_number(config, "beta_start", None, float),
            beta_end=_number(config, "beta_end", None, float),
            beta_schedule=config.get("beta_schedule"),
            trained_betas=_betas(config),
            prediction_type=str(config.get("prediction_type", "epsilon")),
            timestep_spacing=config.get("timestep_spacing"),
            steps_offset=_number(config, "steps_offset", 0, int),
            set_alpha_to_one=config.get("set_alpha_to_one"),
            final_sigmas_type=str(config.get("final_sigmas_type", "zero")),
            settings=config,
        )

    def for_sampler(self, sampler: str) -> "SchedulerConfig":
        """Fill in the defaults of the sampler's class, and its terminal alpha."""
        schedule, start, end = _BETAS.get(sampler, ("linear", 0.0001, 0.02))
        rescaled = sampler not in _NEVER_RESCALED and self.settings.get("rescale_betas_zero_snr")
        return replace(
            self,
            beta_schedule=schedule if self.beta_schedule is None else self.beta_schedule,
            beta_start=start if self.beta_start is None else self.beta_start,
            beta_end=end if self.beta_end is None else self.beta_end,
            terminal_alpha=(NO_SIGNAL if sampler in WHOLE_TIMESTEPS else 2.0**-24) if rescaled else None,
        )


NO_SIGNAL = 2.0**-60
"""Replaces an alpha of 0, whose sigma is infinite; classes in terms of sigma use 2**-24, as in diffusers."""

_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "set_alpha_to_one": (False, True),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}

_MULTISTEP = {"lower_order_final": (True, False), "solver_order": (2, 1, 3), "use_flow_sigmas": (False, None)}
_DPM_SOLVER: Mapping[str, tuple[Any, ...]] = {
    **_MULTISTEP,
    "euler_at_final": (False, True),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),  # the last three belong to other classes
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),  # not learned
}
_SUPPORTED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "ddpm": {"variance_type": ("fixed_small", "fixed_small_log", "fixed_large", None)},
    "deis": _MULTISTEP,
    "dpmpp_2m": {**_DPM_SOLVER, "algorithm_type": ("dpmsolver++", "deis")},  # the latter belongs to another class
    "dpmpp_2m_sde": {**_DPM_SOLVER, "solver_order": (2, 1)},
    "euler": {"interpolation_type": ("linear", "log_linear"), "timestep_type": ("discrete", "continuous")},
    "pndm": {"skip_prk_steps": (True,)},
    "unipc": {
        **_MULTISTEP,
        "predict_x0": (True,),
        "solver_p": (None,),
        "solver_type": ("bh2", "bh1", "midpoint", "heun", "logrho"),  # the last three belong to other classes
    },
}
"""The values that each sampler supports, of keys that change the image."""

_ABSENT = {("pndm", "skip_prk_steps"): False}
"""diffusers' default where an absent key doesn't mean the first value above."""

_BETAS = {
    **dict.fromkeys(("dpm2", "dpm2_ancestral", "heun"), ("linear", 0.00085, 0.012)),
    **dict.fromkeys(("lcm", "tcd"), ("scaled_linear", 0.00085, 0.012)),
}
"""diffusers' default betas, where they aren't linear from 0.0001 to 0.02."""

_NEVER_RESCALED = ("deis", "dpm2", "dpm2_ancestral", "heun", "lms", "pndm")
"""Samplers whose classes don't read ``rescale_betas_zero_snr``."""

WHOLE_TIMESTEPS = ("ddim", "ddpm", "lcm", "pndm", "tcd")
"""Samplers that evaluate the model at whole training timesteps only."""

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


def check_settings(config: SchedulerConfig, sampler: str) -> None:
    """Refuse settings that change the image and that the sampler doesn't support.

    Raises:
        PackageError: the config has such a setting.
    """
    for key, supported in _SUPPORTED.get(sampler, {}).items():
        found = config.settings.get(key, _ABSENT.get((sampler, key), supported[0]))
        if found not in supported:
            raise unsupported_setting(key, found, supported)


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
        clip_sample_range = float(settings.get("clip_sample_range", 1.0))
        return lambda x0: np.clip(x0, -clip_sample_range, clip_sample_range)
    ratio = float(settings.get("dynamic_thresholding_ratio", 0.995))
    maximum = float(settings.get("sample_max_value", 1.0))
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


def default_sampler(config: SchedulerConfig) -> str:
    """Get the sampler that a package was published with.

    Raises:
        PackageError: this version doesn't have it.
    """
    names = {diffusers: name for name, diffusers in CLASSES.items() if name != "dpmpp_2m_sde"}
    if config.class_name not in names:
        raise PackageError(
            f"the package's scheduler {config.class_name} is not supported (supported: {', '.join(names)}); "
            "choose a sampler, or export with another scheduler_config.json"
        )
    sampler = names[config.class_name]
    stochastic = sampler == "dpmpp_2m" and config.settings.get("algorithm_type") == "sde-dpmsolver++"
    return "dpmpp_2m_sde" if stochastic else sampler


def _betas(config: Mapping[str, Any]) -> tuple[float, ...] | None:
    found, count = config.get("trained_betas"), config.get("num_train_timesteps", 1000)
    if found is None:
        return None
    betas = cast("list[Any]", found) if isinstance(found, list) else []
    if len(betas) != count or not all(isinstance(beta, (int, float)) and 0 < beta < 1 for beta in betas):
        raise PackageError(f"the scheduler config's 'trained_betas' are not {count} numbers from 0 to 1; export again")
    return tuple(float(beta) for beta in betas)


def _number(config: Mapping[str, Any], key: str, default: float | None, kind: type[Any]) -> Any:
    found = config.get(key, default)
    if found is None and default is None:
        return None
    if isinstance(found, bool) or not isinstance(found, (int, float)) or kind(found) != found:
        raise PackageError(f"the scheduler config's '{key}' is {found!r}; expected a number; export again")
    return kind(found)


def unsupported_setting(key: str, found: Any, supported: tuple[Any, ...]) -> PackageError:
    """Make the error that names a setting and the values that are supported."""
    values = ", ".join(repr(value) for value in supported)
    return PackageError(f"the scheduler config's '{key}' is {found!r}; supported: {values}; choose another sampler")
