"""Pictures that come in: opening them, fitting them to the model, and the masks that say what is painted anew."""

import math
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import RequestError

FITS = ("crop", "pad", "stretch")
"""How a picture of another shape is brought to the size asked for; always with Lanczos' filter.

crop scales it until it covers the size and cuts off the rest on both sides; pad scales it until it lies inside and
fills the rest with black; stretch changes its proportions.
"""

UPSCALERS = ("latent", "lanczos")
"""How what the first of two passes made is enlarged: as latents, bilinearly, or as pixels."""

MAX_SIDE = 16384
"""The widest and highest that is worked in, pixels."""

_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
"""What is opened: raster formats that Pillow reads by itself, without running other programs on the file."""

_DAMAGED = (
    ArithmeticError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError,
    struct.error,
)  # fmt: skip
"""What Pillow's decoders end in over a foreign or damaged file."""

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")
"""Pillow's modes of 8 bits a channel."""


def open_image(path: Path) -> Image.Image:
    """A picture from a file, upright as its camera was held.

    Raises:
        RequestError: there is no such file, it holds no whole picture, or one of too many pixels to be honest.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            formats = [name for name in _FORMATS if name in Image.OPEN]  # not every Pillow has all
            with Image.open(path, formats=formats) as picture:
                upright = ImageOps.exif_transpose(picture)
                if upright.mode == "I" and picture.format in ("PNG", "PPM"):  # 16 bits, as some Pillows give them
                    return Image.fromarray(np.asarray(upright).astype(np.uint16))
                return upright
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        most = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise RequestError(f"{path} has more than {most:.0f} million pixels; make it smaller first") from None
    except _DAMAGED as error:
        reason = getattr(error, "strerror", None) or "it is no picture, or a damaged one"
        raise RequestError(f"{path} can't be read: {reason}; give a whole PNG, JPEG or WebP file") from None


def check_image(name: str, picture: Image.Image) -> None:
    """Finds out whether a picture's pixels can be read.

    Raises:
        RequestError: it has none, or their range is not known.
    """
    if 0 in picture.size:
        raise RequestError(f"{name} has {picture.width}x{picture.height} pixels; give one that has any")
    if picture.mode not in _MODES and not picture.mode.startswith("I;16"):
        raise RequestError(
            f"{name} has pixels of Pillow's mode {picture.mode}, whose range is not known; "
            "convert it to 8 or 16 bits a channel"
        )


def suitable_size(picture: Image.Image, *, area: int, multiple: int) -> tuple[int, int]:
    """(width, height) to work in where none was asked for.

    The picture's own size, scaled down to ``area`` pixels where it has more, and to multiples of ``multiple``: down
    for a picture that keeps its size, to the nearest for one that does not.
    """
    shrink = math.sqrt(area / (picture.width * picture.height))
    if shrink >= 1:
        cells = [side // multiple for side in picture.size]
    else:
        cells = [round(side * shrink / multiple) for side in picture.size]
    width, height = (max(count, 1) * multiple for count in cells)
    return width, height


def resize_to_fit(picture: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    """The picture in another size by one of FITS; one that has the size is left as it is."""
    if picture.size == size:
        return picture
    if fit == "stretch":
        return picture.resize(size, Image.Resampling.LANCZOS)
    fill = ImageOps.fit if fit == "crop" else ImageOps.pad
    return fill(picture, size, Image.Resampling.LANCZOS)


def outpaint_canvas(
    picture: Image.Image, margins: tuple[int, int, int, int], *, area: int, multiple: int
) -> tuple[Image.Image, Image.Image]:
    """For outpainting: the picture on a larger canvas, RGB, and the mask, L, that is white where it is new.

    Args:
        picture: what is in the middle; its edge's colours are drawn out to the canvas' edge.
        margins: (left, top, right, bottom), pixels of 0 or more.
        area: pixels up to which a canvas is worked in as it is; a larger one is scaled down.
        multiple: what the sides of one that keeps its size have to be multiples of.

    Raises:
        RequestError: a margin is negative, all are 0, or the canvas has another size, or is too large.
    """
    left, top, right, bottom = margins
    if min(margins) < 0 or max(margins) == 0:
        raise RequestError(f"the margins are {margins}; give left, top, right, bottom in pixels, of 0 or more")
    width, height = picture.width + left + right, picture.height + top + bottom
    most = Image.MAX_IMAGE_PIXELS or MAX_SIDE**2
    if max(width, height) > MAX_SIDE or width * height > most:
        raise RequestError(
            f"the canvas has {width}x{height} pixels; take smaller margins: "
            f"it may have {MAX_SIDE} a side and {most / 1e6:.0f} million in all"
        )
    if width * height <= area and (width % multiple or height % multiple):
        more = (-width % multiple, -height % multiple)
        raise RequestError(
            f"the canvas has {width}x{height} pixels; make both multiples of {multiple}: "
            f"{more[0]} more at a side, {more[1]} more above or below"
        )
    pixels = np.pad(np.asarray(flatten_alpha(picture)), ((top, bottom), (left, right), (0, 0)), mode="edge")
    mask = Image.new("L", (width, height), 255)
    mask.paste(0, (left, top, left + picture.width, top + picture.height))
    return Image.fromarray(pixels), mask


def flatten_alpha(picture: Image.Image) -> Image.Image:
    """RGB; what shows through lies on white."""
    return _on(picture, "white")


def to_mask(picture: Image.Image) -> Image.Image:
    """What is painted anew, as a picture of mode L: 255 where the given one is white and opaque, else 0.

    Gray counts as white from the middle on; transparent parts are kept.
    """
    return _on(picture, "black").convert("L").point([0] * 128 + [255] * 128)


def _on(picture: Image.Image, background: str) -> Image.Image:
    """RGB; what shows through lies on a colour."""
    if picture.mode.startswith("I;16"):
        picture = _eight_bit(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")


def _eight_bit(picture: Image.Image) -> Image.Image:
    """Gray of 16 bits as LA: Pillow's conversion would cut off what is above 255."""
    values = np.asarray(picture).astype(np.uint16)
    transparent = values == picture.info.get("transparency", -1)
    gray = (values / 257).round().astype(np.uint8)
    return Image.merge("LA", [Image.fromarray(gray), Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8))])


