"""The samplers by name: ours, diffusers' classes' and AUTOMATIC1111's.

Each is a generator ``sampler(denoise, x, schedule, noise)`` over states x = x0 + sigma * noise, (B, C, h, w) in
float32, and yields a `Step` after each of its steps. Whoever stops iterating has cancelled.
"""

import difflib
from collections.abc import Mapping

from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.multistep import deis, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, lms, pndm, unipc
from sdonnx_runtime.onestep import (
    ddim,
    dpm2,
    dpm2_ancestral,
    dpmpp_2s_ancestral,
    dpmpp_sde,
    euler,
    euler_ancestral,
    heun,
)
from sdonnx_runtime.sampling import Sampler
from sdonnx_runtime.scheduler_config import CLASSES
from sdonnx_runtime.sigmas import RESPACED

SAMPLERS: Mapping[str, Sampler] = {
    "ddim": ddim,
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
    "lms": lms,
    "pndm": pndm,
    "unipc": unipc,
}

A1111_NAMES = {
    "ddim": "DDIM",
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
    "lms": "LMS",
    "pndm": "PLMS",
    "unipc": "UniPC",
}
"""What AUTOMATIC1111's web UI, and so everything that reads its recipes, calls our samplers."""


def resolve_sampler(name: str) -> tuple[str, str | None]:
    """The key of SAMPLERS that ``name`` is, and the key of RESPACED that it ends in ("DPM++ 2M Karras").

    Raises:
        RequestError: it is no sampler's name; the nearest is offered.
    """
    known = {key.lower(): key for key in SAMPLERS}
    known |= {diffusers.lower(): key for key, diffusers in CLASSES.items() if key != "dpmpp_2m_sde"}
    known |= {shown.lower(): key for key, shown in A1111_NAMES.items()}
    asked = str(name).strip().lower()
    if asked in known:
        return known[asked], None
    front, _, schedule = asked.rpartition(" ")
    if front in known and schedule in RESPACED:
        return known[front], schedule
    nearest = difflib.get_close_matches(asked, known, n=1, cutoff=0.5)
    hint = f"did you mean {known[nearest[0]]}? " if nearest else ""
    raise RequestError(f"there is no sampler '{name}'; {hint}choose from {', '.join(SAMPLERS)}")
