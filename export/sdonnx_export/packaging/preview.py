"""Fit the cheap preview: a linear map from a latent pixel to RGB, by the model's own VAE."""

from pathlib import Path

import numpy as np
from PIL import Image
from sdonnx_runtime.arrays import Array
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.images.preprocess import to_values
from sdonnx_runtime.packages.manifest import Latents

_LATENT_SIZE, _NUM_IMAGES = 16, 8


def fit_preview(encoder: Path, space: Latents) -> tuple[tuple[float, ...], ...]:
    """Fit `Latents.preview` by least squares to smooth images of random colors.

    Args:
        encoder: the VAE encoder's graph, which the CPU runs.
        space: the latent space, yet without a preview.

    Raises:
        SdonnxError: the encoder can't be loaded or run.
    """
    size = _LATENT_SIZE
    values = np.concatenate([to_values(image) for image in smooth_color_images(size * space.downscale)])
    session = Session(encoder, device="cpu")
    moments = np.concatenate([next(iter(session.run({"sample": one[None]}).values())) for one in values])
    latents = (moments[:, : space.channels] - space.shift_factor) * space.scaling_factor
    colors = values.reshape(len(values), 3, size, space.downscale, size, space.downscale).mean(axis=(3, 5))
    solution, *_ = np.linalg.lstsq(_append_ones(_to_pixels(latents)), _to_pixels(colors), rcond=None)  # (C + 1, 3)
    return tuple(tuple(round(float(weight), 5) for weight in row) for row in solution)


def smooth_color_images(pixels: int, grid: int = 4) -> list[Image.Image]:
    """Make square images, always the same: ``grid`` random colors on each side, interpolated between them."""
    colors = np.random.RandomState(0).randint(0, 256, (_NUM_IMAGES, grid, grid, 3)).astype(np.uint8)
    return [Image.fromarray(each).resize((pixels, pixels), Image.Resampling.BICUBIC) for each in colors]


def _to_pixels(images: Array) -> Array:
    """(N, C, h, w) to (N h w, C)."""
    return images.transpose(0, 2, 3, 1).reshape(-1, images.shape[1])


def _append_ones(pixels: Array) -> Array:
    return np.concatenate([pixels, np.ones((len(pixels), 1), np.float32)], axis=1)