def to_depth(picture: Image.Image) -> Array:
    """(H, W): a depth map's gray, of 8 or 16 bits or floating point, in whatever unit; brighter is nearer."""
    if picture.mode not in ("F", "I") and not picture.mode.startswith("I;16"):
        picture = flatten_alpha(picture).convert("L")
    return np.asarray(picture).astype(np.float32)


def bicubic(values: Array, height: int, width: int) -> Array:
    """(H, W) to (height, width) as torch's interpolate: cubic convolution with a = -0.75, not smoothed before."""
    return _cubic(_cubic(values, height).T, width).T


def _cubic(values: Array, count: int) -> Array:
    """(H, W) to (count, W)."""
    places = (np.arange(count) + 0.5) * (len(values) / count) - 0.5
    first = np.floor(places).astype(np.int64)
    total = np.zeros((count, values.shape[1]), np.float32)
    for tap in range(-1, 3):
        away = np.abs(places - first - tap)
        weights = np.where(away <= 1, (1.25 * away - 2.25) * away**2 + 1, ((-0.75 * away + 3.75) * away - 6) * away + 3)
        total += weights.astype(np.float32)[:, None] * values[np.clip(first + tap, 0, len(values) - 1)]
    return total


def to_values(picture: Image.Image) -> Array:
    """RGB to (1, 3, H, W) in -1..1."""
    pixels = np.asarray(picture, np.float32).transpose(2, 0, 1)[None]
    return pixels / np.float32(127.5) - np.float32(1)


def latent_mask(mask: Image.Image, downscale: int, *, first_pixel: bool = False) -> Array:
    """(1, 1, h, w), 1 for latent cells that are painted anew: those of which any pixel is.

    With ``first_pixel`` those of which the first pixel is, as in diffusers.
    """
    painted = np.asarray(mask, np.float32)  # (H, W)
    if first_pixel:
        cells = painted[::downscale, ::downscale]
    else:
        height, width = painted.shape
        cells = painted.reshape(height // downscale, downscale, width // downscale, downscale).max(axis=(1, 3))
    return (cells[None, None] > 0).astype(np.float32)


def snap_mask_to_latents(mask: Image.Image, downscale: int) -> Image.Image:
    """The mask grown to whole latent cells, for which all of `latent_mask`'s rules say the same."""
    cells = latent_mask(mask, downscale)[0, 0] * 255
    return Image.fromarray(cells.astype(np.uint8)).resize(mask.size, Image.Resampling.NEAREST)


def blur_mask_inward(mask: Image.Image, pixels: int) -> Image.Image:
    """The mask fading out towards its edge over some pixels, inwards: what was 0 stays 0.

    The mean of the mask and of what is left of it when 1, 2, … ``pixels`` are taken off all around.
    """
    left = np.pad(np.asarray(mask, np.float32), 1, mode="edge")
    total = left.copy()
    for _ in range(pixels):
        rows = np.minimum(left[:-2], np.minimum(left[1:-1], left[2:]))
        smaller = np.minimum(rows[:, :-2], np.minimum(rows[:, 1:-1], rows[:, 2:]))
        left = np.pad(smaller, 1, mode="edge")
        total += left
    return Image.fromarray((total[1:-1, 1:-1] / (pixels + 1)).round().astype(np.uint8))


def to_images(pictures: Array) -> tuple[Image.Image, ...]:
    """(N, 3, H, W) in -1..1 to RGB pictures; what lies outside is clipped."""
    scaled = np.clip(pictures / 2 + 0.5, 0.0, 1.0).transpose(0, 2, 3, 1)  # (N, H, W, 3)
    return tuple(Image.fromarray(picture) for picture in (scaled * 255).round().astype(np.uint8))
