"""The cheap preview: a linear map from a latent cell to its colour, fitted to the model's own VAE."""

from pathlib import Path

import numpy as np
from PIL import Image
from sdonnx_runtime.arrays import Array
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.images.preprocess import to_values
from sdonnx_runtime.packages.manifest import Manifest

_CELLS, _PICTURES = 16, 8


def fit_preview(directory: Path, manifest: Manifest) -> tuple[tuple[float, ...], ...] | None:
    """`Latents.preview` by least squares, from smooth pictures in random colours; None without an encoder.

    Args:
        directory: of the package, whose VAE encoder is written.
        manifest: what it will be.

    Raises:
        SdonnxError: the encoder can't be loaded or run.
    """
    space = manifest.latents
    if "vae_encoder" not in manifest.components:
        return None
    values = np.concatenate([to_values(picture) for picture in smooth_color_images(_CELLS * space.downscale)])
    encoder = Session(directory / manifest.components["vae_encoder"].graphs["plain"], device="cpu")
    moments = np.concatenate([next(iter(encoder.run({"sample": one[None]}).values())) for one in values])
    latents = (moments[:, : space.channels] - space.shift_factor) * space.scaling_factor
    colours = values.reshape(len(values), 3, _CELLS, space.downscale, _CELLS, space.downscale).mean(axis=(3, 5))
    solution, *_ = np.linalg.lstsq(_with_one(_cells(latents)), _cells(colours), rcond=None)  # (C + 1, 3)
    return tuple(tuple(round(float(weight), 5) for weight in row) for row in solution)


def smooth_color_images(pixels: int, places: int = 4) -> list[Image.Image]:
    """Square pictures, always the same ones: random colours at so many places a side, smooth between them."""
    colours = np.random.RandomState(0).randint(0, 256, (_PICTURES, places, places, 3)).astype(np.uint8)
    return [Image.fromarray(each).resize((pixels, pixels), Image.Resampling.BICUBIC) for each in colours]


def _cells(images: Array) -> Array:
    """(N, C, h, w) to (N h w, C)."""
    return images.transpose(0, 2, 3, 1).reshape(-1, images.shape[1])


def _with_one(rows: Array) -> Array:
    return np.concatenate([rows, np.ones((len(rows), 1), np.float32)], axis=1)
