"""A picture worked on in tiles that overlap and are blended, as diffusers' VAEs do it."""

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np

from sdonnx_runtime.arrays import AnyArray, Array

OVERLAP = 4
"""One part of so many of a tile's side is shared with the next."""


def in_tiles(
    run: Callable[[Mapping[str, AnyArray]], Mapping[str, AnyArray]], feeds: Mapping[str, AnyArray], side: int
) -> dict[str, Array]:
    """What a component of one input and one output gives for a picture (N, C, H, W), worked on tile by tile.

    Where tiles overlap, one passes into the other linearly, first from above, then from the left. What normalizes
    over a picture sees a tile instead, so that tiles differ from the whole by what they can't see of it.

    Args:
        run: gives a tile; pictures grow or shrink by it alike everywhere.
        feeds: the one input.
        side: of a tile, a multiple of OVERLAP; a picture no larger than that is one.
    """
    ((name, picture),) = feeds.items()
    height, width = picture.shape[2:]
    if height <= side and width <= side:
        return dict(run(feeds))
    step, output = side - side // OVERLAP, ""
    rows: list[list[Array]] = []
    for top in tiles_of(height, side):
        pieces = [picture[:, :, top : top + side, left : left + side] for left in tiles_of(width, side)]
        made = [run({name: np.ascontiguousarray(piece)}) for piece in pieces]
        ((output, _),) = made[0].items()
        rows.append([outputs[output].copy() for outputs in made])
    first = rows[0][0].shape[2], min(side, height)
    shared, kept = (places * first[0] // first[1] for places in (side - step, step))
    for above, row in pairwise([[], *rows]):
        for upper, tile in zip(above, row, strict=False):
            _blend(upper, tile, shared, axis=2)
        for before, tile in pairwise(row):
            _blend(before, tile, shared, axis=3)
    joined = [np.concatenate([tile[:, :, :kept, :kept] for tile in row], axis=3) for row in rows]
    return {output: np.concatenate(joined, axis=2)}


def tiles_of(size: int, side: int) -> range:
    """Where tiles of a ``side`` begin on one of ``size``."""
    return range(0, size, side - side // OVERLAP)


def _blend(before: Array, tile: Array, shared: int, *, axis: int) -> None:
    """Lets the end of the tile ``before`` along an axis pass into the beginning of ``tile``, which is changed."""
    count = min(before.shape[axis], tile.shape[axis], shared)
    share = (np.arange(count, dtype=np.float32) / np.float32(count)).reshape(
        [-1 if axis == each else 1 for each in range(4)]
    )
    ends = [slice(None)] * 4
    ends[axis] = slice(before.shape[axis] - count, None)
    begins = [slice(None)] * 4
    begins[axis] = slice(0, count)
    tile[tuple(begins)] = before[tuple(ends)] * (1 - share) + tile[tuple(begins)] * share
