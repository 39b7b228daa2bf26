"""Open a GGUF file of stable-diffusion.cpp or ComfyUI-GGUF, whose tensors are dequantized when they are read.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.files.tensor_file import TensorFile

from sdonnx_export.checkpoints.gguf.blocks import BLOCKS, TYPES, block_elements, dequantize, num_bytes

MAGIC = b"GGUF"

_ARCHITECTURES = ("sd1", "sd2", "sdxl", "pig", "cow")
"""Of Stable Diffusion, and what converters write into files of any model. stable-diffusion.cpp writes none."""

_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Key of the shape of a tensor that is stored in rows of 256; the tensor's name follows."""

_VERSIONS = (2, 3)
_MAX_HEADER = 100_000_000
_MAX_VALUES = 2_000_000
"""Bytes and values of a header. They bound what parsing takes."""

_MAX_DIMENSIONS = 4
"""As in ggml."""

_NUMBERS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""The format's types of a number, and `struct`'s."""

_STRING, _ARRAY = 8, 9


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does; False if it can't be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def open_gguf(path: Path) -> TensorFile:
    """Open a GGUF file; tensors are read and dequantized on demand.

    Its shapes are PyTorch's, with rows last; its metadata are the strings.

    Raises:
        ExportError: it is damaged, of another architecture, or has tensors of a type that can't be converted.
    """
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            header = _Header(stream, size)
            fields, tensors = _read_header(header)
            start = _aligned(header.position, fields)
    except OSError as error:
        raise ExportError(f"{path} can't be read ({error.strerror or error}); give an existing file") from None
    except EOFError:
        raise ExportError(f"{path} is incomplete: it ends within its header; download it again") from None
    except _RefusedError as error:
        raise ExportError(f"{path} {error}") from None
    except (ValueError, struct.error) as error:
        raise ExportError(f"{path} has a header that is not of the GGUF format ({error}); download it again") from None
    end = max((start + tensor.start + tensor.size for tensor in tensors.values()), default=0)
    if end > size:
        raise ExportError(f"{path} is incomplete: it has {size} of {end} bytes or more; download it again")
    return TensorFile(
        path=path,
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        dtypes={name: tensor.kind for name, tensor in tensors.items()},
        metadata={name: value for name, value in fields.items() if isinstance(value, str)},
        load=lambda name: _load(path, name, tensors[name], start),
    )


class _RefusedError(Exception):
    """A sound file that can't be exported; the message says what it is and what to give."""


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    kind: str
    """One of TYPES' names."""
    shape: tuple[int, ...]
    start: int
    """Byte after the header."""
    size: int
    """Bytes."""


