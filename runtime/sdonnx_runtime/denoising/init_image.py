"""Init latents for img2img and inpainting, and the latents of concat conditioning."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.execution.components import Runner
from sdonnx_runtime.images.crop import CropRegion, masked_region
from sdonnx_runtime.images.preprocess import (
    bicubic,
    blur_mask_inward,
    latent_mask,
    resize,
    resize_to_fit,
    to_depth,
    to_mask,
    to_rgb,
    to_values,
)
from sdonnx_runtime.packages.concat import CONCAT, ConcatInputs
from sdonnx_runtime.packages.manifest import Latents, Manifest
from sdonnx_runtime.request import CompleteRequest
from sdonnx_runtime.sampling.types import NoiseSource
from sdonnx_runtime.text.conditioning import batch_size


@dataclass(frozen=True, kw_only=True)
class InitLatents:
    """The latents that one image starts from."""

    latents: Array
    """(1, C, h, w)."""
    mask: Array | None = None
    """(1, 1, h, w), 1 where they are repainted; None is everywhere."""
    is_sampled: bool = True
    """Whether they are a sample of a posterior; a tiny VAE has none."""

    def restore(self, latents: Array) -> Array:
        """Put the init latents back outside the mask."""
        return latents if self.mask is None else np.where(self.mask > 0, latents, self.latents)


@dataclass(frozen=True, kw_only=True)
class InitImage:
    """An encoded init image."""

    space: Latents
    """How the package's latents relate to the VAE's values."""
    moments: Array | None
    """(1, 2 C, h, w), or (1, C, h, w) of a tiny VAE: the VAE encoder's output. None starts from noise alone."""
    concat_moments: Array | None = None
    """The same for concat conditioning: of the image, or of the image without the masked part. None is without."""
    image: Image.Image
    """RGB, of the size of the first pass."""
    region: CropRegion | None = None
    """The part of the request's image that it shows; None is all of it, resized."""
    mask: Image.Image | None = None
    """L, of the same size: 255 where it is repainted."""
    latent_mask: Array | None = None
    """(1, 1, h, w), 1 for latent pixels that are repainted."""

    def init_latents(self, noise: NoiseSource) -> InitLatents | None:
        """Sample the latents that an image starts from; None for noise alone."""
        if self.moments is None:
            return None
        return InitLatents(
            latents=sample_posterior(self.space, self.moments, noise),
            mask=self.latent_mask if self.concat_moments is None else None,
            is_sampled=self.moments.shape[1] > self.space.channels,
        )


