"""What an image's walk starts from instead of noise alone: a picture that the VAE has encoded, or latents."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.components import Runner
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.manifest import Latents
from sdonnx_runtime.pictures import feathered, fitted, latent_mask, mask_of, opaque, to_values
from sdonnx_runtime.regions import Region, region_around
from sdonnx_runtime.request import Request, given
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

    space: Latents
    """How the package's latents relate to the VAE's values."""
    moments: Array
    """(1, 2 C, h, w), or (1, C, h, w) of optimum's older exports: what the VAE's encoder gave."""
    picture: Image.Image
    """RGB, of the size that is worked in."""
    region: Region | None = None
    """What part of the request's picture that is; None is all of it, fitted."""
    mask: Image.Image | None = None
    """L, of the same size: 255 where it is painted anew."""
    cells: Array | None = None
    """(1, 1, h, w), 1 for latent cells that are made anew."""

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


def start_of(run: Runner, space: Latents, request: Request) -> Start | None:
    """The request's picture, fitted or cut, and encoded; None where there is none.

    Raises:
        RequestError: at the size that is worked in, the mask reaches no latent cell.
    """
    if request.image is None:
        return None
    size, region, mask, cells = (given(request.width), given(request.height)), None, None, None
    if request.mask_image is not None and request.padding_mask_crop is not None:
        region = region_around(mask_of(request.mask_image), size, request.padding_mask_crop)

    def placed(picture: Image.Image) -> Image.Image:
        return fitted(picture, size, request.fit) if region is None else region.cut(picture)

    if request.mask_image is not None:
        mask = mask_of(placed(mask_of(request.mask_image)))
        cells = latent_mask(mask, space.downscale, first_pixel=not request.paste)
        if not cells.any():
            raise RequestError("at the size that is worked in, the mask has nothing to repaint; paint more of it white")
    picture = placed(opaque(request.image))
    moments = encoded(run, picture)
    return Start(picture=picture, region=region, mask=mask, cells=cells, moments=moments, space=space)


def encoded(run: Runner, picture: Image.Image) -> Array:
    """What the VAE's encoder gives for an RGB picture: `Start.moments`."""
    (moments,) = run("vae_encoder", {"sample": to_values(picture)}).values()
    return moments


def pasted(made: Image.Image, start: Start, request: Request) -> Image.Image:
    """What was made with the kept part of the picture that it started from."""
    if request.image is None or request.mask_image is None or start.mask is None or not request.paste:
        return made
    picture, mask = start.picture, start.mask
    if start.region is not None:
        picture, mask = opaque(request.image), mask_of(request.mask_image)
        made = start.region.put(made, picture)
    return Image.composite(made, picture, feathered(mask, request.mask_blur))


def interpolated(latents: Array, height: int, width: int) -> Array:
    """(1, C, h, w) to (1, C, height, width), neither smaller: bilinear, as torch's interpolate by itself."""
    cells = [
        np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR))
        for channel in latents[0].astype(np.float32)
    ]
    return np.stack(cells)[None]
