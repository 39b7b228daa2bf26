"""Files of sampled latents, to decode later or with another VAE."""

import json
import tokenize
import zipfile
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.execution.devices.computing import TYPES
from sdonnx_runtime.files.arrays_file import read_arrays
from sdonnx_runtime.files.kinds import describe_file
from sdonnx_runtime.outputs.atomic import write_file
from sdonnx_runtime.request import CompleteRequest, Prompts, Request, complete_request, generation_parameters
from sdonnx_runtime.sampling.registry import resolve_sampler
from sdonnx_runtime.storage.staging import lock_file
from sdonnx_runtime.validation import check_fields

_DAMAGED = (
    AttributeError, EOFError, KeyError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""Errors of reading a damaged .npz, or of another file."""


def save_latents(
    path: Path, latents: Array, request: CompleteRequest, model: str, *, compute: str = "f32", overwrite: bool = True,
    temporary: bool = False,
) -> Path:  # fmt: skip
    """Write latents, (num_images, C, h, w), with their request and the package's name as numpy's ``.npz``.

    Args:
        path: the file.
        latents: the latents.
        request: their request.
        model: the package's name.
        compute: what they were computed in, as of `Result`.
        overwrite: as for `write_file`.
        temporary: whether it is to be deleted once its images are saved; see `is_left_over`.

    Raises:
        SdonnxError: the file can't be written.
    """
    drawn = {"drawn": [asdict(each) for each in request.drawn]} if request.drawn else {}
    data = json.dumps({**generation_parameters(request), **drawn, "model": model}, ensure_ascii=False)
    arrays: dict[str, Any] = {"latents": latents.astype(np.float32), "recipe": np.array(data)}
    arrays |= {} if compute == "f32" else {_COMPUTE: np.array(compute)}
    arrays |= {_TEMPORARY: np.array(1)} if temporary else {}
    return write_file(path, lambda stream: np.savez(stream, **arrays), overwrite=overwrite)


_LATENTS = "give one that 'sdonnx run --save-latents' wrote"
_TEMPORARY, _COMPUTE = "temporary", "compute"


def is_left_over(path: Path) -> bool:
    """Whether a file is what a process that was killed left of `save_latents` with ``temporary``."""
    try:
        with path.open("rb+") as stream, zipfile.ZipFile(stream) as file:
            names = {f"{name}.npy" for name in ("latents", "recipe", _TEMPORARY)}
            return set(file.namelist()) - {f"{_COMPUTE}.npy"} == names and lock_file(stream) is not False
    except _DAMAGED:
        return False


def load_compute(path: Path) -> str:
    """What the latents of a file of `save_latents` were computed in, as of `Result`."""
    try:
        compute = str(read_arrays(path, (_COMPUTE,))[_COMPUTE])
    except _DAMAGED:
        return "f32"  # of which nothing is written
    return compute if compute in TYPES else "f32"


def load_latents(path: Path) -> tuple[Array, CompleteRequest, str]:
    """Read a file of `save_latents`: latents, the request without its images, and the package's name.

    Raises:
        RequestError: the file is missing, damaged, or not one of latents.
    """
    try:
        arrays = read_arrays(path, ("latents", "recipe"))
        latents, data = arrays["latents"], json.loads(str(arrays["recipe"]))
        model, drawn = data.pop("model"), tuple(Prompts(**each) for each in data.pop("drawn", ()))
        if not isinstance(model, str):
            raise TypeError(model)
        request = Request(**{name: _to_tuple(data[name]) for name in data})
    except FileNotFoundError:
        raise RequestError(f"there is no file {path}; {_LATENTS}") from None
    except _DAMAGED:
        found = describe_file(path, is_text=True)
        if found is None or "zip archive" in found:  # as the files themselves are
            found = f"holds no latents, or is damaged; {_LATENTS}"
        fact, _, remedy = found.rpartition("; ")
        raise RequestError(f"{path} {fact}; {_LATENTS if remedy.startswith('give') else remedy}") from None
    try:
        for each in drawn:
            check_fields(replace(request, prompt=each.prompt, negative_prompt=each.negative_prompt))
        complete = replace(complete_request(check_fields(request)), drawn=drawn)
        resolve_sampler(complete.sampler)
    except RequestError as error:
        raise RequestError(f"{path} has a damaged recipe ({error}); give a file that 'sdonnx run' wrote") from None
    if drawn and len(drawn) != request.num_images:
        raise RequestError(f"{path} has {len(drawn)} prompts for {request.num_images} images; expected one for each")
    if latents.ndim != 4 or latents.dtype != np.float32 or len(latents) != request.num_images:
        raise RequestError(f"{path} holds {latents.dtype} {latents.shape}; expected float32 (images, channels, h, w)")
    if not np.isfinite(latents).all():
        raise RequestError(f"{path} holds numbers that are not finite; give a file that 'sdonnx run' wrote")
    return latents, complete, model


def _to_tuple(value: Any) -> Any:
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value
