"""What a package's scheduler_config.json says, and which of it each sampler can follow."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sdonnx_runtime.errors import PackageError


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """A diffusers scheduler_config.json; None where it leaves a choice to the scheduler class."""

    class_name: str
    num_train_timesteps: int
    beta_start: float | None
    beta_end: float | None
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
                raise refusal(key, config[key], works)
        return cls(
            class_name=str(config.get("_class_name", "PNDMScheduler")),
            num_train_timesteps=_number(config, "num_train_timesteps", 1000, int),
            beta_start=_number(config, "beta_start", None, float),
            beta_end=_number(config, "beta_end", None, float),
            beta_schedule=str(config.get("beta_schedule", "linear")),
            prediction_type=str(config.get("prediction_type", "epsilon")),
            timestep_spacing=config.get("timestep_spacing"),
            steps_offset=_number(config, "steps_offset", 0, int),
            set_alpha_to_one=config.get("set_alpha_to_one"),
            final_sigmas_type=str(config.get("final_sigmas_type", "zero")),
            settings=config,
        )

    def for_sampler(self, sampler: str) -> "SchedulerConfig":
        """With the betas that the sampler's class takes where the config has none."""
        start, end = _BETAS.get(sampler, (0.0001, 0.02))
        return replace(
            self,
            beta_start=start if self.beta_start is None else self.beta_start,
            beta_end=end if self.beta_end is None else self.beta_end,
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
_NO_FLOW: Mapping[str, tuple[Any, ...]] = {
    "rescale_betas_zero_snr": _OFF,
    "thresholding": _OFF,
    "use_flow_sigmas": _OFF,
}
_DPM_SOLVER: Mapping[str, tuple[Any, ...]] = {
    **_NO_FLOW,
    "lambda_min_clipped": (-math.inf, "-inf", "-Infinity"),
    "lower_order_final": (True,),
    "solver_order": (2,),
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # the last three belong to other classes
}
_ONLY: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "ddim": {"clip_sample": _OFF, "rescale_betas_zero_snr": _OFF, "thresholding": _OFF},
    "deis": {**_NO_FLOW, "lower_order_final": (True,), "solver_order": (2,)},
    "dpmpp_2m": {**_DPM_SOLVER, "algorithm_type": ("dpmsolver++", "deis")},  # the latter belongs to another class
    "dpmpp_2m_sde": _DPM_SOLVER,
    "euler": {
        "interpolation_type": ("linear",),
        "rescale_betas_zero_snr": _OFF,
        "sigma_max": (None,),
        "sigma_min": (None,),
        "timestep_type": ("discrete",),
    },
    "euler_ancestral": {"rescale_betas_zero_snr": _OFF},
    "heun": {"clip_sample": _OFF},
    "pndm": {"skip_prk_steps": (True,)},
    "unipc": {
        **_NO_FLOW,
        "disable_corrector": ([],),
        "lower_order_final": (True,),
        "predict_x0": (True,),
        "sigma_max": (None,),
        "sigma_min": (None,),
        "solver_order": (2,),
        "solver_type": ("bh2", "midpoint", "heun", "logrho"),  # the last three belong to other classes
    },
}
"""Keys of the classes behind the samplers, of which other values would give another picture."""

_ABSENT = {("ddim", "clip_sample"): True, ("pndm", "skip_prk_steps"): False}
"""What diffusers takes where one of these keys is absent; for the others it is the first value above."""

_BETAS = {"dpm2": (0.00085, 0.012), "dpm2_ancestral": (0.00085, 0.012), "heun": (0.00085, 0.012)}
"""What diffusers takes where the betas are absent; for the others it is 0.0001 and 0.02."""

_RESPACED = ("deis", "dpm2", "dpm2_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "euler", "heun", "lms", "unipc")
"""Samplers whose classes read ``use_karras_sigmas`` and its like."""

CLASSES = {
    "ddim": "DDIMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_ancestral": "KDPM2AncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
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


def respacing(config: SchedulerConfig, sampler: str) -> str | None:
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
