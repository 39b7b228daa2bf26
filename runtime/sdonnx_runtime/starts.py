"""What an image's walk starts from instead of noise alone: a picture that the VAE has encoded, or latents."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.components import Runner
from sdonnx_runtime.manifest import Latents
from sdonnx_runtime.pictures import to_values
from sdonnx_runtime.sampling import NoiseSource


@dataclass(frozen=True, kw_only=True)
class Original:
    """What one image starts from, as latents."""

    latents: Array
    """(1, C, h, w)."""
    mask: Array | None = None
    """(1, 1, h, w), 1 where they are made anew; None is everywhere."""

    def kept(self, latents: Array) -> Array:
        """The latents with the original where the mask keeps it."""
        return latents if self.mask is None else np.where(self.mask > 0, latents, self.latents)


@dataclass(frozen=True, kw_only=True)
class Start:
    """A picture that images start from."""

    picture: Image.Image
    """RGB, of the size that is worked in."""
    mask: Image.Image | None
    """L, of the same size: 255 where it is painted anew."""
    cells: Array | None
    """(1, 1, h, w), 1 for latent cells that are made anew."""
    moments: Array
    """(1, 2 C, h, w), or (1, C, h, w) of optimum's older exports: what the VAE's encoder gave."""
    space: Latents
    """How the package's latents relate to the VAE's values."""

    def draw(self, noise: NoiseSource) -> Original:
        """A sample of the VAE's posterior, as diffusers draws it."""
        values = self.moments
        if values.shape[1] == 2 * self.space.channels:
            mean, log_variance = np.split(values, 2, axis=1)
            values = mean + np.exp(np.clip(log_variance, -30, 20) / 2) * noise(mean.shape)
        return Original(
            latents=(values - np.float32(self.space.shift_factor)) * np.float32(self.space.scaling_factor),
            mask=self.cells,
        )


def encoded(
    run: Runner, space: Latents, picture: Image.Image, mask: Image.Image | None = None, cells: Array | None = None
) -> Start:
    """A picture, RGB, as images start from it; with the mask and the latent cells of what is painted anew."""
    (moments,) = run("vae_encoder", {"sample": to_values(picture)}).values()
    return Start(picture=picture, mask=mask, cells=cells, moments=moments, space=space)


def interpolated(latents: Array, height: int, width: int) -> Array:
    """(1, C, h, w) to (1, C, height, width), neither smaller: bilinear, as torch's interpolate by itself."""
    cells = [
        np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR))
        for channel in latents[0].astype(np.float32)
    ]
    return np.stack(cells)[None]
