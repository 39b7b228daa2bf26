"""Forms of edits and variations: their texts, the image and the mask."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request

from sdonnx.server.images import read_image
from sdonnx.server.openai.errors import ApiError
from sdonnx.server.openai.fields import FormText, naming
from sdonnx.server.settings import Settings

_MAX_FILES, _MAX_TEXTS = 18, 100
"""Parts of a form; OpenAI takes 16 images, a mask and a markup."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A form that was read."""

    texts: Mapping[str, FormText]
    images: Mapping[str, Image.Image]
    """Fields of a `Request`: ``image``, and ``mask_image`` where there is a mask."""


async def read_upload(request: Request, settings: Settings) -> Upload:
    """Read a form with an image and perhaps a mask.

    Raises:
        ApiError: it is no form, or an image is missing, damaged or not supported.
        HTTPException: it has too many or too large parts, or is damaged.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raise ApiError(
            f"the content type is {media_type or 'missing'}; send multipart/form-data with an image",
            code="unsupported_content_type",
        )
    limits = {"max_files": _MAX_FILES, "max_fields": _MAX_TEXTS, "max_part_size": settings.max_body}
    async with request.form(**limits) as form:
        texts = {name: FormText(value) for name, value in form.multi_items() if isinstance(value, str)}
        files = {name: await part.read() for name, part in _files(form).items()}
    return Upload(texts=texts, images=await asyncio.to_thread(_decode, files, settings.max_pixels))


def _files(form: FormData) -> dict[str, UploadFile]:
    """The image and the mask; raises ApiError."""
    images = form.getlist("image") + form.getlist("image[]")
    if not images:
        raise ApiError("image is missing; send a PNG, JPEG or WebP", param="image", code="missing_required_parameter")
    if len(images) > 1:
        raise ApiError(f"{len(images)} images were sent; local models edit one image at a time", param="image")
    if "markup" in form:
        raise ApiError("markup is not supported; send a mask instead", param="markup")
    files: dict[str, Any] = {"image": images[0]} | ({"mask": form["mask"]} if form.get("mask") else {})
    for name, part in files.items():
        if not isinstance(part, UploadFile):
            raise ApiError(f"{name} is a text; send it as a file, with a file name", param=name, code="invalid_type")
    return files


def _decode(files: Mapping[str, bytes], max_pixels: int) -> dict[str, Image.Image]:
    with naming("image"):
        image = read_image(files["image"], "image", max_pixels=max_pixels)
    if "mask" not in files:
        return {"image": image}
    with naming("mask"):
        mask = read_image(files["mask"], "mask", max_pixels=max_pixels)
    return {"image": image, "mask_image": _repainting_mask(mask, image.size)}


def _repainting_mask(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Convert OpenAI's mask, which is transparent where the image is repainted, to one that is white there.

    Raises:
        ApiError: it has another size than the image, or nothing is transparent.
    """
    if mask.size != size:
        sizes = ["x".join(map(str, each)) for each in (mask.size, size)]
        raise ApiError(f"mask has {sizes[0]} pixels, image has {sizes[1]}; give a mask of its size", param="mask")
    repainted = mask.convert("RGBA").getchannel("A").point([255] + [0] * 255)
    if repainted.getbbox() is None:
        raise ApiError("mask has no transparent pixels; make transparent what is to be repainted", param="mask")
    return repainted
