"""The samplers by name: sdonnx', diffusers', AUTOMATIC1111's and ComfyUI's.

Each is a generator ``sampler(denoise, x, schedule, noise, **options)`` over states x = x0 + sigma * noise,
(B, C, h, w) in float32, and yields a `Step` after each step. To cancel, stop iterating.
"""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, cast

from sdonnx_runtime.errors import PackageError, RequestError
from sdonnx_runtime.sampling import multistep, single_step
from sdonnx_runtime.sampling.scheduler_config import (
    CLASSES,
    PUBLISHED_NAMES,
    SchedulerConfig,
    clip_or_threshold_x0,
)
from sdonnx_runtime.sampling.sigmas import SCHEDULES
from sdonnx_runtime.sampling.types import Sampler, Schedule

SAMPLERS: Mapping[str, Sampler] = {
    "ddim": single_step.ddim, "ddpm": single_step.ddpm, "deis": multistep.deis, "dpm2": single_step.dpm2,
    "dpm2_ancestral": single_step.dpm2_ancestral, "dpmpp_2m": multistep.dpmpp_2m,
    "dpmpp_2m_sde": multistep.dpmpp_2m_sde, "dpmpp_2s_ancestral": single_step.dpmpp_2s_ancestral,
    "dpmpp_3m_sde": multistep.dpmpp_3m_sde, "dpmpp_sde": single_step.dpmpp_sde, "euler": single_step.euler,
    "euler_ancestral": single_step.euler_ancestral, "heun": single_step.heun, "ipndm": multistep.ipndm,
    "lcm": single_step.lcm, "lms": multistep.lms, "pndm": multistep.pndm, "restart": single_step.restart,
    "tcd": single_step.tcd, "unipc": multistep.unipc,
}  # fmt: skip

A1111_NAMES = {sampler: name for sampler, (name, _) in PUBLISHED_NAMES.items()}
"""AUTOMATIC1111's names of the samplers."""

_OTHER_NAMES = {
    "dpm_2": "dpm2", "dpm_2_ancestral": "dpm2_ancestral", "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_3m_sde_gpu": "dpmpp_3m_sde", "dpmpp_sde_gpu": "dpmpp_sde", "uni_pc": "unipc", "uni_pc_bh2": "unipc",
    "DPMSolverSDEScheduler": "dpmpp_sde", "IPNDMScheduler": "ipndm",
}  # fmt: skip
"""ComfyUI's names, and diffusers' classes that differ from the sampler in their noise or timesteps."""

MAX_CHURN = 1000
"""The highest ``s_churn`` and ``s_noise``: far above any use, and far below overflow."""

_SCHEDULE_NAMES = {**{name: name for name in SCHEDULES}, "align your steps": "ays", "sgm uniform": "sgm_uniform"}
"""The schedules that a sampler's name may end in: sdonnx' and AUTOMATIC1111's names."""


def resolve_sampler(name: str) -> tuple[str, str | None]:
    """Resolve a name such as "DPM++ 2M Karras" to a key of SAMPLERS and a name of SCHEDULES or None.

    Raises:
        RequestError: it is not a sampler's name; the message has the nearest one.
    """
    known = {key.lower(): key for key in SAMPLERS}
    known |= {diffusers.lower(): key for key, diffusers in CLASSES.items() if key != "dpmpp_2m_sde"}
    known |= {shown.lower(): key for key, shown in A1111_NAMES.items()}
    known |= {other.lower(): key for other, key in _OTHER_NAMES.items()}
    lower = " ".join(str(name).lower().split())
    if lower in known:
        return known[lower], None
    for ending, schedule in _SCHEDULE_NAMES.items():
        base = lower.removesuffix(f" {ending}")
        if base != lower and base in known:
            return known[base], schedule
    nearest = difflib.get_close_matches(lower, known, n=1, cutoff=0.5)
    hint = f"did you mean {known[nearest[0]]}? " if nearest else ""
    raise RequestError(f"there is no sampler '{name}'; {hint}choose from {', '.join(SAMPLERS)}")


def sampler_options(
    config: SchedulerConfig,
    sampler: str,
    *,
    eta: float | None = None,
    s_churn: float | None = None,
    s_noise: float | None = None,
) -> dict[str, Any]:
    """Get a sampler's keyword arguments from a package's scheduler config and a request.

    ``eta``, 0 to 1, is the noise added per step, for `tcd` its gamma; ``s_churn``, 0 to MAX_CHURN, the noise added
    over all of euler's steps; ``s_noise``, 0 to MAX_CHURN, the factor of added noise. None is the sampler's default.

    Raises:
        RequestError: the sampler doesn't support an option, or it is out of range.
        PackageError: the sampler doesn't support a setting of the config.
    """
    config = config.for_sampler(sampler, overridden=("timestep_spacing",))
    options = {"eta": eta, "s_churn": s_churn, "s_noise": s_noise}
    return _settings(config, sampler) | {
        name: _in_range(sampler, name, value) for name, value in options.items() if value is not None
    }


def num_sampler_steps(sampler: str, schedule: Schedule, options: Mapping[str, Any]) -> int:
    """Count the steps that a sampler yields; `restart` repeats some of the schedule's."""
    if sampler == "restart":
        return len(single_step.restart_indices(schedule, options.get("restarts", 1)))
    return schedule.steps


def has_option(sampler: str, option: str) -> bool:
    """Whether a sampler has an option of this name."""
    return option in inspect.signature(SAMPLERS[sampler]).parameters


def _in_range(sampler: str, name: str, value: object) -> float:
    if not has_option(sampler, name):
        samplers = ", ".join(key for key in SAMPLERS if has_option(key, name))
        raise RequestError(f"{sampler} does not support {name} (supported by: {samplers})")
    maximum = 1 if name == "eta" else MAX_CHURN
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= maximum:
        raise RequestError(f"{name} is {value!r}; give a number from 0 to {maximum}")
    return float(value)


def _settings(config: SchedulerConfig, sampler: str) -> dict[str, Any]:
    """Get the keyword arguments that the config sets."""
    found = config.settings
    if sampler == "ddim":
        return {"limit": clip_or_threshold_x0(config, sampler)}
    if sampler == "ddpm":
        return {"variance": "fixed_large" if found.get("variance_type") == "fixed_large" else "fixed_small"}
    if sampler == "lcm":
        return {"timestep_scaling": config.number("timestep_scaling", 10.0)}
    if sampler == "pndm":
        return {"runge_kutta": not found.get("skip_prk_steps", False)}
    if sampler not in ("deis", "dpmpp_2m", "dpmpp_2m_sde", "unipc"):
        return {}
    solver, kind = {"order": found.get("solver_order", 2)}, found.get("solver_type")
    options = solver | {"lower_order_final": found.get("lower_order_final", True)}
    if sampler == "deis":
        return options
    if sampler == "unipc":
        return options | {"variant": "bh1" if kind == "bh1" else "bh2", "disable_corrector": _disable_corrector(config)}
    ends = {"euler_at_final": bool(found.get("euler_at_final", False))}
    return options | ends | {"solver_type": "heun" if kind == "heun" else "midpoint"}


def _disable_corrector(config: SchedulerConfig) -> tuple[int, ...]:
    found: Any = config.settings.get("disable_corrector") or []
    if not isinstance(found, list) or not all(isinstance(step, int) for step in cast("list[Any]", found)):
        raise PackageError(f"the scheduler config's 'disable_corrector' is {found!r}; expected a list of steps")
    return tuple(cast("list[int]", found))
