"""Crop regions: inpainting only the part of an image around the mask, at its own size."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]
"""(left, top, right, bottom), pixels."""


@dataclass(frozen=True, kw_only=True)
class CropRegion:
    """A region of an image that is generated at another size and pasted back."""

    box: Box
    """The region in the image."""
    size: tuple[int, int]
    """(width, height) at which it is generated."""
    inner: Box
    """The region in the generated image; around it the edge is replicated if the image is too small for its shape."""

    def crop(self, image: Image.Image) -> Image.Image:
        """Crop the region and resize it to ``size``."""
        left, top, right, bottom = self.inner
        part = image.crop(self.box).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        sides = ((top, self.size[1] - bottom), (left, self.size[0] - right))
        pixels = np.asarray(part)
        return Image.fromarray(np.pad(pixels, sides + ((0, 0),) * (pixels.ndim - 2), mode="edge"))

    def paste(self, generated: Image.Image, image: Image.Image) -> Image.Image:
        """Paste a generated image of ``size`` into a copy of the image."""
        whole = image.copy()
        left, top, right, bottom = self.box
        part = generated.crop(self.inner).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        whole.paste(part, self.box)
        return whole


def masked_region(mask: Image.Image, size: tuple[int, int], padding: int) -> CropRegion:
    """Get the region around a mask (L), as diffusers' get_crop_region: padded, and expanded to the shape of ``size``.

    ``size`` is (width, height) at which it is generated; ``padding`` is in pixels of the mask.
    """
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    left, top = max(left - padding, 0), max(top - padding, 0)
    right, bottom = min(right + padding, mask.width), min(bottom + padding, mask.height)
    shape = size[0] / size[1]
    if (right - left) / (bottom - top) > shape:
        top, bottom = _expand(top, bottom, (right - left) / shape, mask.height)
    else:
        left, right = _expand(left, right, (bottom - top) * shape, mask.width)
    width, height = right - left, bottom - top
    inner_width = min(size[0], max(width * size[1] // height, 1))
    inner_height = min(size[1], max(height * size[0] // width, 1))
    x, y = size[0] // 2 - inner_width // 2, size[1] // 2 - inner_height // 2
    return CropRegion(box=(left, top, right, bottom), size=size, inner=(x, y, x + inner_width, y + inner_height))


def _expand(low: int, high: int, length: float, limit: int) -> tuple[int, int]:
    """Expand low to high to a length on both sides, inside of 0 to limit."""
    more = int(length - (high - low))
    low, high = low - more // 2, high + more - more // 2
    low, high = low - max(high - limit, 0), min(high, limit)
    return max(low, 0), min(high - min(low, 0), limit)
