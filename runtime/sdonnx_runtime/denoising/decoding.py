"""Latents to images."""

import numpy as np
from PIL import Image

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.execution.components import Runner
from sdonnx_runtime.images.preprocess import to_images
from sdonnx_runtime.packages.manifest import Manifest


def decode(run: Runner, manifest: Manifest, latents: Array) -> tuple[Image.Image, ...]:
    """Decode latents, (N, C, h, w), one image after another."""
    space = manifest.latents
    unscaled = latents / np.float32(space.scaling_factor) + np.float32(space.shift_factor)
    outputs = [run("vae_decoder", {"latent_sample": each[None]}) for each in unscaled]
    return to_images(np.concatenate([values for each in outputs for values in each.values()]))
