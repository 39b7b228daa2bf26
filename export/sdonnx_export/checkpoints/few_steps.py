"""Models distilled to a few steps: nothing but their names tells them."""

import re
from collections.abc import Mapping
from typing import Any

_KINDS = (
    (r"turbo", 1),
    (r"lightning", 4),
    (r"hyper(?![-_ ]?real)", 4),
)
"""What is in a name (though not in "hyperrealism"), and how many steps it means where no number of them is named."""

_COUNT = r"(?<!\d)(1|2|4|6|8|12|16)[-_ ]?step"


def few_steps(name: str) -> Mapping[str, Any]:
    """Fields of `Defaults` for the model of a file, a directory or a Hub id; none if its name promises nothing.

    A model made to need few steps has guidance distilled into it, so that is off.
    """
    name = name.rsplit("/", 1)[-1].lower()
    steps = next((steps for pattern, steps in _KINDS if re.search(pattern, name)), None)
    if steps is None:
        return {}
    named = re.search(_COUNT, name)
    return {"num_inference_steps": int(named[1]) if named else steps, "guidance_scale": 1.0}
