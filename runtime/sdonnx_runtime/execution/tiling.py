"""Overlapping tiles: of a VAE, blended as diffusers does or with the norms of the whole image; of what has no norms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import TypeAlias

import numpy as np

from sdonnx_runtime.arrays import AnyArray, Array
from sdonnx_runtime.packages.variant import MEASURED_STATS, NORM_STATS, USE_NORM_STATS

OVERLAP = 4
"""Tiles overlap by a quarter of their side."""

Run: TypeAlias = Callable[[Mapping[str, AnyArray]], Mapping[str, AnyArray]]
"""Runs a component: inputs to outputs."""


def run_tiled(
    run: Run, feeds: Mapping[str, AnyArray], side: int, *, normed: bool = False, circular: str = ""
) -> dict[str, Array]:
    """Run a component of one input and one output on an image (N, C, H, W), tile by tile.

    Overlaps are blended linearly, first with the tile above, then with the one to the left. Group norms see one tile,
    unless ``run`` does better.

    Args:
        run: runs one tile; it scales images by the same factor everywhere.
        feeds: the one input.
        side: of a tile, in pixels of the input, a multiple of OVERLAP; an image no larger is one tile.
        normed: lets tiles end where the image does, see `tile_offsets`.
        circular: the axes, x, y or xy, along which the image goes on at its opposite border: the last tile is blended
            with the first one, too.
    """
    ((name, image),) = feeds.items()
    if max(image.shape[2:]) <= side:
        return dict(run(feeds))
    sizes = tiled_sizes(image.shape[2:], side, circular)
    rings = {axis: image.shape[axis] for axis, size in zip((2, 3), sizes, strict=True) if size > image.shape[axis]}
    for axis in rings:
        image = np.concatenate([image, np.take(image, range(side // OVERLAP), axis)], axis)
    ((output, joined),) = _run_grid(run, {name: image}, side, normed=normed).items()
    for axis, size in rings.items():
        end = joined.shape[axis] * size // image.shape[axis]
        ring = np.take(joined, range(end), axis)
        _blend(joined, ring, joined.shape[axis] - end, axis=axis)
        joined = ring
    return {output: joined}


def _run_grid(run: Run, feeds: Mapping[str, AnyArray], side: int, *, normed: bool) -> dict[str, Array]:
    ((name, image),) = feeds.items()
    (height, width), step, output = image.shape[2:], side - side // OVERLAP, ""
    rows: list[list[Array]] = []
    for top in tile_offsets(height, side, normed=normed):
        lefts = tile_offsets(width, side, normed=normed)
        pieces = [image[:, :, top : top + side, left : left + side] for left in lefts]
        results = [run({name: np.ascontiguousarray(piece)}) for piece in pieces]
        ((output, _),) = results[0].items()
        rows.append([outputs[output].copy() for outputs in results])
    first = rows[0][0].shape[2], min(side, height)
    shared, stride = (pixels * first[0] // first[1] for pixels in (side - step, step))
    for above, row in pairwise([[], *rows]):
        for upper, tile in zip(above, row, strict=False):
            _blend(upper, tile, shared, axis=2)
        for before, tile in pairwise(row):
            _blend(before, tile, shared, axis=3)
    joined = [
        np.concatenate([*(tile[:, :, :, :stride] for tile in row[:-1]), row[-1]], axis=3)[:, :, :end]
        for row, end in zip(rows, [*[stride] * (len(rows) - 1), None], strict=True)
    ]
    return {output: np.concatenate(joined, axis=2)}


def run_tiled_with_global_norms(
    run: Run, feeds: Mapping[str, AnyArray], side: int, stats_shape: tuple[int, ...], *, circular: str = ""
) -> dict[str, Array]:
    """Like `run_tiled`, but group norms see nearly the whole image.

    A norm's statistics over the image are the mean of those over tiles without overlap, if the norms before it used
    those of the image too. So all tiles are run first with each norm's statistics of the tile, then with the means of
    these. The two results lie on either side of the truth; the output is made with their mean.

    ``run`` takes NORM_STATS and USE_NORM_STATS too, and also returns MEASURED_STATS; of one image, they have the
    ``stats_shape`` (2 K, groups).
    """
    ((name, image),) = feeds.items()
    count, _, height, width = image.shape

    def run_tile(feeds: Mapping[str, AnyArray], stats: Array | None) -> dict[str, AnyArray]:
        known = np.zeros((count, *stats_shape), np.float32) if stats is None else stats
        return dict(run({**feeds, NORM_STATS: known, USE_NORM_STATS: np.array(stats is not None, np.float32)}))

    def measure(stats: Array | None) -> Array:
        mean = np.zeros((count, *stats_shape))
        for top, left in product(range(0, height, side), range(0, width, side)):
            piece = np.ascontiguousarray(image[:, :, top : top + side, left : left + side])
            mean += run_tile({name: piece}, stats)[MEASURED_STATS] * (piece[0, 0].size / (height * width))
        return mean.astype(np.float32)

    def decode(feeds: Mapping[str, AnyArray], stats: Array | None) -> dict[str, AnyArray]:
        return {output: value for output, value in run_tile(feeds, stats).items() if output != MEASURED_STATS}

    if height <= side and width <= side:
        return decode(feeds, None)
    first = measure(None)
    return run_tiled(partial(decode, stats=(first + measure(first)) / 2), feeds, side, normed=True, circular=circular)


def tile_offsets(size: int, side: int, *, normed: bool) -> range:
    """Where tiles begin along an axis of ``size`` pixels.

    diffusers also has the tiles that lie within the one before; with ``normed`` these are left out.
    """
    shared = side // OVERLAP
    return range(0, max(size - shared, 1) if normed else size, side - shared)


@dataclass(frozen=True, kw_only=True)
class Span:
    """A tile along one axis, in pixels of the input."""

    start: int
    stop: int
    keep: tuple[int, int]
    """The part of it that nothing else makes."""


def spans_with_margins(size: int, side: int, margin: int, multiple: int = 1) -> list[Span]:
    """Split an axis of ``size`` pixels into tiles of equal length that overlap.

    What is kept of a tile lies ``margin`` pixels or more from its ends, unless these are the image's. ``size`` and
    ``margin`` are multiples of ``multiple``, and so are all positions; tiles are no longer than ``side``.
    """
    if size <= side:
        return [Span(start=0, stop=size, keep=(0, size))]
    count = -(-(size - 2 * margin) // (side // multiple * multiple - 2 * margin))
    step = -(-(size - 2 * margin) // (count * multiple)) * multiple
    starts = [min(index * step, size - step - 2 * margin) for index in range(count)]
    borders = [0, *(start + margin for start in starts[1:]), size]
    kept = pairwise(borders)
    return [
        Span(start=start, stop=start + step + 2 * margin, keep=keep) for start, keep in zip(starts, kept, strict=True)
    ]


def tiled_sizes(sizes: Sequence[int], side: int, circular: str) -> list[int]:
    """How much of an image of some height and width tiles cover: along circular axes more, to be blended with."""
    return [
        size + side // OVERLAP if size > side and axis in circular else size
        for axis, size in zip("yx", sizes, strict=True)
    ]


def _blend(before: Array, tile: Array, shared: int, *, axis: int) -> None:
    """Blend the end of the tile ``before`` along an axis into the beginning of ``tile``, which is changed."""
    before, tile = np.moveaxis(before, axis, -1), np.moveaxis(tile, axis, -1)
    count = min(before.shape[-1], tile.shape[-1], shared)
    share = np.arange(count, dtype=np.float32) / np.float32(count)
    tile[..., :count] = before[..., before.shape[-1] - count :] * (1 - share) + tile[..., :count] * share
