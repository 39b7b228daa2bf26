"""Recognize models distilled to a few steps; only their names tell."""

import re
from collections.abc import Mapping
from typing import Any

_DISTILLATIONS = (
    (r"turbo", 1),
    (r"lightning", 4),
    (r"hyper(?![-_ ]?real)", 4),
)
"""Pattern of a name ("hyperrealism" is not Hyper-SD), and the number of steps if the name has none."""

_COUNT = r"(?<!\d)(1|2|4|6|8|12|16)[-_ ]?step"


def few_steps(name: str) -> Mapping[str, Any]:
    """Return fields of `Defaults` for a few-step model, by its file, directory or Hub id; empty for other models.

    Guidance is distilled into such a model, so guidance_scale is 1.
    """
    name = name.rsplit("/", 1)[-1].lower()
    steps = next((steps for pattern, steps in _DISTILLATIONS if re.search(pattern, name)), None)
    if steps is None:
        return {}
    match = re.search(_COUNT, name)
    return {"num_inference_steps": int(match[1]) if match else steps, "guidance_scale": 1.0}
