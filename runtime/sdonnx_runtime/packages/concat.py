"""Concat conditioning: models whose U-Net has extra input channels (LDM's ``c_concat``)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from sdonnx_runtime.arrays import Array


@dataclass(frozen=True, kw_only=True)
class ConcatInputs:
    """What a kind makes its channels of; an image that the request doesn't have has 0 channels."""

    mask: Array
    """(1, 1, h, w), 1 for latent pixels that are repainted."""
    depth: Array
    """(1, 1, h, w), about 0 to 1; brighter is nearer."""
    mean: Array
    """(1, C, h, w), unscaled: the mean of the posterior of the image."""
    sample: Callable[[], Array]
    """Sample latents (1, C, h, w) from that posterior."""
    entries: int
    """The number of a step's batch entries."""


class ConcatConditioning:
    """One kind of concat conditioning; a subclass and its place in CONCAT are all that a kind needs."""

    kind: str
    """A key of CONCAT."""
    map_channels: int = 0
    """Channels of a mask or a depth map."""
    has_latents: bool = False
    """Whether the latents of an encoded image follow."""
    images: tuple[str, ...]
    """The image fields of a request that the channels are made of."""
    repaints_all: bool = False
    """Whether all is repainted without these images; else the model requires them."""
    own_fields: tuple[str, ...] = ()
    """Fields of a request that only this kind supports."""
    edits: bool = False
    """Whether the model edits a whole image: it starts from noise, and guidance has a scale for the image too."""
    task: str
    """What the model generates, and the options that it requires."""
    img2img: str | None = None
    """What it generates as well if the package has a VAE encoder."""

    def channels(self, latent_channels: int) -> int:
        """Count the extra input channels."""
        return self.map_channels + latent_channels * self.has_latents

    def latents(self, inputs: ConcatInputs) -> Array:
        """Make the extra input channels, with one batch entry or as many as a step has."""
        raise NotImplementedError


class Inpainting(ConcatConditioning):
    """The mask, and the latents of the image without the masked part; arXiv:2112.10752."""

    kind = "inpainting"
    map_channels = 1
    has_latents = True
    images = ("image", "mask_image")
    repaints_all = True
    task = "inpainting and outpainting (--image with --mask or --outpaint), text to image"
    img2img = "image to image (--image)"

    def latents(self, inputs: ConcatInputs) -> Array:
        """(1, 1 + C, h, w)."""
        return np.concatenate([inputs.mask, inputs.sample()], axis=1)


class Pix2Pix(ConcatConditioning):
    """The latents of the image to edit, zeros in the entry without it; InstructPix2Pix, arXiv:2211.09800."""

    kind = "pix2pix"
    has_latents = True
    images = ("image",)
    own_fields = ("image_guidance_scale",)
    edits = True
    task = "image editing by instruction; requires --image"

    def latents(self, inputs: ConcatInputs) -> Array:
        """(N, C, h, w)."""
        return np.concatenate([np.zeros_like(inputs.mean), inputs.mean, inputs.mean][-inputs.entries :])


class Depth(ConcatConditioning):
    """The depth map, scaled to -1 to 1; a flat one is -1, as in training: Stability AI's ddpm.py."""

    kind = "depth"
    map_channels = 1
    images = ("depth_image",)
    own_fields = ("depth_image",)
    task = "depth to image; requires --depth"
    img2img = "image to image (--image)"

    def latents(self, inputs: ConcatInputs) -> Array:
        """(1, 1, h, w)."""
        low, high = inputs.depth.min(), inputs.depth.max()
        if high - low < _FLAT:
            return np.full_like(inputs.depth, -1)
        return (inputs.depth - low) * np.float32(2) / (high - low) - np.float32(1)


_FLAT = 1e-6
"""A range of depths that is left by rounding."""

CONCAT: Mapping[str, ConcatConditioning] = {each.kind: each for each in (Inpainting(), Pix2Pix(), Depth())}
