"""Where each kind of scheduler class lays timesteps and noise levels: one function a kind."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

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


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """What a schedule is to be like."""

    config: SchedulerConfig
    """The package's, with the sampler's defaults."""
    steps: int
    """1 or more."""
    respaced: str | None
    """A name of SCHEDULES, or None for the class's own timesteps."""
    sigmas: Sigmas | None
    """(steps,): levels to take as they are, a closing 0 left out."""
    timesteps: Sigmas | None
    """(steps,): timesteps to take as they are."""
    trained: Sigmas
    """(num_train_timesteps,): the noise levels of training, lowest first."""

    @property
    def train(self) -> int:
        """How many timesteps the model was trained with."""
        return self.config.num_train_timesteps

    @property
    def last_sigma(self) -> float:
        """Where the walk ends for classes that read ``final_sigmas_type``."""
        ends_low = self.config.final_sigmas_type == "sigma_min" and self.sigmas is None
        return float(self.trained[0]) if ends_low else 0.0


def sigma_space(wish: ScheduleSpec, last: float = 0.0) -> Schedule:
    """k-diffusion's samplers: sigmas between those trained with are interpolated."""
    spacing = wish.config.timestep_spacing or "linspace"
    timesteps = _spaced(wish, spacing, whole=False)
    at = np.interp(timesteps, np.arange(wish.train), wish.trained)
    timesteps, sigmas = _laid(wish, timesteps, at, float(at[-1]), float(at[0]))
    return _plain(
        wish, timesteps, round_to_float32(np.append(sigmas, last)), _k_scale(spacing, sigmas), final_scale=1.0
    )


def _k_scale(spacing: str, sigmas: Sigmas) -> float:
    highest = float(round_to_float32(sigmas).max())
    return math.hypot(highest, 1.0) if spacing == "leading" else highest


def euler(wish: ScheduleSpec) -> Schedule:
    """Euler: as the others in sigmas, but it has settings of its own."""
    settings = wish.config.settings
    chosen = wish.respaced is not None or wish.sigmas is not None or wish.timesteps is not None
    if settings.get("interpolation_type") == "log_linear" and not (
        chosen and wish.respaced not in SIGMA_RANGE_SCHEDULES
    ):
        made = _log_linear(wish)
    else:
        made = sigma_space(wish, wish.last_sigma)
    if settings.get("timestep_type") == "continuous" and wish.config.prediction_type == "v_prediction":
        return replace(made, timesteps=0.25 * np.log(made.sigmas[:-1]))  # arXiv:2206.00364, table 1, VP of c_noise
    return made


def _log_linear(wish: ScheduleSpec) -> Schedule:
    """Levels even in log(sigma) beside timesteps that know nothing of it; the walk ends at the lowest level."""
    spacing = wish.config.timestep_spacing or "linspace"
    timesteps = _spaced(wish, spacing, whole=False)
    lowest, highest = float(wish.trained[0]), float(wish.trained[-1])
    sigmas = SIGMA_RANGE_SCHEDULES["exponential"](lowest, highest, wish.steps + 1)
    if wish.respaced is not None:
        timesteps, sigmas = _laid(wish, timesteps, sigmas, lowest, highest)
        sigmas = np.append(sigmas, wish.last_sigma)
    return _plain(wish, timesteps, round_to_float32(sigmas), _k_scale(spacing, sigmas), final_scale=1.0)


def dpm2(wish: ScheduleSpec) -> Schedule:
    """DPM2: as the others in sigmas, but Karras levels are told to the model as whole timesteps."""
    made = sigma_space(wish)
    return replace(made, timesteps=np.round(made.timesteps)) if wish.respaced == "karras" else made


def lms(wish: ScheduleSpec) -> Schedule:
    """LMS: as the others in sigmas, but its Karras levels know no ``sigma_min`` and ``sigma_max``."""
    if wish.respaced != "karras":
        return sigma_space(wish)
    settings = {key: value for key, value in wish.config.settings.items() if key not in ("sigma_min", "sigma_max")}
    return sigma_space(replace(wish, config=replace(wish.config, settings=settings)))


