"""What the U-Net is told besides latents and time: the one table that knows families."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sdonnx_runtime.arrays import AnyArray, Array
from sdonnx_runtime.manifest import TextEncoder

Encode = Callable[[TextEncoder, str], Array]
"""Runs a text encoder on one prompt: hidden states (1, S, C)."""

Conditioning = Callable[[Sequence[TextEncoder], Sequence[str], Encode], dict[str, AnyArray]]


def clip_states(encoders: Sequence[TextEncoder], prompts: Sequence[str], encode: Encode) -> dict[str, AnyArray]:
    """Stable Diffusion 1.x: the hidden states of one CLIP encoder, a row for each prompt."""
    states = [encode(encoders[0], prompt) for prompt in prompts]
    return {"encoder_hidden_states": np.concatenate(states)}  # (R, 77, C)


CONDITIONING: Mapping[str, Conditioning] = {"sd1": clip_states}
