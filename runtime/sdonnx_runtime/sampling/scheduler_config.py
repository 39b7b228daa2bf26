"""What a package's scheduler_config.json says, and which of it each sampler can follow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import PackageError


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """A diffusers scheduler_config.json; None where it leaves a choice to the scheduler class."""

    class_name: str
    num_train_timesteps: int
    beta_start: float | None
    beta_end: float | None
    beta_schedule: str | None
    trained_betas: tuple[float, ...] | None
    """(num_train_timesteps,): the betas themselves, whatever the three above say."""
    prediction_type: str
    timestep_spacing: str | None
    steps_offset: int
    set_alpha_to_one: bool | None
    final_sigmas_type: str
    settings: Mapping[str, Any]
    """The whole JSON, for what concerns one class alone."""
    terminal_alpha: float | None = None
    """What is left of the signal at the last timestep, where betas are rescaled to leave none."""

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
                raise refusal(key, config[key], works)
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
        """With what the sampler's class takes where the config has nothing, and its way of rescaling betas."""
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
"""Stands for an alpha of 0, whose sigma would be infinite; classes in terms of sigma take 2**-24, as diffusers."""

_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "set_alpha_to_one": (False, True),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}

_OFF = (False, None)
_SWITCH = (False, True)
_DPM_SOLVER: Mapping[str, tuple[Any, ...]] = {
    "euler_at_final": _SWITCH,
    "lower_order_final": (True, False),
    "solver_order": (2, 1, 3),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),  # the last three belong to other classes
    "use_flow_sigmas": _OFF,
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),  # not learned
}
_ONLY: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "ddpm": {"variance_type": ("fixed_small", "fixed_small_log", "fixed_large", None)},
    "deis": {"lower_order_final": (True, False), "solver_order": (2, 1, 3), "use_flow_sigmas": _OFF},
    "dpmpp_2m": {**_DPM_SOLVER, "algorithm_type": ("dpmsolver++", "deis")},  # the latter belongs to another class
    "dpmpp_2m_sde": {**_DPM_SOLVER, "solver_order": (2, 1)},
    "euler": {"interpolation_type": ("linear", "log_linear"), "timestep_type": ("discrete", "continuous")},
    "pndm": {"skip_prk_steps": (True,)},
    "unipc": {
        "lower_order_final": (True, False),
        "predict_x0": (True,),
        "solver_order": (2, 1, 3),
        "solver_p": (None,),
        "solver_type": ("bh2", "bh1", "midpoint", "heun", "logrho"),  # the last three belong to other classes
        "use_flow_sigmas": _OFF,
    },
}
"""Keys of the classes behind the samplers, of which other values would give another picture."""

_ABSENT = {("pndm", "skip_prk_steps"): False}
"""What diffusers takes where one of these keys is absent; for the others it is the first value above."""

_K_BETAS = ("linear", 0.00085, 0.012)
_DISTILLED_BETAS = ("scaled_linear", 0.00085, 0.012)
_BETAS = {
    "dpm2": _K_BETAS,
    "dpm2_ancestral": _K_BETAS,
    "heun": _K_BETAS,
    "lcm": _DISTILLED_BETAS,
    "tcd": _DISTILLED_BETAS,
}
"""What diffusers takes where the betas are absent; for the others it is linear from 0.0001 to 0.02."""

_NEVER_RESCALED = ("deis", "dpm2", "dpm2_ancestral", "heun", "lms", "pndm")
"""Samplers whose classes don't read ``rescale_betas_zero_snr``."""

WHOLE_TIMESTEPS = ("ddim", "ddpm", "lcm", "pndm", "tcd")
"""Samplers that keep to timesteps that the model was trained with."""

_RESPACED = ("deis", "dpm2", "dpm2_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "euler", "heun", "lms", "unipc")
"""Samplers whose classes read ``use_karras_sigmas`` and its like."""

CLASSES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_ancestral": "KDPM2AncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "tcd": "TCDScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""diffusers' class for each sampler that it has."""


def check_settings(config: SchedulerConfig, sampler: str) -> None:
    """Refuses what would change the pictures and can't be followed.

    Raises:
        PackageError: the config has such a setting.
    """
    for key, works in _ONLY.get(sampler, {}).items():
        found = config.settings.get(key, _ABSENT.get((sampler, key), works[0]))
        if found not in works:
            raise refusal(key, found, works)


_LIMITED: Mapping[str, tuple[str, ...]] = {
    "ddim": ("thresholding", "clip_sample"),
    "ddpm": ("thresholding", "clip_sample"),
    "deis": ("thresholding",),
    "dpmpp_2m": ("thresholding",),
    "dpmpp_2m_sde": ("thresholding",),
    "heun": ("clip_sample",),
    "lcm": ("thresholding", "clip_sample"),
    "unipc": ("thresholding",),
}
"""Which of the two settings each class reads; the first that is set counts."""


def clip_or_threshold_x0(config: SchedulerConfig, sampler: str) -> Callable[[Array], Array] | None:
    """What a config wants every predicted x0, (B, ...), to be put through; None where it is left as it is.

    `ddim` is given this among its options and wants it nowhere else.
    """
    settings = config.settings
    clips = settings.get("clip_sample", sampler in ("ddim", "ddpm"))
    asked = [key for key in _LIMITED.get(sampler, ()) if (clips if key == "clip_sample" else settings.get(key))]
    if not asked:
        return None
    if asked[0] == "clip_sample":
        clip_sample_range = float(settings.get("clip_sample_range", 1.0))
        return lambda x0: np.clip(x0, -clip_sample_range, clip_sample_range)
    ratio = float(settings.get("dynamic_thresholding_ratio", 0.995))
    most = float(settings.get("sample_max_value", 1.0))
    return lambda x0: _dynamic_threshold(x0, ratio, most)


def _dynamic_threshold(x0: Array, ratio: float, most: float) -> Array:
    """Dynamic thresholding, arXiv:2205.11487, section 2.3: each of the batch by its own quantile."""
    sizes = np.quantile(np.abs(x0).reshape(len(x0), -1), ratio, axis=1)
    clip_sample_range = np.minimum(np.maximum(sizes, 1.0), most).astype(np.float32).reshape(-1, *[1] * (x0.ndim - 1))
    return np.clip(x0, -clip_sample_range, clip_sample_range) / clip_sample_range


def sigma_schedule(config: SchedulerConfig, sampler: str) -> str | None:
    """The key of RESPACED that the config asks for, where the sampler's class listens."""
    names = ("karras", "exponential", "beta") if sampler in _RESPACED else ()
    asked = [name for name in names if config.settings.get(f"use_{name}_sigmas")]
    if sampler in ("dpmpp_2m", "dpmpp_2m_sde") and config.settings.get("use_lu_lambdas"):
        asked.append("lu")
    return asked[0] if asked else None


def default_sampler(config: SchedulerConfig) -> str:
    """The sampler that a package was published with.

    Raises:
        PackageError: it is one that this version doesn't have.
    """
    names = {diffusers: name for name, diffusers in CLASSES.items() if name != "dpmpp_2m_sde"}
    if config.class_name not in names:
        raise PackageError(
            f"the package's scheduler is {config.class_name}; this version has {', '.join(names)}: "
            "name a sampler, or export with another scheduler_config.json"
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


def refusal(key: str, found: Any, works: tuple[Any, ...]) -> PackageError:
    """Says which setting can't be followed and what could be."""
    listed = " or ".join(repr(value) for value in works)
    return PackageError(
        f"the scheduler config's '{key}' is {found!r}; what works here is {listed}; choose another sampler"
    )
