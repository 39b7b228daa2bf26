"""AUTOMATIC1111's names of samplers and schedules, and what a request says of them."""

import difflib
from collections.abc import Mapping
from typing import Any

from sdonnx_runtime.outputs.metadata import A1111_SCHEDULES
from sdonnx_runtime.packages.manifest import Manifest
from sdonnx_runtime.sampling.registry import A1111_NAMES, has_option, resolve_sampler
from sdonnx_runtime.sampling.scheduler_config import SchedulerConfig, default_sampler

import sdonnx
from sdonnx.server.a1111.fields import Generate
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

_CHURNING = ("euler", "heun", "dpm2")
"""Samplers that take ``s_churn`` at AUTOMATIC1111; it ignores it elsewhere."""

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


def read_sampling(form: Generate, replayed: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    """Read the fields of the sampler, its schedule and its noise.

    Args:
        form: the request.
        replayed: the fields of its infotext.
        manifest: of the model.

    Raises:
        NotFound: there is no such sampler or schedule.
        RequestError: a value is not supported.
    """
    fields: dict[str, Any] = {}
    if form.given & {"sampler_name", "sampler_index"}:
        fields["sampler"], ending = find_sampler(form.sampler_name or form.sampler_index)
        fields["schedule"] = find_scheduler(ending, manifest.family)
    if "scheduler" in form.given and fields.get("schedule") is None:
        fields["schedule"] = find_scheduler(form.scheduler, manifest.family)
    name: str | None = {**replayed, **fields}.get("sampler")
    sampler = own_sampler(manifest) if name is None else find_sampler(name)[0] or own_sampler(manifest)
    if form.eta is not None and has_option(sampler, "eta") and sampler != "tcd":  # whose eta is its gamma
        fields["eta"] = form.eta
    if form.s_noise not in (None, 1) and has_option(sampler, "s_noise"):
        fields["s_noise"] = form.s_noise
    if form.s_churn and sampler in _CHURNING:
        if form.s_tmin or form.s_tmax not in (None, 0):
            raise sdonnx.RequestError("s_tmin and s_tmax are not supported; leave them out, or s_churn")
        fields["s_churn"] = form.s_churn
    return fields


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