def sample_posterior(space: Latents, moments: Array, noise: NoiseSource) -> Array:
    """Sample latents (1, C, h, w) from the VAE's posterior, as diffusers does."""
    mean, *rest = np.split(moments, max(moments.shape[1] // space.channels, 1), axis=1)
    values = mean + np.exp(np.clip(rest[0], -30, 20) / 2) * noise(mean.shape) if rest else mean
    return (values - np.float32(space.shift_factor)) * np.float32(space.scaling_factor)


def encode_init_image(run: Runner, manifest: Manifest, request: CompleteRequest) -> InitImage | None:
    """Resize or crop the request's image and encode it; raises RequestError if the mask is empty in latent pixels."""
    if request.image is None:
        return None
    space, kind = manifest.latents, manifest.conditions.concat
    concat = None if kind is None else CONCAT[kind]
    size, region, mask, repainted = (request.width, request.height), None, None, None
    if request.mask_image is not None and request.padding_mask_crop is not None:
        region = masked_region(to_mask(request.mask_image), size, request.padding_mask_crop)

    def to_size(image: Image.Image) -> Image.Image:
        return resize_to_fit(image, size, request.fit) if region is None else region.crop(image)

    if request.mask_image is not None:
        mask = to_mask(to_size(to_mask(request.mask_image)))
        repainted = latent_mask(mask, space.downscale, first_pixel=not request.paste)
        if not repainted.any():
            raise RequestError("the mask is empty at latent resolution; paint more of it white")
    image = to_size(to_rgb(request.image))
    masks = concat is not None and "mask_image" in concat.images
    from_noise = request.strength is None or (masks and request.strength == 1)
    has_concat = concat is not None and concat.has_latents and (mask is not None or not masks)
    return InitImage(
        image=image,
        region=region,
        mask=mask,
        latent_mask=repainted,
        moments=None if from_noise else encode_image(run, image),
        concat_moments=encode_image(run, image, mask) if has_concat else None,
        space=space,
    )


def encode_image(run: Runner, image: Image.Image, mask: Image.Image | None = None) -> Array:
    """Encode an RGB image, gray under the mask, to `InitImage.moments`."""
    values = to_values(image)
    if mask is not None:
        values = values * (np.asarray(mask) == 0)
    (moments,) = run("vae_encoder", {"sample": values}).values()
    return moments


@dataclass(frozen=True, kw_only=True)
class ConcatImages:
    """What concat conditioning is made of in one pass; absent maps have 0 channels."""

    mask: Array
    """(1, 1, h, w), 1 for latent pixels that are repainted."""
    depth: Array
    """(1, 1, h, w), about 0 to 1; brighter is nearer."""
    moments: Array
    """(1, 2 C, h, w), or (1, C, h, w) of a tiny VAE: the VAE encoder's output."""


def encode_concat_images(
    run: Runner, manifest: Manifest, request: CompleteRequest, init: InitImage | None, size: tuple[int, int]
) -> ConcatImages | None:
    """Encode the images of concat conditioning for a pass of a size, (width, height).

    Without a mask an inpainting model repaints all: the mask is 1 and the image gray, as in AUTOMATIC1111.
    """
    if manifest.conditions.concat is None:
        return None
    width, height = (side // manifest.latents.downscale for side in size)
    mask = moments = depth = np.empty((1, 0, height, width), np.float32)
    if init is not None and init.concat_moments is not None:
        mask, moments = mask if init.latent_mask is None else init.latent_mask, init.concat_moments
    elif CONCAT[manifest.conditions.concat].repaints_all:
        everything = Image.new("L", size, 255)
        mask = latent_mask(everything, manifest.latents.downscale)
        moments = encode_image(run, Image.new("RGB", size), everything)
    if request.depth_image is not None:
        depth = bicubic(to_depth(request.depth_image), height, width)[None, None]
    return ConcatImages(mask=mask, depth=depth, moments=moments)


def concat_latents(
    manifest: Manifest, request: CompleteRequest, images: ConcatImages | None, noise: NoiseSource
) -> Array | None:
    """Make the extra input channels for one image, with one batch entry or as many as a step has."""
    if manifest.conditions.concat is None or images is None:
        return None
    space = manifest.latents
    inputs = ConcatInputs(
        mask=images.mask,
        depth=images.depth,
        mean=images.moments[:, : space.channels],
        sample=lambda: sample_posterior(space, images.moments, noise),
        entries=batch_size(manifest, request),
    )
    return CONCAT[manifest.conditions.concat].latents(inputs)


def encodes_images(manifest: Manifest, request: CompleteRequest) -> bool:
    """Whether a request runs the VAE encoder."""
    concat = manifest.conditions.concat
    repaints_all = concat is not None and CONCAT[concat].repaints_all
    return repaints_all or request.image is not None or request.hires_upscaler not in (None, "latent")


def example_images(manifest: Manifest, image: Image.Image) -> dict[str, Image.Image]:
    """Make the image fields that a package's concat conditioning has out of one image; the mask is its middle."""
    kind = manifest.conditions.concat
    mask = Image.new("L", image.size)
    width, height = image.size
    mask.paste(255, (width // 4, height // 4, width - width // 4, height - height // 4))
    fields = {"image": image, "mask_image": mask, "depth_image": image}
    return {name: fields[name] for name in (() if kind is None else CONCAT[kind].images)}


def apply_overlay(image: Image.Image, init: InitImage, request: CompleteRequest) -> Image.Image:
    """Paste the init image's own pixels back outside the mask."""
    if request.image is None or request.mask_image is None or init.mask is None or not request.paste:
        return image
    original, mask = init.image, init.mask
    if init.region is not None:
        original, mask = to_rgb(request.image), to_mask(request.mask_image)
        image = init.region.paste(image, original)
    return Image.composite(image, original, blur_mask_inward(mask, request.mask_blur))


def resize_latents(latents: Array, height: int, width: int, circular: str = "") -> Array:
    """(1, C, h, w) to (1, C, height, width), neither smaller: bilinear, as torch's interpolate.

    Along the axes ``circular``, x, y or xy, latents go on at the opposite border.
    """
    channels = [
        np.asarray(resize(Image.fromarray(channel), (width, height), Image.Resampling.BILINEAR, circular))
        for channel in latents[0].astype(np.float32)
    ]
    return np.stack(channels)[None]
