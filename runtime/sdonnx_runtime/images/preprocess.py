"""Image preprocessing: opening, resizing, outpainting canvases, masks and depth maps."""

import io
import math
import struct
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, features

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import RequestError

FITS = ("crop", "pad", "stretch")
"""How an image of another aspect ratio is resized, always with Lanczos' filter.

crop covers the size and cuts off the rest on both sides; pad fits inside and fills the rest with black; stretch
changes the aspect ratio.
"""

UPSCALERS = ("latent", "lanczos")
"""How hires fix upscales without an upscaler package: the latents, bilinearly, or the pixels."""

MAX_SIDE = 16384
"""The maximum width and height, in pixels."""

_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
"""Raster formats that are opened: those that Pillow reads without running other programs."""

_DAMAGED = (
    ArithmeticError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError,
    struct.error,
)  # fmt: skip
"""What Pillow's decoders raise for a file of another kind or a damaged one."""

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")
"""Pillow's modes of 8 bits a channel."""

_DEPTH_MODES = ("F", "I")
"""Modes without a known range, which a depth map may have."""


def open_image(
    file: Path | bytes, *, name: str | None = None, formats: tuple[str, ...] = _FORMATS, max_pixels: int | None = None
) -> Image.Image:
    """Open an image file and rotate it as its EXIF orientation says.

    Args:
        file: its path, or its content.
        name: names it in errors; None is the path.
        formats: Pillow's names of those that are opened.
        max_pixels: the most that it may have; None is Pillow's limit.

    Raises:
        RequestError: the file is missing, damaged or not an image, or has too many pixels.
    """
    path = name or ("the image" if isinstance(file, bytes) else file)
    most = (Image.MAX_IMAGE_PIXELS or 0) if max_pixels is None else max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a damaged profile or EXIF data
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            known = [each for each in formats if each in Image.OPEN]  # not every Pillow has all
            opened, size = (io.BytesIO(file), len(file)) if isinstance(file, bytes) else (file, file.stat().st_size)
            with Image.open(opened, formats=known) as image:
                if max_pixels is not None and image.width * image.height > max_pixels:
                    raise Image.DecompressionBombError
                is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
                _check_memory(image, size, copies=1 + is_turned)
                image.load()
                upright = ImageOps.exif_transpose(image) if is_turned else image
                if upright.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits, as some Pillows give them
                    return Image.fromarray(np.asarray(upright).astype(np.uint16))
                return upright
    except RequestError as error:
        raise RequestError(f"{path} {error}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RequestError(f"{path} has more than {most / 1e6:.0f} million pixels; make it smaller first") from None
    except _DAMAGED as error:
        reason = getattr(error, "strerror", None) or "it is not an image, or damaged"
        raise RequestError(f"{path} can't be read: {reason}; give a whole PNG, JPEG or WebP file") from None


def _check_memory(image: Image.Image, size: int, *, copies: int) -> None:
    """Refuse pixels out of proportion to the ``size`` of their file: a photograph has 1 to 4 bytes for 10 pixels."""
    needed = image.width * image.height * copies * (1 if image.mode in ("1", "L", "P") else 4)
    if needed > _PLENTY + _MEMORY_PER_BYTE * size:
        raise RequestError(f"has {image.width}x{image.height} pixels in {size} bytes; give it in a smaller size")


_PLENTY, _MEMORY_PER_BYTE = 180_000_000, 40
"""Bytes that any image may take in memory, and those for each byte of its file."""


def check_image(name: str, image: object) -> None:
    """Check that an image has pixels of a known range, or as a depth map finite ones.

    Raises:
        RequestError: it is no image of Pillow's, empty, of an unknown mode, or not finite.
    """
    if not isinstance(image, Image.Image):
        raise RequestError(f"{name} is {type(image).__name__}; give a PIL image, such as Image.open returns")
    if 0 in image.size:
        raise RequestError(f"{name} is empty ({image.width}x{image.height}); give an image with pixels")
    if name == "depth_image" and image.mode in _DEPTH_MODES:
        if not np.isfinite(np.asarray(image)).all():
            raise RequestError(f"{name} has pixels that are not finite; give a depth for each pixel")
    elif image.mode not in _MODES and not image.mode.startswith("I;16"):
        raise RequestError(
            f"{name} has Pillow's mode {image.mode}, which is not supported; convert it to 8 or 16 bits a channel"
        )


def suitable_size(image: Image.Image, *, area: int, multiple: int) -> tuple[int, int]:
    """Choose (width, height) for an image.

    It is the image's size, scaled down to ``area`` pixels if it has more, in multiples of ``multiple``: rounded down,
    or to the nearest if it is scaled.
    """
    shrink = math.sqrt(area / (image.width * image.height))
    if shrink >= 1:
        counts = [side // multiple for side in image.size]
    else:
        counts = [round(side * shrink / multiple) for side in image.size]
    width, height = (max(count, 1) * multiple for count in counts)
    return width, height


def resize_to_fit(image: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    """Resize an image by one of FITS; one of the size is returned as it is."""
    if image.size == size:
        return image
    if fit == "stretch":
        return image.resize(size, Image.Resampling.LANCZOS)
    fill = ImageOps.fit if fit == "crop" else ImageOps.pad
    return fill(image, size, Image.Resampling.LANCZOS)


def outpaint_canvas(
    image: Image.Image, margins: tuple[int, int, int, int], *, area: int, multiple: int
) -> tuple[Image.Image, Image.Image]:
    """Make the larger canvas for outpainting, RGB, and its mask, L, white where it is new.

    The image's edge is replicated over the margins: (left, top, right, bottom), pixels of 0 or more. A canvas of more
    than ``area`` pixels is scaled down later; the sides of others are multiples of ``multiple``.

    Raises:
        RequestError: a margin is negative, all are 0, or the canvas is too large or not of a ``multiple``.
    """
    left, top, right, bottom = margins
    if min(margins) < 0 or max(margins) == 0:
        raise RequestError(f"the margins are {margins}; give left, top, right, bottom in pixels, of 0 or more")
    width, height = image.width + left + right, image.height + top + bottom
    maximum = Image.MAX_IMAGE_PIXELS or MAX_SIDE**2
    if max(width, height) > MAX_SIDE or width * height > maximum:
        raise RequestError(
            f"the canvas has {width}x{height} pixels; use smaller margins: "
            f"the maximum is {MAX_SIDE} per side and {maximum / 1e6:.0f} million in all"
        )
    if width * height <= area and (width % multiple or height % multiple):
        more = (-width % multiple, -height % multiple)
        raise RequestError(
            f"the canvas has {width}x{height} pixels; make both multiples of {multiple}: "
            f"{more[0]} more at a side, {more[1]} more above or below"
        )
    pixels = np.pad(np.asarray(to_rgb(image)), ((top, bottom), (left, right), (0, 0)), mode="edge")
    mask = Image.new("L", (width, height), 255)
    mask.paste(0, (left, top, left + image.width, top + image.height))
    return Image.fromarray(pixels), mask


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to sRGB on a white background, from the image's color profile; without anything else that it carries."""
    plain = flatten_alpha(_to_srgb(image)).copy()
    plain.info = {}
    return plain


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return an image's colors, RGB as of `to_rgb` but without a background, and its transparency, L, if it has any."""
    if not image.has_transparency_data or image.mode.startswith("I;16"):
        return to_rgb(image), None
    layer = _to_srgb(image).convert("RGBA")
    return layer.convert("RGB"), layer.getchannel("A")


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert the colors of an image with another profile than sRGB; a damaged or unsuitable one is ignored."""
    profile = image.info.get("icc_profile")
    if not profile or not features.check("littlecms2"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        is_keyed = image.mode == "P" or "transparency" in image.info  # a color stands for others, or for none
        pixels = image.convert("RGBA" if image.has_transparency_data else "RGB") if is_keyed else image
        mode = "RGBA" if pixels.mode == "RGBA" else "RGB"
        srgb = cast("Any", ImageCms).createProfile("sRGB")
        converted = ImageCms.profileToProfile(pixels, source, srgb, outputMode=mode)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return image
    return image if converted is None else converted


def flatten_alpha(image: Image.Image) -> Image.Image:
    """Convert to RGB on a white background."""
    return _on_background(image, "white")


def to_mask(image: Image.Image) -> Image.Image:
    """Convert to an inpainting mask of mode L: 255 where the image is white and opaque, else 0.

    Gray of 128 and above is white.
    """
    return _on_background(image, "black").convert("L").point([0] * 128 + [255] * 128)


def _on_background(image: Image.Image, background: str) -> Image.Image:
    """Convert to RGB on a background colour."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)  # Pillow's own conversion clips at 255
        gray = (values / 257).round().astype(np.uint8)
        alpha = np.where(values == image.info.get("transparency", -1), 0, 255).astype(np.uint8)
        image = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)])
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")


