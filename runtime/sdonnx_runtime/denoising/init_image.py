"""What an image's walk starts from instead of noise alone, and what of a picture the U-Net sees beside the latents."""

from collections.abc import Callable, Mapping
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
    flatten_alpha,
    latent_mask,
    resize_to_fit,
    to_depth,
    to_mask,
    to_values,
)
from sdonnx_runtime.packages.manifest import NEEDED, Latents, Manifest
from sdonnx_runtime.request import Request, given, uses_guidance
from sdonnx_runtime.sampling.types import NoiseSource


@dataclass(frozen=True, kw_only=True)
class InitLatents:
    """What one image starts from, as latents."""

    latents: Array
    """(1, C, h, w)."""
    mask: Array | None = None
    """(1, 1, h, w), 1 where they are made anew; None is everywhere."""
    drawn: bool = True
    """Whether they are a sample of a posterior; a tiny VAE has none."""

    def kept(self, latents: Array) -> Array:
        """The latents with the original where the mask keeps it."""
        return latents if self.mask is None else np.where(self.mask > 0, latents, self.latents)


@dataclass(frozen=True, kw_only=True)
class InitImage:
    """A picture that images start from."""

    space: Latents
    """How the package's latents relate to the VAE's values."""
    moments: Array | None
    """(1, 2 C, h, w), or (1, C, h, w) of encoders that give latents: what the VAE's encoder gave.

    None where walks start from noise alone."""
    beside: Array | None = None
    """The same for what the U-Net is given: the picture, or the picture without what is under the mask."""
    picture: Image.Image
    """RGB, of the size that is worked in."""
    region: CropRegion | None = None
    """What part of the request's picture that is; None is all of it, fitted."""
    mask: Image.Image | None = None
    """L, of the same size: 255 where it is painted anew."""
    cells: Array | None = None
    """(1, 1, h, w), 1 for latent cells that are made anew."""

    def draw(self, noise: NoiseSource) -> InitLatents | None:
        """What a walk starts from."""
        if self.moments is None:
            return None
        return InitLatents(
            latents=self.sample(self.moments, noise),
            mask=self.cells if self.beside is None else None,
            drawn=self.moments.shape[1] > self.space.channels,
        )

    def sample(self, moments: Array, noise: NoiseSource) -> Array:
        """Latents (1, C, h, w) of the VAE's posterior, as diffusers draws them."""
        mean, *rest = np.split(moments, max(moments.shape[1] // self.space.channels, 1), axis=1)
        values = mean + np.exp(np.clip(rest[0], -30, 20) / 2) * noise(mean.shape) if rest else mean
        return (values - np.float32(self.space.shift_factor)) * np.float32(self.space.scaling_factor)


def encode_init_image(run: Runner, manifest: Manifest, request: Request) -> InitImage | None:
    """The request's picture, fitted or cut, and encoded; None where there is none.

    Raises:
        RequestError: at the size that is worked in, the mask reaches no latent cell.
    """
    if request.image is None:
        return None
    space, beside = manifest.latents, manifest.conditions.beside
    size, region, mask, cells = (given(request.width), given(request.height)), None, None, None
    if request.mask_image is not None and request.padding_mask_crop is not None:
        region = masked_region(to_mask(request.mask_image), size, request.padding_mask_crop)

    def placed(picture: Image.Image) -> Image.Image:
        return resize_to_fit(picture, size, request.fit) if region is None else region.cut(picture)

    if request.mask_image is not None:
        mask = to_mask(placed(to_mask(request.mask_image)))
        cells = latent_mask(mask, space.downscale, first_pixel=not request.paste)
        if not cells.any():
            raise RequestError("at the size that is worked in, the mask has nothing to repaint; paint more of it white")
    picture = placed(flatten_alpha(request.image))
    from_noise = request.strength is None or (beside == "mask" and request.strength == 1)
    return InitImage(
        picture=picture,
        region=region,
        mask=mask,
        cells=cells,
        moments=None if from_noise else encode_image(run, picture),
        beside=encode_image(run, picture, mask) if beside in ("mask", "picture") else None,
        space=space,
    )


def encode_image(run: Runner, picture: Image.Image, mask: Image.Image | None = None) -> Array:
    """What the VAE's encoder gives for an RGB picture, or for one that is gray under a mask: `InitImage.moments`."""
    values = to_values(picture)
    if mask is not None:
        values = values * (np.asarray(mask) == 0)
    (moments,) = run("vae_encoder", {"sample": values}).values()
    return moments


def seen_beside(manifest: Manifest, request: Request, start: InitImage | None, noise: NoiseSource) -> Array | None:
    """What follows the latents' channels for one image, in one row or in as many as a step has; None is nothing."""
    kind = manifest.conditions.beside
    return None if kind is None else _SEEN[kind](manifest.latents, request, start, noise)


def _seen_masked(space: Latents, request: Request, start: InitImage | None, noise: NoiseSource) -> Array:
    """(1, 1 + C, h, w): the mask, and the latents of what it keeps."""
    assert start is not None and start.cells is not None and start.beside is not None  # noqa: S101 — checked
    return np.concatenate([start.cells, start.sample(start.beside, noise)], axis=1)


def _seen_picture(space: Latents, request: Request, start: InitImage | None, noise: NoiseSource) -> Array:
    """(R, C, h, w): means of the posterior, unscaled, arXiv:2211.09800; without the picture they are zeros."""
    assert start is not None and start.beside is not None  # noqa: S101 — checked
    latents = start.beside[:, : start.space.channels]
    without = np.zeros_like(latents)
    if not uses_guidance(request):
        return latents
    return np.concatenate([without, latents, latents] if request.image_guidance_scale != 1 else [latents, latents])


def _seen_depth(space: Latents, request: Request, start: InitImage | None, noise: NoiseSource) -> Array:
    """(1, 1, h, w), -1 where the depth map has its least value and 1 where its greatest."""
    assert request.depth_image is not None  # noqa: S101 — checked
    height, width = given(request.height) // space.downscale, given(request.width) // space.downscale
    depth = bicubic(to_depth(request.depth_image), height, width)[None, None]
    least, most = depth.min(), depth.max()
    return (depth - least) * np.float32(2) / (most - least) - np.float32(1)


_SEEN: Mapping[str, Callable[[Latents, Request, InitImage | None, NoiseSource], Array]] = {
    "mask": _seen_masked,
    "picture": _seen_picture,
    "depth": _seen_depth,
}


def example_images(manifest: Manifest, picture: Image.Image) -> dict[str, Image.Image]:
    """The fields of a request for a model that is given pictures beside the latents, made of one; its middle is masked.

    For whoever has to run any package: to measure it, or to observe it.
    """
    kind = manifest.conditions.beside
    mask = Image.new("L", picture.size)
    width, height = picture.size
    mask.paste(255, (width // 4, height // 4, width - width // 4, height - height // 4))
    fields = {"image": picture, "mask_image": mask, "depth_image": picture}
    return {name: fields[name] for name in NEEDED.get(str(kind), ())}


def apply_overlay(made: Image.Image, start: InitImage, request: Request) -> Image.Image:
    """What was made with the kept part of the picture that it started from."""
    if request.image is None or request.mask_image is None or start.mask is None or not request.paste:
        return made
    picture, mask = start.picture, start.mask
    if start.region is not None:
        picture, mask = flatten_alpha(request.image), to_mask(request.mask_image)
        made = start.region.put(made, picture)
    return Image.composite(made, picture, blur_mask_inward(mask, request.mask_blur))


def resize_latents(latents: Array, height: int, width: int) -> Array:
    """(1, C, h, w) to (1, C, height, width), neither smaller: bilinear, as torch's interpolate by itself."""
    cells = [
        np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR))
        for channel in latents[0].astype(np.float32)
    ]
    return np.stack(cells)[None]
