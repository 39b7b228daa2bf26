"""A picture worked on in tiles that overlap and are blended: as diffusers' VAEs do it, or with norms of the whole."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise, product
from typing import TypeAlias

import numpy as np

from sdonnx_runtime.arrays import AnyArray, Array
from sdonnx_runtime.packages.manifest import MEASURED_STATS, NORM_STATS, USE_NORM_STATS

OVERLAP = 4
"""One part of so many of a tile's side is shared with the next."""


Run: TypeAlias = Callable[[Mapping[str, AnyArray]], Mapping[str, AnyArray]]
"""What a component gives for what it is given."""


def run_tiled(run: Run, feeds: Mapping[str, AnyArray], side: int, *, normed: bool = False) -> dict[str, Array]:
    """What a component of one input and one output gives for a picture (N, C, H, W), worked on tile by tile.

    Where tiles overlap, one passes into the other linearly, first from above, then from the left. What normalizes
    over a picture sees a tile instead, so that tiles differ from the whole by what they can't see of it, unless ``run``
    does better.

    Args:
        run: gives a tile; pictures grow or shrink by it alike everywhere.
        feeds: the one input.
        side: of a tile, a multiple of OVERLAP; a picture no larger than that is one.
        normed: lets tiles end where the picture does, as `tile_offsets` has it.
    """
    ((name, picture),) = feeds.items()
    height, width = picture.shape[2:]
    if height <= side and width <= side:
        return dict(run(feeds))
    step, output = side - side // OVERLAP, ""
    rows: list[list[Array]] = []
    for top in tile_offsets(height, side, normed=normed):
        lefts = tile_offsets(width, side, normed=normed)
        pieces = [picture[:, :, top : top + side, left : left + side] for left in lefts]
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
    joined = [
        np.concatenate([*(tile[:, :, :, :kept] for tile in row[:-1]), row[-1]], axis=3)[:, :, : kept if below else None]
        for row, below in zip(rows, [*rows[1:], []], strict=True)
    ]
    return {output: np.concatenate(joined, axis=2)}


def run_tiled_with_global_norms(
    run: Run, feeds: Mapping[str, AnyArray], side: int, norms: tuple[int, ...]
) -> dict[str, Array]:
    """Like `run_tiled`, but norms see the whole picture, or nearly.

    A norm's moments over the picture are the mean of those over tiles without overlap, if the norms before it have seen
    the picture too. So all tiles are run first with each norm's moments of the tile, then with the means of those; the
    two that come of it lie on either side of the truth, and pictures are made with what is between.

    Args:
        run: gives a tile, and the moments MEASURED, for a picture, MOMENTS and GIVEN.
        feeds: the one picture (N, C, H, W).
        side: as for `run_tiled`.
        norms: the sizes (2 K, groups) of a picture's moments.
    """
    ((name, picture),) = feeds.items()
    count, _, height, width = picture.shape

    def tile(feeds: Mapping[str, AnyArray], moments: Array | None) -> dict[str, AnyArray]:
        known = np.zeros((count, *norms), np.float32) if moments is None else moments
        return dict(run({**feeds, NORM_STATS: known, USE_NORM_STATS: np.array(moments is not None, np.float32)}))

    def measure(moments: Array | None) -> Array:
        found = np.zeros((count, *norms))
        for top, left in product(range(0, height, side), range(0, width, side)):
            piece = np.ascontiguousarray(picture[:, :, top : top + side, left : left + side])
            found += tile({name: piece}, moments)[MEASURED_STATS] * (piece[0, 0].size / (height * width))
        return found.astype(np.float32)

    def draw(feeds: Mapping[str, AnyArray], moments: Array | None) -> dict[str, AnyArray]:
        return {output: made for output, made in tile(feeds, moments).items() if output != MEASURED_STATS}

    if height <= side and width <= side:
        return draw(feeds, None)
    first = measure(None)
    return run_tiled(partial(draw, moments=(first + measure(first)) / 2), feeds, side, normed=True)


def tile_offsets(size: int, side: int, *, normed: bool) -> range:
    """Where tiles of a ``side`` begin on one of ``size``; only ``normed`` ones leave out what lies in another.

    diffusers doesn't, so tiles of a picture that is no wider than one overlap each other wholly.
    """
    shared = side // OVERLAP
    return range(0, max(size - shared, 1) if normed else size, side - shared)


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