def to_depth(image: Image.Image) -> Array:
    """Convert a depth map of 8 or 16 bits or floating point, in any unit, to (H, W), 0 to 1; brighter is nearer.

    A flat one is 0.
    """
    if image.mode not in _DEPTH_MODES and not image.mode.startswith("I;16"):
        image = flatten_alpha(image).convert("L")
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    return ((values - low) / (high - low if high > low else 1.0)).astype(np.float32)


def bicubic(values: Array, height: int, width: int) -> Array:
    """Resize (H, W) to (height, width) as torch's interpolate: bicubic without antialiasing.

    The cubic convolution has torch's a = -0.75; Pillow's has -0.5.
    """
    return _cubic(_cubic(values, height).T, width).T


def _cubic(values: Array, count: int) -> Array:
    """Resize (H, W) to (count, W)."""
    positions = (np.arange(count) + 0.5) * (len(values) / count) - 0.5
    first = np.floor(positions).astype(np.int64)
    total = np.zeros((count, values.shape[1]), np.float32)
    for tap in range(-1, 3):
        d = np.abs(positions - first - tap)
        weights = np.where(d <= 1, (1.25 * d - 2.25) * d**2 + 1, ((-0.75 * d + 3.75) * d - 6) * d + 3)
        total += weights.astype(np.float32)[:, None] * values[np.clip(first + tap, 0, len(values) - 1)]
    return total


