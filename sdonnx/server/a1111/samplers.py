"""AUTOMATIC1111's names of samplers and schedules."""

import difflib
from collections.abc import Mapping
from typing import Any

from sdonnx_runtime.outputs.metadata import A1111_SCHEDULES
from sdonnx_runtime.packages.manifest import Manifest
from sdonnx_runtime.sampling.registry import A1111_NAMES, resolve_sampler
from sdonnx_runtime.sampling.scheduler_config import SchedulerConfig, default_sampler

import sdonnx
from sdonnx.server.errors import NotFound
from sdonnx.server.infotext import find_schedule

ALIASES: Mapping[str, tuple[str, ...]] = {
    "ddim": ("k_ddim",), "dpm2": ("k_dpm_2", "k_dpm2"), "dpm2_ancestral": ("k_dpm_2_a", "k_dpm_2_ancestral"),
    "dpmpp_2m": ("k_dpmpp_2m",), "dpmpp_2m_sde": ("k_dpmpp_2m_sde",), "dpmpp_2s_ancestral": ("k_dpmpp_2s_a",),
    "dpmpp_3m_sde": ("k_dpmpp_3m_sde",), "dpmpp_sde": ("k_dpmpp_sde",), "euler": ("k_euler",),
    "euler_ancestral": ("k_euler_a", "k_euler_ancestral"), "heun": ("k_heun",), "lcm": ("k_lcm",), "lms": ("k_lms",),
    "pndm": ("plms", "k_plms"),
}  # fmt: skip
"""Older names, which some clients still send."""

AUTOMATIC = "automatic"
"""What stands for the model's own sampler or schedule."""

_BY_ALIAS = {alias: sampler for sampler, aliases in ALIASES.items() for alias in aliases}

_KARRAS_ALIAS = "_ka"
"""How an older name ends with Karras' schedule."""


def find_sampler(name: str | None) -> tuple[str | None, str | None]:
    """Find a sampler, and the schedule that its name ends in; each is None where the model's own is meant.

    Raises:
        NotFound: there is none of this name; the message has the nearest ones.
    """
    lower = " ".join((name or "").lower().split()).removesuffix(f" {AUTOMATIC}")
    if lower in ("", AUTOMATIC):
        return None, None
    if lower in _BY_ALIAS:
        return _BY_ALIAS[lower], None
    if lower.removesuffix(_KARRAS_ALIAS) in _BY_ALIAS:
        return _BY_ALIAS[lower.removesuffix(_KARRAS_ALIAS)], "karras"
    try:
        return resolve_sampler(lower)
    except sdonnx.RequestError:
        known = {shown.lower(): shown for shown in A1111_NAMES.values()}
        near = difflib.get_close_matches(lower[:100], known, n=3, cutoff=0.3) or list(known)
        names = ", ".join(known[each] for each in near)
        raise NotFound(f"Sampler not found: {lower[:100]!r}; the nearest are {names}") from None


def find_scheduler(name: str | None, family: str) -> str | None:
    """Find a schedule by AUTOMATIC1111's name or label; None is the model's own.

    Raises:
        NotFound: there is none of this name.
    """
    if (name or "").strip().lower() in ("", AUTOMATIC):
        return None
    found = find_schedule(name or "", family)
    if found is None:
        labels = ", ".join(each["name"] for each in schedulers())
        raise NotFound(f"Scheduler not found: {(name or '')[:100]!r}; choose {labels}")
    return found


def own_sampler(manifest: Manifest) -> str:
    """The sampler of a model where a request names none."""
    return manifest.defaults.sampler or default_sampler(SchedulerConfig.from_dict(manifest.scheduler))


def samplers() -> list[dict[str, Any]]:
    """List the samplers, as ``/samplers`` does."""
    return [
        {"name": shown, "aliases": [sampler, *ALIASES.get(sampler, ())], "options": {}}
        for sampler, shown in A1111_NAMES.items()
    ]


def schedulers() -> list[dict[str, Any]]:
    """List the schedules, as ``/schedulers`` does."""
    labels = {AUTOMATIC: "Automatic"} | {key: each for key, each in A1111_SCHEDULES.items() if key != "ays_sdxl"}
    return [
        {
            "name": "align_your_steps" if key == "ays" else key,
            "label": label,
            "aliases": None,
            "default_rho": 7.0 if key == "karras" else -1,
            "need_inner_model": False,
        }
        for key, label in labels.items()
    ]
