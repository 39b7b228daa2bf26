"""Canny's edge detector (IEEE PAMI 8, 1986), as OpenCV's ``Canny(picture, 100, 200)`` has it: what ControlNets read."""

import numpy as np
from PIL import Image

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.images.preprocess import flatten_alpha


def canny(picture: Image.Image, low: int = 100, high: int = 200) -> Image.Image:
    """White edges on black, RGB, of the same size.

    Gradients are Sobel's over 3x3 pixels, of the channel where |x| + |y| is greatest; there is no blur.

    Args:
        picture: of 8 bits a channel; transparent parts lie on white.
        low: a gradient above this is an edge where it touches one above ``high``.
        high: a gradient above this is an edge.
    """
    x, y = _gradients(np.asarray(flatten_alpha(picture), np.int32))
    size = np.abs(x) + np.abs(y)
    edges = _grown((size > high) & _ridges(x, y, size), (size > low) & _ridges(x, y, size))
    return Image.fromarray(np.where(edges, np.uint8(255), np.uint8(0))).convert("RGB")


def _gradients(pixels: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Along x and along y, (H, W), of (H, W, C)."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    across = padded[:, 2:] - padded[:, :-2]
    x = across[:-2] + 2 * across[1:-1] + across[2:]
    down = padded[2:] - padded[:-2]
    y = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    strongest = np.argmax(np.abs(x) + np.abs(y), axis=2)[..., None]
    return np.take_along_axis(x, strongest, 2)[..., 0], np.take_along_axis(y, strongest, 2)[..., 0]


def _ridges(x: AnyArray, y: AnyArray, size: AnyArray) -> AnyArray:
    """Where a gradient is greatest across the edge, whose direction is one of four; of two equals the first counts."""
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


def _grown(edges: AnyArray, weak: AnyArray) -> AnyArray:
    """The edges and all that is weak and touches them, at a side or a corner, or touches such."""
    edges = np.pad(edges, 1)
    weak = np.pad(weak, 1) & ~edges
    found = np.argwhere(edges)
    around = np.array([(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)])
    while len(found):
        near = (found[:, None] + around).reshape(-1, 2)
        found = np.unique(near[weak[tuple(near.T)]], axis=0)
        weak[tuple(found.T)], edges[tuple(found.T)] = False, True
    return edges[1:-1, 1:-1]