def to_values(image: Image.Image) -> Array:
    """Convert RGB to (1, 3, H, W) in -1 to 1."""
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None]
    return pixels / np.float32(127.5) - np.float32(1)


def latent_mask(mask: Image.Image, downscale: int, *, first_pixel: bool = False) -> Array:
    """Downscale a mask to latent pixels, (1, 1, h, w): 1 if any of its pixels is white.

    With ``first_pixel``, as in diffusers, if the first one is.
    """
    white = np.asarray(mask, np.float32)  # (H, W)
    if first_pixel:
        latent_pixels = white[::downscale, ::downscale]
    else:
        height, width = white.shape
        latent_pixels = white.reshape(height // downscale, downscale, width // downscale, downscale).max(axis=(1, 3))
    return (latent_pixels[None, None] > 0).astype(np.float32)


def snap_mask_to_latents(mask: Image.Image, downscale: int) -> Image.Image:
    """Expand a mask to whole latent pixels, so that `latent_mask` is the same with and without ``first_pixel``."""
    latent_pixels = latent_mask(mask, downscale)[0, 0] * 255
    return Image.fromarray(latent_pixels.astype(np.uint8)).resize(mask.size, Image.Resampling.NEAREST)


def blur_mask_inward(mask: Image.Image, pixels: int) -> Image.Image:
    """Fade a mask out towards its edge over some pixels, inwards: what was 0 stays 0.

    The mean of the mask and of its erosions by 1, 2, … ``pixels``; Pillow's MinFilter takes four times as long.
    """
    eroded = np.pad(np.asarray(mask, np.float32), 1, mode="edge")
    total = eroded.copy()
    for _ in range(pixels):
        across = np.minimum(eroded[:-2], np.minimum(eroded[1:-1], eroded[2:]))
        inner = np.minimum(across[:, :-2], np.minimum(across[:, 1:-1], across[:, 2:]))
        eroded = np.pad(inner, 1, mode="edge")
        total += eroded
    return Image.fromarray((total[1:-1, 1:-1] / (pixels + 1)).round().astype(np.uint8))


_SUPPORT = 3
"""The most pixels to either side that a pixel is made of where an image is not reduced: Lanczos'."""


def resize(image: Image.Image, size: tuple[int, int], filter_: Image.Resampling, circular: str = "") -> Image.Image:
    """Resize an image to (width, height); along x, y or xy, ``circular``, it goes on at the opposite border."""
    if not circular:
        return image.resize(size, filter_)
    pixels = np.asarray(image)
    left, top = (
        math.ceil(_SUPPORT * max(1, before / after)) if axis in circular else 0
        for axis, before, after in zip("xy", image.size, size, strict=True)
    )
    around = [(top, top), (left, left), *[(0, 0)] * (pixels.ndim - 2)]
    box = (left, top, left + image.width, top + image.height)
    return Image.fromarray(np.pad(pixels, around, mode="wrap")).resize(size, filter_, box)


def to_images(values: Array) -> tuple[Image.Image, ...]:
    """Convert (N, 3, H, W) to RGB images; values outside of -1 to 1 are clipped."""
    scaled = np.clip(values / 2 + 0.5, 0.0, 1.0).transpose(0, 2, 3, 1)  # (N, H, W, 3)
    return tuple(Image.fromarray(pixels) for pixels in (scaled * 255).round().astype(np.uint8))
