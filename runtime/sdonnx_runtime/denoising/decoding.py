"""Latents to images."""

import numpy as np
from PIL import Image

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.execution.components import Runner
from sdonnx_runtime.images.preprocess import to_images
from sdonnx_runtime.packages.manifest import Manifest
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.request import TILINGS


def check_latents(latents: Array, package: Package, tiling: str | None) -> None:
    """Check that latents are finite and a package's, (N, C, h, w), and that there is such a tiling; or RequestError."""
    channels = package.manifest.latents.channels
    if tiling not in (None, *TILINGS):
        raise RequestError(f"tiling is {tiling!r}; choose {', '.join(TILINGS)}")
    if latents.ndim != 4 or latents.shape[1] != channels or 0 in latents.shape:
        raise RequestError(f"the latents are {latents.shape}; {package.name} has (N, {channels}, h, w)")
    if not np.isfinite(latents).all():
        raise RequestError("the latents are not finite; give those of a Result")


def decode(run: Runner, manifest: Manifest, latents: Array) -> tuple[Image.Image, ...]:
    """Decode latents, (N, C, h, w), one image after another."""
    space = manifest.latents
    unscaled = latents / np.float32(space.scaling_factor) + np.float32(space.shift_factor)
    outputs = [run("vae_decoder", {"latent_sample": each[None]}) for each in unscaled]
    return to_images(np.concatenate([values for each in outputs for values in each.values()]))
