"""An open file of tensors, each read on demand from its place in the file."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.files.dtypes import stored_dtype, widen

MAX_DIMENSIONS = 8
"""Dimensions of a tensor; those of weights have 5 at most."""


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """An open tensor file."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    """By tensor name."""
    dtypes: Mapping[str, str]
    """As the file stores them, in the safetensors format's names: F32, F16, BF16, F8_E4M3, I64, …"""
    metadata: Mapping[str, str]
    """A safetensors file's ``__metadata__``; the other strings and integers of a file of torch."""
    load: Callable[[str], AnyArray]
    """Reads a tensor by name; float16, float32 and integers as stored, other floating point as float32.

    It raises RequestError if the dtype is not supported, or the file has changed."""

    def read(self, name: str) -> AnyArray:
        """Read a tensor by name, floating point as float32."""
        data = self.load(name)
        return data.astype(np.float32, copy=False) if data.dtype.kind == "f" else data


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """The place of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte of the file where its first element is."""
    strides: tuple[int, ...] | None = None
    """Elements from one index to the next of each dimension; None where rows follow each other."""
    big_endian: bool = False

    @property
    def span(self) -> int:
        """Elements from the first to the last in the file."""
        if 0 in self.shape:
            return 0
        if self.strides is None:
            return math.prod(self.shape)
        return 1 + sum((side - 1) * step for side, step in zip(self.shape, self.strides, strict=True))


def stored_tensors(path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> TensorFile:
    """Make the `TensorFile` of places in a file.

    Raises:
        RequestError: a tensor has too many dimensions.
    """
    for name, tensor in tensors.items():
        if len(tensor.shape) > MAX_DIMENSIONS:
            raise RequestError(
                f"{path}: '{name}' has {len(tensor.shape)} dimensions; expected {MAX_DIMENSIONS} at most; "
                "download it again or give another file"
            )

    def load(name: str) -> AnyArray:
        return _load(path, name, tensors[name])

    return TensorFile(
        path=path,
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        dtypes={name: tensor.dtype for name, tensor in tensors.items()},
        metadata=metadata,
        load=load,
    )


def _load(path: Path, name: str, tensor: StoredTensor) -> AnyArray:
    dtype = stored_dtype(tensor.dtype, big_endian=tensor.big_endian)
    if dtype is None:
        raise RequestError(
            f"{path}: the dtype {tensor.dtype} of '{name}' is not supported; give a file of fp32, fp16, bf16 or fp8"
        )
    try:
        elements = np.fromfile(path, dtype, tensor.span, offset=tensor.start)
        if len(elements) < tensor.span:
            raise ValueError("it ends before the tensor")
        if tensor.strides is None:
            stored = elements.reshape(tensor.shape)
        else:
            strides = [step * dtype.itemsize for step in tensor.strides]
            stored = np.ascontiguousarray(np.lib.stride_tricks.as_strided(elements, tensor.shape, strides))
        return widen(stored.reshape(tensor.shape), tensor.dtype)
    except (OSError, ValueError, MemoryError) as error:
        raise RequestError(f"{path}: '{name}' can't be read ({error}); download the file again") from None
