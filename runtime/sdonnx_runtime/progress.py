"""What a generation yields while it goes on: each denoising step, and the latents after a pass."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.images.preprocess import to_images
from sdonnx_runtime.request import CompleteRequest


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One denoising step, done."""

    image: int
    """Which image, from 0."""
    num_images: int
    step: int
    """Which step of this image, from 0, counted over its passes."""
    num_steps: int
    """How many steps each image takes, over its passes."""
    seconds: float
    """Duration of the step."""
    latents: Array
    """(1, C, h, w): the state after the step, noise included; larger in a second pass."""
    denoised: Array
    """(1, C, h, w): the x0 that the model predicts."""
    projection: Array | None = field(default=None, repr=False)
    """(C + 1, 3): the package's `Latents.preview`."""
    decoder: Callable[[Array], Image.Image] | None = field(default=None, repr=False)
    """Decodes ``denoised`` with the pipeline's ``preview_vae``."""

    def preview(self) -> Image.Image:
        """Preview the image, RGB: a linear guess, one pixel per latent pixel; or in full size with a ``preview_vae``.

        Raises:
            PackageError: the package has no projection for it; or as `Pipeline.decode` does.
            DeviceError: as `Pipeline.decode` does.
        """
        if self.decoder is not None:
            return self.decoder(self.denoised)
        if self.projection is None:
            raise PackageError("there is no preview: safety hides it, or the package has none ('sdonnx export' again)")
        pixels = np.moveaxis(self.denoised, 1, 3)  # (1, h, w, C)
        return to_images(np.moveaxis(pixels @ self.projection[:-1] + self.projection[-1], 3, 1))[0]


@dataclass(frozen=True, kw_only=True)
class SampledLatents:
    """The latents of all images after a pass."""

    latents: Array
    """(num_images, C, h, w)."""
    request: CompleteRequest
    """The request that makes them: without hires fix after the first of two passes."""
    last: bool
    """Whether they are decoded next."""
