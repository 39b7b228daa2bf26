"""Canny's edge detector (IEEE PAMI 8, 1986), equal to OpenCV's ``Canny(image, 100, 200)``, for ControlNets."""

import numpy as np
from PIL import Image

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.images.preprocess import flatten_alpha


def canny(image: Image.Image, low: int = 100, high: int = 200) -> Image.Image:
    """Detect edges: white on black, RGB, of the same size; transparent parts of the image lie on white.

    Gradients are Sobel's over 3x3 pixels, of the channel where |x| + |y| is greatest, without a blur. Those above
    ``high`` are edges, and those above ``low`` that are connected to one.
    """
    x, y = _gradients(np.asarray(flatten_alpha(image), np.int32))
    size = np.abs(x) + np.abs(y)
    is_ridge = _non_max_suppression(x, y, size)
    edges = _hysteresis((size > high) & is_ridge, (size > low) & is_ridge)
    return Image.fromarray(np.where(edges, np.uint8(255), np.uint8(0))).convert("RGB")


def _gradients(pixels: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Compute the gradients along x and y, (H, W), of (H, W, C)."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    across = padded[:, 2:] - padded[:, :-2]
    x = across[:-2] + 2 * across[1:-1] + across[2:]
    down = padded[2:] - padded[:-2]
    y = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    strongest = np.argmax(np.abs(x) + np.abs(y), axis=2)[..., None]
    return np.take_along_axis(x, strongest, 2)[..., 0], np.take_along_axis(y, strongest, 2)[..., 0]


def _non_max_suppression(x: AnyArray, y: AnyArray, size: AnyArray) -> AnyArray:
    """Find gradients that are greatest across the edge, in one of four directions; of two equals the first counts."""
    height, width = size.shape
    around = np.pad(size, 1)

    def neighbour(down: int, right: int) -> AnyArray:
        return around[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    tangent = 13573  # of 22.5 degrees, times 2**15, as OpenCV rounds it
    wide, tall = np.abs(x).astype(np.int64) * tangent, np.abs(y).astype(np.int64) << 15
    steep = wide + (np.abs(x).astype(np.int64) << 16)  # of 67.5 degrees
    level = (size > neighbour(0, -1)) & (size >= neighbour(0, 1))
    upright = (size > neighbour(-1, 0)) & (size >= neighbour(1, 0))
    falling = (size > neighbour(-1, -1)) & (size > neighbour(1, 1))
    rising = (size > neighbour(-1, 1)) & (size > neighbour(1, -1))
    slanted = np.where((x ^ y) < 0, rising, falling)
    return np.where(tall < wide, level, np.where(tall > steep, upright, slanted))


def _hysteresis(edges: AnyArray, weak: AnyArray) -> AnyArray:
    """Add the weak pixels that are connected to edges, by sides or corners."""
    edges = np.pad(edges, 1)
    weak = np.pad(weak, 1) & ~edges
    front = np.argwhere(edges)
    around = np.array([(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)])
    while len(front):
        near = (front[:, None] + around).reshape(-1, 2)
        front = np.unique(near[weak[tuple(near.T)]], axis=0)
        weak[tuple(front.T)], edges[tuple(front.T)] = False, True
    return edges[1:-1, 1:-1]