class _Header:
    """A header that is read from its beginning to its end."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._size = min(size, _MAX_HEADER)
        self._values = 0
        self.position = 0

    def read(self, count: int) -> bytes:
        """Return the next bytes; EOFError if there are fewer."""
        if count > self._size - self.position:
            if self._size == _MAX_HEADER:
                raise ValueError(f"it is longer than {_MAX_HEADER} bytes")
            raise EOFError
        self.position += count
        return self._stream.read(count)

    def number(self, kind: str) -> Any:
        """Return the next number, of `struct`'s type."""
        self.count()
        return struct.unpack(f"<{kind}", self.read(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        """Return the next string."""
        text = self.read(self.number("Q")).decode("utf-8")
        if not text.isprintable():
            raise ValueError("a string has unprintable characters")
        return text

    def count(self, values: int = 1) -> None:
        """Count values; ValueError if there are too many."""
        self._values += values
        if self._values > _MAX_VALUES:
            raise ValueError("it has millions of values")


def _read_header(header: _Header) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """Return the metadata and the tensors."""
    if header.read(len(MAGIC)) != MAGIC:
        raise ValueError("it doesn't begin with 'GGUF'")
    version = header.number("I")
    if version and version & 0xFFFF == 0:
        raise _RefusedError("is a GGUF file of a big-endian machine; give a little-endian one")
    if version not in _VERSIONS:
        raise _RefusedError(
            f"is a GGUF file of version {version}; supported: {', '.join(map(str, _VERSIONS))}; convert it again"
        )
    num_tensors, num_fields = header.number("Q"), header.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
        _add(fields, header.text(), _read_value(header, header.number("I")))
    _check_architecture(fields.get("general.architecture"))
    tensors: dict[str, _Tensor] = {}
    for _ in range(num_tensors):
        name = header.text()
        _add(tensors, name, _read_tensor(header, name, fields))
    _check_places(tensors, _alignment(fields))
    return fields, tensors


def _add(items: dict[str, Any], name: str, item: Any) -> None:
    if name in items:
        raise ValueError(f"it has '{name}' twice")
    items[name] = item


def _read_value(header: _Header, kind: int) -> Any:
    """Return a value of the metadata; None for an array of anything but numbers."""
    if kind == _STRING:
        return header.read(header.number("Q")).decode("utf-8", "replace")
    if kind in _NUMBERS:
        return header.number(_NUMBERS[kind])
    if kind != _ARRAY:
        raise ValueError(f"the metadata have a value of type {kind}")
    items, length = header.number("I"), header.number("Q")
    if items in _NUMBERS:
        return np.frombuffer(header.read(length * struct.calcsize(f"<{_NUMBERS[items]}")), f"<{_NUMBERS[items]}")
    if items != _STRING:
        raise ValueError(f"the metadata have an array of type {items}")
    for _ in range(length):
        header.read(header.number("Q"))
    return None


def _check_architecture(architecture: Any) -> None:
    if architecture is not None and architecture not in _ARCHITECTURES:
        raise _RefusedError(
            f"is a GGUF file of the architecture {str(architecture)[:40]!r}, which can't be exported; "
            "give one of Stable Diffusion 1, 2 or XL"
        )


def _read_tensor(header: _Header, name: str, fields: Mapping[str, Any]) -> _Tensor:
    dimensions = header.number("I")
    if dimensions > _MAX_DIMENSIONS:
        raise ValueError(f"'{name}' has {dimensions} dimensions")
    stored = tuple(header.number("Q") for _ in range(dimensions))
    number, start = header.number("I"), header.number("Q")
    kind = TYPES.get(number, f"number {number}")
    block = block_elements(kind)
    if block is None:
        raise _RefusedError(
            f"has '{name}' of the type {kind}, which is not supported; "
            f"give one of F32, F16, BF16, {', '.join(sorted(BLOCKS))}"
        )
    elements = math.prod(stored)
    if elements >= 1 << 48 or (stored[0] if stored else 1) % block:
        raise ValueError(f"'{name}' of {kind} has the shape {stored}")
    shape = _original_shape(name, fields.get(_ORIGINAL_SHAPE + name), elements) or stored[::-1]
    return _Tensor(kind=kind, shape=shape, start=start, size=num_bytes(kind, elements))


def _original_shape(name: str, shape: Any, elements: int) -> tuple[int, ...] | None:
    """Return the shape that the metadata have of a tensor; None if they have none."""
    if shape is None:
        return None
    if not isinstance(shape, np.ndarray) or shape.dtype.kind not in "iu" or not 0 < len(shape) <= _MAX_DIMENSIONS:
        raise ValueError(f"'{_ORIGINAL_SHAPE}{name}' is no shape")
    sides = tuple(int(side) for side in shape)
    if min(sides) < 0 or math.prod(sides) != elements:
        raise ValueError(f"'{name}' has {elements} elements, its original shape is {sides}")
    return sides


def _alignment(fields: Mapping[str, Any]) -> int:
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise ValueError(f"its alignment is {str(alignment)[:40]}")
    return alignment


def _aligned(position: int, fields: Mapping[str, Any]) -> int:
    alignment = _alignment(fields)
    return -(-position // alignment) * alignment


def _check_places(tensors: Mapping[str, _Tensor], alignment: int) -> None:
    """Check that tensors lie at multiples of the alignment, and no two in the same place."""
    for name, tensor in tensors.items():
        if tensor.start % alignment:
            raise ValueError(f"'{name}' is at byte {tensor.start}, no multiple of {alignment}")
    ordered = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size))
    for (first, tensor), (second, following) in pairwise(ordered):
        if tensor.start + tensor.size > following.start:
            raise ValueError(f"'{first}' and '{second}' overlap")


def _load(path: Path, name: str, tensor: _Tensor, start: int) -> AnyArray:
    try:
        stored = np.fromfile(path, np.uint8, tensor.size, offset=start + tensor.start)
        if len(stored) < tensor.size:
            raise ValueError("it ends before the tensor")
        return dequantize(stored, tensor.kind).reshape(tensor.shape)
    except (OSError, ValueError, MemoryError) as error:
        raise ExportError(f"{path}: '{name}' can't be read ({error}); download the file again") from None
