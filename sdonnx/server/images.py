"""Finished images on disk, and the images that clients send."""

import base64
import binascii
import io
import os
import re
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from PIL import ExifTags, Image
from sdonnx_runtime.arrays import Array
from sdonnx_runtime.files.json_file import parse_json
from sdonnx_runtime.images.preprocess import open_image
from sdonnx_runtime.outputs.atomic import write_file
from sdonnx_runtime.outputs.latents_file import save_latents
from sdonnx_runtime.outputs.metadata import png_text
from sdonnx_runtime.outputs.provenance import read_xmp
from sdonnx_runtime.request import CompleteRequest
from sdonnx_runtime.storage.staging import remove_stale

import sdonnx
from sdonnx.server.errors import NotFound

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
"""Pillow's names of the formats that are read and written."""

MEDIA_TYPES = {name: f"image/{name}" for name in FORMATS}

_JPEG_INFOTEXT = 16_000
"""Characters, of up to 4 bytes, that surely fit a JPEG's EXIF segment of 64 KiB."""

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,")


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """A finished image."""

    name: str
    job: str
    index: int
    """Which of its job's images, from 0."""
    created: str
    """Local time, ``YYYYMMDD-HHMMSS``."""


class ImageStore:
    """A directory of finished images, whose names are the index: there is no other file that could be torn or stale.

    Every image carries its own parameters (`sdonnx.save_png`), and appears whole or not at all. Several servers may use
    one directory. ``provenance`` is as for `sdonnx.save_png`.

    Raises:
        SdonnxError: the directory can't be made or read.
    """

    def __init__(self, folder: Path, *, provenance: bool = True) -> None:
        self.folder, self._provenance = folder, provenance
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_stale(folder)
            next(folder.iterdir(), None)
        except OSError as error:
            raise sdonnx.SdonnxError(f"{folder} can't be used: {error.strerror}; give another --output") from None

    def save(self, job: str, result: sdonnx.Result) -> list[str]:
        """Save the images of a result that are not refused; returns their names.

        Raises:
            SdonnxError: a file can't be written.
        """
        stamp, names = time.strftime(_STAMP), list[str]()
        for index in range(len(result.images)):
            if index in result.refused:
                continue
            path = self.folder / f"{stamp}-{job}-{index}.png"
            with self._in_folder():
                saved = sdonnx.save_png(result, index, path, overwrite=False, provenance=self._provenance)
                names.append(saved.name)
        return names

    def save_pngs(self, job: str, pngs: Mapping[int, bytes]) -> list[str]:
        """Save images that are PNG files already, by their index, as `save` does."""
        stamp, names = time.strftime(_STAMP), list[str]()
        for index, png in pngs.items():
            path = self.folder / f"{stamp}-{job}-{index}.png"
            with self._in_folder():
                names.append(write_file(path, lambda stream, png=png: stream.write(png), overwrite=False).name)
        return names

    def save_latents(self, job: str, latents: Array, request: CompleteRequest, model: str, compute: str) -> str:
        """Save the latents of a job whose images could not be made, for ``sdonnx decode``; returns the file's name.

        Raises:
            SdonnxError: the file can't be written.
        """
        path = self.folder / f"{time.strftime(_STAMP)}-{job}.npz"
        with self._in_folder():
            return save_latents(path, latents, request, model, compute=compute, overwrite=False).name

    def find(self, name: str) -> StoredImage:
        """Find an image by its name; raises NotFound."""
        found = _parse(name)
        if found is None or not (self.folder / name).is_file():
            raise NotFound("there is no such image")
        return found

    def read(self, name: str) -> bytes:
        """Read an image's PNG file; raises NotFound."""
        found = self.find(name)
        try:
            return (self.folder / found.name).read_bytes()
        except FileNotFoundError:
            raise NotFound("this image was deleted") from None
        except OSError as error:
            raise sdonnx.SdonnxError(f"{name} can't be read: {error.strerror}") from None

    def prompt(self, name: str) -> str | None:
        """Read the prompt of an image; None if it has none, or can't be read."""
        try:
            with Image.open(self.folder / self.find(name).name, formats=("PNG",)) as image:
                data = parse_json(str(image.info.get("sdonnx", "null")).encode())
        except (NotFound, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None
        found = cast("dict[str, Any]", data).get("prompt") if isinstance(data, dict) else None
        return found if isinstance(found, str) else None

    def delete(self, name: str) -> None:
        """Delete an image; raises NotFound."""
        try:
            (self.folder / self.find(name).name).unlink(missing_ok=True)
        except OSError as error:
            raise sdonnx.SdonnxError(f"{name} can't be deleted: {error.strerror}") from None

    def latest(self, count: int, *, before: str | None = None) -> list[StoredImage]:
        """List images, the newest first; ``before`` is the name of the last one on the page before."""
        images = sorted(self._images(), key=_order, reverse=True)
        if before is not None:
            last = _parse(before)
            images = [] if last is None else [each for each in images if _order(each) < _order(last)]
        return images[:count]

    def of_job(self, job: str) -> list[StoredImage]:
        """List the images of a job, also of one before the server's start."""
        return sorted((each for each in self._images() if each.job == job), key=_order)

    def _images(self) -> list[StoredImage]:
        try:
            names = os.listdir(self.folder)  # noqa: PTH208 — Path.iterdir makes a Path of each file of a large directory
        except OSError:  # somebody deleted it: so it has no images
            return []
        return [each for each in map(_parse, names) if each is not None]

    @contextmanager
    def _in_folder(self) -> Generator[None, None, None]:
        """Make the directory again if somebody deleted it; clients don't learn where it is."""
        try:
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except sdonnx.SdonnxError as error:
            raise sdonnx.SdonnxError(str(error).replace(f"{self.folder}{os.sep}", "")) from None


def is_job_id(text: str) -> bool:
    """Whether a text can name a job, and its files."""
    return re.fullmatch(_JOB, text) is not None


_JOB = r"[A-Za-z0-9_()-]{1,64}"
_NAME = re.compile(rf"(?P<time>\d{{8}}-\d{{6}})-(?P<job>{_JOB})-(?P<index>\d{{1,5}})\.png", re.ASCII)
_STAMP = "%Y%m%d-%H%M%S"


def _parse(name: str) -> StoredImage | None:
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    return StoredImage(name=name, job=match["job"], index=int(match["index"]), created=match["time"])


def _order(image: StoredImage) -> tuple[str, str, int]:
    return image.created, image.job, image.index


def decode_image(text: str, field: str, *, max_pixels: int) -> Image.Image:
    """Decode an image from base64, bare or as a data URL.

    Args:
        text: what the client sent.
        field: names it in errors.
        max_pixels: the most that it may have.

    Raises:
        RequestError: it is a URL, not base64, not a PNG, JPEG or WebP, or has too many pixels.
    """
    if re.match(r"[a-z]+://", text[:20], re.IGNORECASE):
        raise sdonnx.RequestError(f"{field} is a URL, which the server does not fetch; send the image in base64")
    match = _DATA_URL.match(text[:100])
    try:
        data = base64.b64decode(text[match.end() if match else 0 :], validate=False)
    except (binascii.Error, ValueError):
        raise sdonnx.RequestError(f"{field} is not base64; send a PNG, JPEG or WebP in base64") from None
    return read_image(data, field, max_pixels=max_pixels)


def read_image(data: bytes, field: str, *, max_pixels: int) -> Image.Image:
    """Read a PNG, JPEG or WebP; raises as `decode_image` does."""
    return open_image(data, name=field, formats=tuple(FORMATS.values()), max_pixels=max_pixels)


def encode_image(
    image: Image.Image, form: str, *, quality: int = 90, infotext: str | None = None, xmp: str | None = None
) -> bytes:
    """Encode an image in one of FORMATS.

    Args:
        image: RGB.
        form: a key of FORMATS.
        quality: 0 to 100, of JPEG and WebP.
        infotext: A1111's parameters, written to EXIF's UserComment of JPEG and WebP, and to PNG's text; a JPEG is
            without one that it can't hold.
        xmp: an XMP packet.
    """
    stream = io.BytesIO()
    options: dict[str, Any]
    if form == "png":
        options = {"pnginfo": png_text({} if infotext is None else {"parameters": infotext}, xmp)}
    else:
        options = {"quality": quality} | ({} if xmp is None else {"xmp": xmp.encode()})
        if infotext is not None and (form != "jpeg" or len(infotext) <= _JPEG_INFOTEXT):
            exif = Image.Exif()
            exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + infotext.encode("utf-16-be")
            options["exif"] = exif
    image.save(stream, format=FORMATS[form], **options)
    return stream.getvalue()


def convert_png(png: bytes, form: str, *, quality: int = 90, side: int | None = None) -> bytes:
    """Convert a PNG file to one of FORMATS, with its infotext and its XMP packet.

    ``side`` makes it smaller: the longer side will have at most so many pixels. The others are as `encode_image`'s.
    """
    if form == "png" and side is None:
        return png
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        if side is not None:
            image.thumbnail((side, side))
        infotext, xmp = image.info.get("parameters"), read_xmp(image)
        return encode_image(image, form, quality=quality, infotext=infotext, xmp=xmp)


def encode_preview(image: Image.Image, size: Sequence[int]) -> bytes:
    """Encode a preview as PNG, enlarged to (width, height) if it is smaller."""
    stream = io.BytesIO()
    width, height = size
    (image if image.size == (width, height) else image.resize((width, height))).save(stream, format="PNG")
    return stream.getvalue()
