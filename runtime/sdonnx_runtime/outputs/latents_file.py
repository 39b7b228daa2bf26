"""Files of sampled latents, to decode later or with another VAE."""

import json
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.outputs.atomic import replace_file
from sdonnx_runtime.request import CompleteRequest, Request, complete_request, generation_parameters
from sdonnx_runtime.sampling.registry import resolve_sampler
from sdonnx_runtime.validation import check_fields

_DAMAGED = (
    AttributeError, EOFError, KeyError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""Errors of reading a damaged .npz, or of another file."""


def save_latents(path: Path, latents: Array, request: CompleteRequest, model: str) -> None:
    """Write latents, (num_images, C, h, w), with their request and the package's name as numpy's ``.npz``.

    Raises:
        SdonnxError: the file can't be written.
    """
    data = json.dumps({**generation_parameters(request), "model": model}, ensure_ascii=False)
    with replace_file(path) as stream:
        np.savez(stream, latents=latents.astype(np.float32), recipe=np.array(data))


def load_latents(path: Path) -> tuple[Array, CompleteRequest, str]:
    """Read a file of `save_latents`: latents, the request without its images, and the package's name.

    Raises:
        RequestError: the file is missing, damaged, or not one of latents.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            latents, data = file["latents"], json.loads(str(file["recipe"]))
        model = data.pop("model")
        if not isinstance(model, str):
            raise TypeError(model)
        request = Request(**{name: _to_tuple(data[name]) for name in data})
    except FileNotFoundError:
        raise RequestError(f"there is no file {path}; give one that 'sdonnx run --save-latents' wrote") from None
    except _DAMAGED:
        raise RequestError(f"{path} holds no latents, or is damaged; give one that 'sdonnx run' wrote") from None
    try:
        complete = complete_request(check_fields(request))
        resolve_sampler(complete.sampler)
    except RequestError as error:
        raise RequestError(f"{path} has a damaged recipe ({error}); give a file that 'sdonnx run' wrote") from None
    if latents.ndim != 4 or latents.dtype != np.float32 or len(latents) != request.num_images:
        raise RequestError(f"{path} holds {latents.dtype} {latents.shape}; expected float32 (images, channels, h, w)")
    if not np.isfinite(latents).all():
        raise RequestError(f"{path} holds numbers that are not finite; give a file that 'sdonnx run' wrote")
    return latents, complete, model


def _to_tuple(value: Any) -> Any:
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value
