"""Run an upscaler's component on an image, in tiles that overlap by what their result depends on."""

from collections.abc import Callable
from itertools import product
from math import prod
from typing import TypeAlias

import numpy as np
from PIL import Image

from sdonnx_runtime.arrays import AnyArray, Array
from sdonnx_runtime.errors import PackageError, RequestError
from sdonnx_runtime.execution.components import UPSCALER, Runner
from sdonnx_runtime.execution.strategy import UPSCALER_TILES
from sdonnx_runtime.execution.tiling import Span, spans_with_margins
from sdonnx_runtime.packages.upscaler_config import UpscalerConfig, margins, padded_size

COMPONENT = f"{UPSCALER}upscaler"
"""An upscaler's component in a pipeline."""

OnTile: TypeAlias = Callable[[int, int], None]
"""Receives the number of tiles that are done, and that of all."""

MAX_RESULT_SIDE = 32768
"""The maximum width and height of what an upscaler makes, in pixels."""


def upscale_rgb(
    run: Runner,
    config: UpscalerConfig,
    image: Image.Image,
    *,
    component: str = COMPONENT,
    circular: str = "",
    on_tile: OnTile | None = None,
) -> Image.Image:
    """Upscale an RGB image by the model's factor.

    Where the model takes multiples of some pixels, the image is reflected at the right and below, as in Real-ESRGAN's
    code, and the result is cropped.

    Args:
        run: runs the component, in tiles of the size that its strategy has.
        config: the upscaler's.
        image: of any size.
        component: its name.
        circular: the axes, x, y or xy, along which the image goes on at its opposite border.
        on_tile: is called after each tile with the number of those that are done, and of all.

    Raises:
        RequestError: the result would be too large.
        PackageError, DeviceError: as `Runner` does.
    """
    scale, (width, height) = config.scale, image.size
    check_result_size(width * scale, height * scale)
    top, left = margins(config, circular)
    around = np.pad(np.asarray(image), [(top, top), (left, left), (0, 0)], mode="wrap")
    more = [(0, -side % config.multiple) for side in around.shape[:2]]
    pixels = np.pad(around, [*more, (0, 0)], mode="reflect")  # (H, W, 3)
    rows, columns = _spans(run, config, image.size, component, circular)
    result = np.empty((pixels.shape[0] * scale, pixels.shape[1] * scale, 3), np.uint8)
    for done, (row, column) in enumerate(product(rows, columns), 1):
        tile = pixels[row.start : row.stop, column.start : column.stop]
        upscaled = _run_tile(run, component, tile, scale)  # (3, scale h, scale w)
        (kept_rows, rows_of_image), (kept_columns, columns_of_image) = (_places(span, scale) for span in (row, column))
        for channel, values in enumerate(upscaled[:, kept_rows, kept_columns]):
            result[rows_of_image, columns_of_image, channel] = _to_bytes(values)
        if on_tile is not None:
            on_tile(done, len(rows) * len(columns))
    return Image.fromarray(result[top * scale :, left * scale :][: height * scale, : width * scale])


def count_tiles(
    run: Runner, config: UpscalerConfig, size: tuple[int, int], *, component: str = COMPONENT, circular: str = ""
) -> int:
    """Count the tiles of `upscale_rgb` for an image of (width, height)."""
    return prod(len(spans) for spans in _spans(run, config, size, component, circular))


def check_result_size(width: int, height: int) -> None:
    """Raise RequestError if a result is too large."""
    if max(width, height) > MAX_RESULT_SIDE:
        raise RequestError(
            f"the upscaled image would have {width}x{height} pixels; the maximum is {MAX_RESULT_SIDE} per side; "
            "give a smaller image or a smaller scale"
        )


def _spans(
    run: Runner, config: UpscalerConfig, size: tuple[int, int], component: str, circular: str
) -> tuple[list[Span], list[Span]]:
    """The tiles' rows and columns for an image of (width, height)."""
    side = run.components.strategy(component).tile or UPSCALER_TILES[0]
    padded = padded_size(config, size, circular)
    rows, columns = (spans_with_margins(each, side, config.margin, config.multiple) for each in padded)
    return rows, columns


def _run_tile(run: Runner, component: str, tile: AnyArray, scale: int) -> Array:
    """Upscale a tile, (h, w, 3) in bytes, to (3, scale h, scale w) in about 0..1."""
    values = tile.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
    outputs = [*run(component, {"image": values}).values()]
    expected = 1, 3, tile.shape[0] * scale, tile.shape[1] * scale
    if [each.shape for each in outputs] != [expected]:
        package, _ = run.components.find(component)
        shapes = ", ".join(str(each.shape) for each in outputs)
        raise PackageError(
            f"{package.root}: the upscaler returns {shapes or 'nothing'}; expected {expected}; export again"
        )
    return outputs[0][0]


def _places(span: Span, scale: int) -> tuple[slice, slice]:
    """Where what is kept of a tile is in the tile's result, and in the image's."""
    first, start, stop = (each * scale for each in (span.start, *span.keep))
    return slice(start - first, stop - first), slice(start, stop)


def _to_bytes(values: Array) -> AnyArray:
    """Convert 0..1 to bytes; values outside are clipped."""
    scaled = values * np.float32(255)
    np.clip(np.rint(scaled, out=scaled), 0, 255, out=scaled)
    return scaled.astype(np.uint8)
