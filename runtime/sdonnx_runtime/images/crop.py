"""The part of a picture around a mask, worked in alone at a size of its own and put back."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]
"""(left, top, right, bottom), pixels."""


@dataclass(frozen=True, kw_only=True)
class CropRegion:
    """Where the part lies in the picture, and where in what is worked in."""

    box: Box
    """In the picture."""
    size: tuple[int, int]
    """(width, height) that is worked in."""
    inner: Box
    """In what is worked in; around it the part's edge is drawn out, where the picture had too little for its shape."""

    def cut(self, picture: Image.Image) -> Image.Image:
        """The part in the size that is worked in."""
        left, top, right, bottom = self.inner
        part = _resized(picture.crop(self.box), (right - left, bottom - top))
        sides = ((top, self.size[1] - bottom), (left, self.size[0] - right))
        pixels = np.asarray(part)
        return Image.fromarray(np.pad(pixels, sides + ((0, 0),) * (pixels.ndim - 2), mode="edge"))

    def put(self, made: Image.Image, picture: Image.Image) -> Image.Image:
        """The picture with what was made in the part's place."""
        whole = picture.copy()
        left, top, right, bottom = self.box
        whole.paste(_resized(made.crop(self.inner), (right - left, bottom - top)), self.box)
        return whole


def masked_region(mask: Image.Image, size: tuple[int, int], padding: int) -> CropRegion:
    """The smallest box around a mask, padded and grown to the shape of a size, as diffusers' get_crop_region has it.

    Args:
        mask: L, 0 outside; not empty.
        size: (width, height) that is worked in.
        padding: pixels of the picture.
    """
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    left, top = max(left - padding, 0), max(top - padding, 0)
    right, bottom = min(right + padding, mask.width), min(bottom + padding, mask.height)
    shape = size[0] / size[1]
    if (right - left) / (bottom - top) > shape:
        top, bottom = _grown(top, bottom, (right - left) / shape, mask.height)
    else:
        left, right = _grown(left, right, (bottom - top) * shape, mask.width)
    width, height = right - left, bottom - top
    inner_width = min(size[0], max(width * size[1] // height, 1))
    inner_height = min(size[1], max(height * size[0] // width, 1))
    x, y = size[0] // 2 - inner_width // 2, size[1] // 2 - inner_height // 2
    return CropRegion(box=(left, top, right, bottom), size=size, inner=(x, y, x + inner_width, y + inner_height))


def _grown(low: int, high: int, length: float, limit: int) -> tuple[int, int]:
    """From low to high made as long on both sides, inside 0 to limit."""
    more = int(length - (high - low))
    low, high = low - more // 2, high + more - more // 2
    low, high = low - max(high - limit, 0), min(high, limit)
    return max(low, 0), min(high - min(low, 0), limit)


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
