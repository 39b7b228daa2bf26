"""Distilled packages, which take few steps and little guidance: what clients ask beyond that makes burnt images."""

import math
from collections.abc import Mapping
from typing import Any

from sdonnx_runtime.packages.manifest import Manifest

_FEW_STEPS = 12
"""The most that a distilled model takes by default."""


def is_distilled(manifest: Manifest) -> bool:
    """Whether a model was made for few steps, without classifier-free guidance."""
    defaults, embeds_guidance = manifest.defaults, manifest.conditions.guidance_width is not None
    return defaults.guidance_scale in (0, 1) or (embeds_guidance and defaults.num_inference_steps <= _FEW_STEPS)


def cap_distilled(manifest: Manifest, fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Lower the steps and the guidance of a request to what suits a distilled model.

    Clients can't know what model they get, and most send 20 steps and guidance 7 with every request.

    Args:
        manifest: the model's.
        fields: of the `sdonnx.Request`.

    Returns:
        The fields, and a sentence about each that was lowered.
    """
    lowered, notes = dict(fields), list[str]()
    if not is_distilled(manifest):
        return lowered, notes
    steps = manifest.defaults.num_inference_steps
    limits = {
        "num_inference_steps": _steps_for(steps, fields.get("strength")),
        "hires_steps": _steps_for(steps, fields.get("hires_strength")),
        "guidance_scale": manifest.defaults.guidance_scale,
    }
    for name, limit in limits.items():
        asked = fields.get(name)
        if asked is not None and asked > limit:
            lowered[name] = limit
            notes.append(f"{name} {asked:g} was lowered to {limit:g}, which suits this distilled model")
    return lowered, notes


def _steps_for(steps: int, strength: float | None) -> int:
    """The steps of which a strength takes so many."""
    return steps if not strength else max(steps, math.ceil(min(steps / strength, 1000)))
