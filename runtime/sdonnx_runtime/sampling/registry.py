"""The samplers by name: ours, diffusers' classes', AUTOMATIC1111's and ComfyUI's.

Each is a generator ``sampler(denoise, x, schedule, noise, **options)`` over states x = x0 + sigma * noise,
(B, C, h, w) in float32, and yields a `Step` after each of its steps. Whoever stops iterating has cancelled.
"""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import PackageError, RequestError
from sdonnx_runtime.sampling.multistep import deis, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, ipndm, lms, pndm, unipc
from sdonnx_runtime.sampling.scheduler_config import CLASSES, SchedulerConfig, check_settings, clip_or_threshold_x0
from sdonnx_runtime.sampling.sigmas import SCHEDULES
from sdonnx_runtime.sampling.single_step import (
    ddim,
    ddpm,
    dpm2,
    dpm2_ancestral,
    dpmpp_2s_ancestral,
    dpmpp_sde,
    euler,
    euler_ancestral,
    heun,
    lcm,
    restart,
    tcd,
)
from sdonnx_runtime.sampling.types import Sampler, Schedule

SAMPLERS: Mapping[str, Sampler] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "deis": deis,
    "dpm2": dpm2,
    "dpm2_ancestral": dpm2_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "dpmpp_sde": dpmpp_sde,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "ipndm": ipndm,
    "lcm": lcm,
    "lms": lms,
    "pndm": pndm,
    "restart": restart,
    "tcd": tcd,
    "unipc": unipc,
}

A1111_NAMES = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "deis": "DEIS",
    "dpm2": "DPM2",
    "dpm2_ancestral": "DPM2 a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "ipndm": "IPNDM",
    "lcm": "LCM",
    "lms": "LMS",
    "pndm": "PLMS",
    "restart": "Restart",
    "tcd": "TCD",
    "unipc": "UniPC",
}
"""What AUTOMATIC1111's web UI, and so everything that reads its recipes, calls our samplers."""

_OTHER_NAMES = {
    "dpm_2": "dpm2",
    "dpm_2_ancestral": "dpm2_ancestral",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_3m_sde_gpu": "dpmpp_3m_sde",
    "dpmpp_sde_gpu": "dpmpp_sde",
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "IPNDMScheduler": "ipndm",
}
"""ComfyUI's, and diffusers' classes that differ from our sampler in their noise or their timesteps."""

MAX_CHURN = 1000
"""The most of ``s_churn`` and ``s_noise``: far beyond any use, and far below where the arithmetic overflows."""

_SCHEDULE_NAMES = {
    **{name: name for name in SCHEDULES},
    "align your steps": "ays",
    "sgm uniform": "sgm_uniform",
}
"""What a sampler's name may end in: ours and AUTOMATIC1111's."""


def resolve_sampler(name: str) -> tuple[str, str | None]:
    """The key of SAMPLERS that ``name`` is, and the name of SCHEDULES that it ends in ("DPM++ 2M Karras").

    Raises:
        RequestError: it is no sampler's name; the nearest is offered.
    """
    known = {key.lower(): key for key in SAMPLERS}
    known |= {diffusers.lower(): key for key, diffusers in CLASSES.items() if key != "dpmpp_2m_sde"}
    known |= {shown.lower(): key for key, shown in A1111_NAMES.items()}
    known |= {other.lower(): key for other, key in _OTHER_NAMES.items()}
    asked = " ".join(str(name).lower().split())
    if asked in known:
        return known[asked], None
    for ending, schedule in _SCHEDULE_NAMES.items():
        if asked.removesuffix(f" {ending}") != asked and asked.removesuffix(f" {ending}") in known:
            return known[asked.removesuffix(f" {ending}")], schedule
    nearest = difflib.get_close_matches(asked, known, n=1, cutoff=0.5)
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
    """The keyword arguments for a sampler, after a package's scheduler config and a request.

    Args:
        config: the package's.
        sampler: a key of SAMPLERS.
        eta: 0 to 1, how much noise comes in with each step; for `tcd` it is gamma. None is the sampler's own.
        s_churn: 0 to MAX_CHURN, how much noise comes in with all of euler's steps.
        s_noise: 0 to MAX_CHURN, what noise that comes in is multiplied by.

    Raises:
        RequestError: the sampler takes no such option, or it is out of its range.
        PackageError: the config has a setting that the sampler can't follow.
    """
    check_settings(config, sampler)
    asked = {"eta": eta, "s_churn": s_churn, "s_noise": s_noise}
    return _settings(config, sampler) | {
        name: _in_range(sampler, name, value) for name, value in asked.items() if value is not None
    }


def steps_taken(sampler: str, schedule: Schedule, options: Mapping[str, Any]) -> int:
    """How many steps the sampler takes of a schedule; `restart` takes some of them again.

    Found by beginning a walk of a single number.
    """
    one = np.zeros((1, 1, 1, 1), np.float32)

    def denoise(x: Array, _sigma: float, _t: float) -> Array:
        return x

    def noise(_shape: tuple[int, ...]) -> Array:
        return one

    return next((step.total for step in SAMPLERS[sampler](denoise, one, schedule, noise, **options)), 0)


def takes(sampler: str, option: str) -> bool:
    """Whether a sampler has an option of this name."""
    return option in inspect.signature(SAMPLERS[sampler]).parameters


def _in_range(sampler: str, name: str, value: object) -> float:
    if not takes(sampler, name):
        those = ", ".join(key for key in SAMPLERS if takes(key, name))
        raise RequestError(f"{sampler} takes no {name}; these do: {those}")
    most = 1 if name == "eta" else MAX_CHURN
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most:
        raise RequestError(f"{name} is {value!r}; give a number from 0 to {most}")
    return float(value)


def _settings(config: SchedulerConfig, sampler: str) -> dict[str, Any]:
    """What the config says of the keyword arguments."""
    found = config.settings
    if sampler == "ddim":
        return {"limit": clip_or_threshold_x0(config, sampler)}
    if sampler == "ddpm":
        return {"variance": "fixed_large" if found.get("variance_type") == "fixed_large" else "fixed_small"}
    if sampler == "lcm":
        return {"timestep_scaling": float(found.get("timestep_scaling", 10.0))}
    if sampler not in ("deis", "dpmpp_2m", "dpmpp_2m_sde", "unipc"):
        return {}
    solver, kind = {"order": found.get("solver_order", 2)}, found.get("solver_type")
    options = solver | {"lower_order_final": found.get("lower_order_final", True)}
    if sampler == "deis":
        return options
    if sampler == "unipc":
        return options | {"variant": "bh1" if kind == "bh1" else "bh2", "uncorrected": _uncorrected(config)}
    ends = {"euler_at_final": bool(found.get("euler_at_final", False))}
    return options | ends | {"solver_type": "heun" if kind == "heun" else "midpoint"}


def _uncorrected(config: SchedulerConfig) -> tuple[int, ...]:
    found: Any = config.settings.get("disable_corrector") or []
    if not isinstance(found, list) or not all(isinstance(step, int) for step in cast("list[Any]", found)):
        raise PackageError(f"the scheduler config's 'disable_corrector' is {found!r}; expected a list of steps")
    return tuple(cast("list[int]", found))
