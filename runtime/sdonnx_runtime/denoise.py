"""The denoiser that samplers call, composed of small functions: what it predicts with, and what guides it."""

from collections.abc import Callable, Mapping

import numpy as np

from sdonnx_runtime.arrays import AnyArray, Array
from sdonnx_runtime.sampling import Denoise

Run = Callable[[Mapping[str, AnyArray]], Array]
"""Runs the U-Net on its inputs by name and gives its prediction, of the shape of ``sample``."""


def predict(run: Run, prediction_type: str, inputs: Mapping[str, AnyArray]) -> Denoise:
    """A denoiser over one state: x (1, C, h, w) to x0 (R, C, h, w), a row for each row of the text.

    ``inputs`` is what the U-Net is given besides the latents and the timestep. States are in the
    variance-exploding parametrisation x = x0 + sigma * noise; the model works on x / sqrt(sigma^2 + 1).
    """
    to_x0 = _PREDICTIONS[prediction_type]

    def denoise(x: Array, sigma: float, t: float) -> Array:
        scaled = x / np.float32(np.sqrt(sigma**2 + 1.0))
        output = run({"sample": scaled, "timestep": np.array(t, np.float32), **inputs})
        return to_x0(output, x, sigma)

    return denoise


def guide(denoise: Denoise, scale: float) -> Denoise:
    """Classifier-free guidance, arXiv:2207.12598: rows (unconditional, conditional) to one."""

    def guided(x: Array, sigma: float, t: float) -> Array:
        unconditional, conditional = np.split(denoise(x, sigma, t), 2)
        return unconditional + np.float32(scale) * (conditional - unconditional)

    return guided


def _from_epsilon(output: Array, x: Array, sigma: float) -> Array:
    """arXiv:2006.11239: the model predicts the noise."""
    return x - np.float32(sigma) * output


def _from_v(output: Array, x: Array, sigma: float) -> Array:
    """arXiv:2202.00512: the model predicts the velocity."""
    scale = 1.0 / (sigma**2 + 1.0)
    return np.float32(scale) * x - np.float32(sigma * np.sqrt(scale)) * output


def _from_sample(output: Array, x: Array, sigma: float) -> Array:
    """The model predicts the clean latents."""
    return output


_PREDICTIONS: dict[str, Callable[[Array, Array, float], Array]] = {
    "epsilon": _from_epsilon,
    "v_prediction": _from_v,
    "sample": _from_sample,
}