def dpm_solver(wish: ScheduleSpec) -> Schedule:
    """DPM-Solver++: like the others in whole timesteps, but spaced as if there were one step more."""
    config, steps = wish.config, wish.steps
    spacing = config.timestep_spacing or "linspace"
    highest = _clipped(wish)
    if wish.timesteps is not None:
        timesteps = wish.timesteps
    elif spacing == "linspace":
        timesteps = np.round(np.linspace(0, highest - 1, steps + 1))[::-1][:-1]
    elif spacing == "leading":
        timesteps = (np.arange(steps + 1) * (highest // (steps + 1)))[::-1][:-1].astype(float) + config.steps_offset
    else:
        timesteps = np.round(np.arange(highest, 0, -wish.train / steps)) - 1
    at = np.interp(timesteps, np.arange(wish.train), wish.trained)
    timesteps, sigmas = _laid(wish, timesteps, at, float(wish.trained[0]), float(wish.trained[-1]))
    if wish.respaced in ("karras", "lu") and config.beta_schedule != "squaredcos_cap_v2":
        timesteps = np.round(timesteps)
    elif wish.respaced in SIGMA_RANGE_SCHEDULES:
        timesteps = np.trunc(timesteps)
    sigmas = round_to_float32(np.append(sigmas, wish.last_sigma))
    return _plain(wish, timesteps, sigmas, math.hypot(sigmas[0], 1.0), 1.0 / math.hypot(sigmas[-1], 1.0))


def _clipped(wish: ScheduleSpec) -> int:
    """How many timesteps are left below ``lambda_min_clipped``, which cosine schedules are published with."""
    lowest = float(wish.config.settings.get("lambda_min_clipped", -math.inf))
    return wish.train - int(np.searchsorted(-np.log(wish.trained[::-1]), lowest))


def unipc(wish: ScheduleSpec) -> Schedule:
    """UniPC: as DPM-Solver++, but it rounds Karras timesteps always and clips nothing."""
    settings = {key: value for key, value in wish.config.settings.items() if key != "lambda_min_clipped"}
    made = dpm_solver(replace(wish, config=replace(wish.config, settings=settings)))
    if wish.respaced == "karras":
        made = replace(made, timesteps=np.round(sigma_to_t(made.sigmas[:-1], wish.trained)))
    if wish.respaced in SIGMA_RANGE_SCHEDULES and wish.config.final_sigmas_type == "sigma_min":
        sigmas = np.append(made.sigmas[:-1], made.sigmas[-2])
        made = _plain(wish, made.timesteps, sigmas, made.init_scale, 1.0 / math.hypot(sigmas[-1], 1.0))
    return made


def deis(wish: ScheduleSpec) -> Schedule:
    """DEIS: it always stops at the lowest level."""
    return unipc(replace(wish, config=replace(wish.config, final_sigmas_type="sigma_min")))


def ddim(wish: ScheduleSpec) -> Schedule:
    """DDIM: each step goes down by the same number of timesteps, whatever comes next."""
    timesteps = _spaced(wish, wish.config.timestep_spacing or "leading", whole=True)
    clean = wish.config.set_alpha_to_one in (None, True)
    if wish.timesteps is None:
        targets = _lower(wish, timesteps, ends_clean=clean)
    else:
        targets = np.append(_at(wish, timesteps)[1:], 0.0 if clean else wish.trained[0])
    return _whole_steps(wish, timesteps, targets)


def pndm(wish: ScheduleSpec) -> Schedule:
    """PNDM without Runge-Kutta steps: whichever step is the first is taken twice, hence the sources."""
    timesteps = _spaced(wish, wish.config.timestep_spacing or "leading", whole=True)
    targets = _lower(wish, timesteps, ends_clean=bool(wish.config.set_alpha_to_one))
    made = _whole_steps(wish, timesteps, targets)
    above = _at(wish, timesteps[1:] + wish.train // wish.steps)
    return replace(made, sources=np.append(above, made.sigmas[-2]))


def ddpm(wish: ScheduleSpec) -> Schedule:
    """DDPM: from each timestep to the next, and from the last to none."""
    timesteps = _spaced(wish, wish.config.timestep_spacing or "leading", whole=True)
    return _whole_steps(wish, timesteps, np.append(_at(wish, timesteps)[1:], 0.0))


def lcm(wish: ScheduleSpec) -> Schedule:
    """LCM: every so many of the timesteps of distillation, from the last."""
    timesteps = _distilled(wish)
    return _whole_steps(wish, timesteps, np.append(_at(wish, timesteps)[1:], 0.0))


def tcd(wish: ScheduleSpec) -> Schedule:
    """TCD: as LCM, but the last step is to timestep 0."""
    timesteps = _distilled(wish)
    return _whole_steps(wish, timesteps, np.append(_at(wish, timesteps)[1:], wish.trained[0]))


def _distilled(wish: ScheduleSpec) -> Sigmas:
    if wish.timesteps is not None:
        return wish.timesteps
    count = int(wish.config.settings.get("original_inference_steps", 50))
    if wish.steps > count:
        raise RequestError(f"the model was distilled to {count} steps; take at most as many, or another sampler")
    taught = (np.arange(1, count + 1) * (wish.train // count) - 1)[::-1].astype(float)
    return taught[np.floor(np.linspace(0, count, wish.steps, endpoint=False)).astype(int)]


KINDS: Mapping[str, Callable[[ScheduleSpec], Schedule]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "deis": deis,
    "dpm2": dpm2,
    "dpm2_ancestral": dpm2,
    "dpmpp_2m": dpm_solver,
    "dpmpp_2m_sde": dpm_solver,
    "dpmpp_2s_ancestral": sigma_space,
    "dpmpp_3m_sde": sigma_space,
    "dpmpp_sde": sigma_space,
    "euler": euler,
    "euler_ancestral": sigma_space,
    "heun": sigma_space,
    "ipndm": sigma_space,
    "lcm": lcm,
    "lms": lms,
    "pndm": pndm,
    "restart": sigma_space,
    "tcd": tcd,
    "unipc": unipc,
}
"""For each sampler."""


def _spaced(wish: ScheduleSpec, spacing: str, *, whole: bool) -> Sigmas:
    """Timesteps, highest first: table 2 of arXiv:2305.08891."""
    train, steps = wish.train, wish.steps
    if wish.timesteps is not None:
        return wish.timesteps
    if spacing == "linspace":
        even = np.linspace(0, train - 1, steps)[::-1]
        return np.round(even) if whole else even
    if spacing == "leading":
        return (np.arange(steps) * (train // steps))[::-1].astype(float) + wish.config.steps_offset
    return np.round(np.arange(train, 0, -train / steps)) - 1


def _laid(wish: ScheduleSpec, timesteps: Sigmas, at: Sigmas, lowest: float, highest: float) -> tuple[Sigmas, Sigmas]:
    """Timesteps and sigmas after the wish; ``timesteps`` and the levels ``at`` them where it has none."""
    if wish.sigmas is not None:
        return sigma_to_t(wish.sigmas, wish.trained), wish.sigmas
    if wish.respaced is not None and wish.respaced in TIMESTEP_SCHEDULES:
        chosen = TIMESTEP_SCHEDULES[wish.respaced](wish.trained, wish.steps)
        return chosen, t_to_sigma(chosen, wish.trained)
    if wish.respaced is not None:
        if wish.respaced != "lu":
            low, high = (wish.config.settings.get(key) for key in ("sigma_min", "sigma_max"))
            lowest, highest = (lowest if low is None else float(low)), (highest if high is None else float(high))
        sigmas = SIGMA_RANGE_SCHEDULES[wish.respaced](lowest, highest, wish.steps)
        return sigma_to_t(sigmas, wish.trained), sigmas
    return timesteps, at


def _plain(wish: ScheduleSpec, timesteps: Sigmas, sigmas: Sigmas, init_scale: float, final_scale: float) -> Schedule:
    """A schedule whose every step ends where the next begins."""
    return Schedule(
        timesteps=timesteps,
        sigmas=sigmas,
        targets=sigmas[1:],
        sources=sigmas[:-1],
        prediction_type=wish.config.prediction_type,
        init_scale=init_scale,
        final_scale=final_scale,
        trained=wish.trained,
    )


def _whole_steps(wish: ScheduleSpec, timesteps: Sigmas, targets: Sigmas) -> Schedule:
    """A schedule of variance-preserving states at whole timesteps."""
    sigmas = np.append(_at(wish, timesteps), targets[-1])
    made = _plain(wish, timesteps, sigmas, math.hypot(sigmas[0], 1.0), 1.0 / math.hypot(sigmas[-1], 1.0))
    silent = wish.config.terminal_alpha == NO_SIGNAL and timesteps[0] == wish.train - 1
    if silent and wish.config.prediction_type == "epsilon":
        raise PackageError(
            "the scheduler config's 'rescale_betas_zero_snr' leaves no signal to an 'epsilon' model at its last "
            "timestep; take euler, or spacing leading"
        )
    return replace(made, targets=targets)


def _lower(wish: ScheduleSpec, timesteps: Sigmas, *, ends_clean: bool) -> Sigmas:
    """Sigmas a step's length below timesteps; below the lowest it is zero, or the lowest one trained with."""
    lower = timesteps - wish.train // wish.steps
    return np.where(lower >= 0, _at(wish, np.maximum(lower, 0)), 0.0 if ends_clean else wish.trained[0])


def _at(wish: ScheduleSpec, timesteps: Sigmas) -> Sigmas:
    highest = wish.train - 1
    if len(timesteps) > 0 and timesteps.max() > highest:
        raise RequestError(
            f"these steps begin at timestep {timesteps.max():.0f}, above the last one trained with ({highest}); "
            "take fewer steps or another sampler"
        )
    return wish.trained[timesteps.astype(int)]
