"""Sampled latents in a file, so that a decode that fails, or another VAE, can have them later."""

import json
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.outputs.atomic import replacing
from sdonnx_runtime.request import Request, generation_parameters
from sdonnx_runtime.validation import check_recipe

_DAMAGED = (
    AttributeError, EOFError, KeyError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What reading a foreign or damaged .npz can end in."""


def save_latents(path: Path, latents: Array, request: Request, model: str) -> None:
    """Writes latents and the recipe that they were made by, as numpy's ``.npz``; whole or not at all.

    Args:
        path: the file, an .npz.
        latents: (num_images, C, h, w), as the sampler left them.
        request: the request with every choice made.
        model: name of the package.

    Raises:
        SdonnxError: the place can't be written to.
    """
    data = json.dumps({**generation_parameters(request), "model": model}, ensure_ascii=False)
    with replacing(path) as stream:
        np.savez(stream, latents=latents.astype(np.float32), recipe=np.array(data))


def load_latents(path: Path) -> tuple[Array, Request, str]:
    """Latents, request and model's name of a file that `save_latents` wrote; the request without its pictures.

    Raises:
        RequestError: there is no such file, or it is another one or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            latents, data = file["latents"], json.loads(str(file["recipe"]))
        model = data.pop("model")
        if not isinstance(model, str):
            raise TypeError(model)
        request = Request(**{name: _hashable(data[name]) for name in data})
    except FileNotFoundError:
        raise RequestError(f"there is no file {path}; give one that 'sdonnx run --save-latents' wrote") from None
    except _DAMAGED:
        raise RequestError(f"{path} holds no latents, or is damaged; give one that 'sdonnx run' wrote") from None
    try:
        check_recipe(request)
    except RequestError as error:
        raise RequestError(f"{path} has a damaged recipe ({error}); give a file that 'sdonnx run' wrote") from None
    if latents.ndim != 4 or latents.dtype != np.float32 or len(latents) != request.num_images:
        raise RequestError(f"{path} holds {latents.dtype} {latents.shape}; expected float32 (images, channels, h, w)")
    if not np.isfinite(latents).all():
        raise RequestError(f"{path} holds numbers that are not finite; give a file that 'sdonnx run' wrote")
    return latents, request, model


def _hashable(value: Any) -> Any:
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value
