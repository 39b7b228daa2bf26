"""Contact sheets: the images of a batch in rows and columns."""

import math
from collections.abc import Sequence

from PIL import Image

from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.images.preprocess import MAX_SIDE, flatten_alpha


def make_grid(images: Sequence[Image.Image], *, max_pixels: int | None = None) -> Image.Image:
    """Lay out images row by row, as near to a square as AUTOMATIC1111's grids, RGB.

    Args:
        images: of any sizes; smaller ones are in the middle of their cell, and what is free is white.
        max_pixels: the most that the grid may have; None is Pillow's limit for opening it.

    Raises:
        RequestError: there is no image, or the grid would have too many pixels.
    """
    if len(images) == 0:
        raise RequestError("a grid requires images; give one or more")
    rows = round(math.sqrt(len(images)))
    columns = math.ceil(len(images) / rows)
    width, height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
    size = columns * width, rows * height
    maximum = (Image.MAX_IMAGE_PIXELS or MAX_SIDE**2) if max_pixels is None else max_pixels
    if size[0] * size[1] > maximum:
        raise RequestError(
            f"the grid would have {size[0]}x{size[1]} pixels; "
            f"give fewer or smaller images: the maximum is {maximum / 1e6:.0f} million pixels"
        )
    grid = Image.new("RGB", size, "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        left, top = column * width + (width - image.width) // 2, row * height + (height - image.height) // 2
        grid.paste(flatten_alpha(image), (left, top))
    return grid
