"""The safetensors format: a JSON header and the tensors' bytes, https://github.com/huggingface/safetensors."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.files.dtypes import element_bits
from sdonnx_runtime.files.kinds import describe_file
from sdonnx_runtime.files.tensor_file import MAX_DIMENSIONS, StoredTensor, TensorFile, stored_tensors

_MAX_HEADER = 100_000_000
"""Bytes that the format allows its header."""

_MAX_VALUES = 2_000_000
"""JSON values in a header; a tensor has 13. It bounds what parsing takes."""


def is_safetensors(head: bytes) -> bool:
    """Whether a file's first bytes are those of a safetensors file: the header's length, and JSON."""
    length = int.from_bytes(head[:8], "little")
    return 2 <= length <= _MAX_HEADER and head[8:].lstrip(b" \t\r\n")[:1] == b"{"


def open_safetensors(path: Path) -> TensorFile:
    """Open a ``.safetensors`` file; tensors are read on demand.

    Raises:
        RequestError: it is missing, damaged or not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(64)
            if not is_safetensors(head):
                raise RequestError(f"{path} {describe_file(path) or 'is not a safetensors file; give one'}")
            length = int.from_bytes(head[:8], "little")
            stream.seek(8)
            header = stream.read(length)
    except OSError as error:
        raise RequestError(f"{path} can't be read ({error.strerror}); give a .safetensors file") from None
    if len(header) < length:
        raise _cut_short(path, size, 8 + length)
    try:
        entries, metadata = _parse_header(header)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise RequestError(
            f"{path} has a header that is not of the safetensors format ({reason[:200]}); download it again"
        ) from None
    end = max((entry.start + entry.num_bytes for entry in entries.values()), default=0) + 8 + length
    if end > size:
        raise _cut_short(path, size, end)
    return stored_tensors(
        path,
        {
            name: StoredTensor(dtype=each.dtype, shape=each.shape, start=8 + length + each.start)
            for name, each in entries.items()
        },
        metadata,
    )


def _cut_short(path: Path, size: int, expected: int) -> RequestError:
    return RequestError(f"{path} is incomplete: it has {size} of {expected} bytes or more; download it again")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A tensor in the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def _parse_header(header: bytes) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Parse entries and metadata.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: it is not of the format.
    """
    strings = header.count(b'"') - header.count(b'\\"')
    if strings + header.count(b"[") + header.count(b"{") > _MAX_VALUES:
        raise ValueError("it has millions of values")
    data = json.loads(header.decode("utf-8"))
    metadata = _parse_metadata(data.pop("__metadata__", None))
    "".join(data).encode()  # a name of half a surrogate pair can't be printed
    entries = {name: _parse_entry(name, entry) for name, entry in data.items()}
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if entry.start != position:
            raise ValueError(f"'{name}' starts at byte {entry.start}; expected {position}")
        position += entry.num_bytes
    return entries, metadata


def _parse_metadata(data: Any) -> dict[str, str]:
    """Parse ``__metadata__``: text by name or null; other values, which the format doesn't allow, become JSON."""
    items = cast("Mapping[str, Any]", {} if data is None else data).items()
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in items}


def _parse_entry(name: str, entry: Any) -> _Entry:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if not isinstance(dtype, str) or not all(map(_is_size, (*shape, start, end))):
        raise ValueError(f"'{name}' has a damaged dtype, shape or offset")
    bits = element_bits(dtype) if len(shape) <= MAX_DIMENSIONS else None
    if end < start or (bits is not None and 8 * (end - start) != bits * math.prod(shape)):
        raise ValueError(f"'{name}' has {end - start} bytes, which don't fit its shape")
    return _Entry(dtype=dtype, shape=shape, start=start, num_bytes=end - start)


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**63
