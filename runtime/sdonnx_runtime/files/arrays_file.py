"""Read numpy's ``.npz`` in memory of the order of the file's size."""

import io
import math
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sdonnx_runtime.arrays import AnyArray

_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

_MORE = 50_000_000
"""Bytes by which arrays may be larger than four times the file: compressed latents have nearly its size."""


def read_arrays(path: Path, names: Sequence[str]) -> Mapping[str, AnyArray]:
    """Read arrays of a file of ``np.savez`` or ``np.savez_compressed``.

    Raises:
        ValueError: they would be far larger than the file, or their headers don't fit their sizes.
        OSError, KeyError, zipfile.BadZipFile, …: it is missing or damaged, or hasn't the arrays.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.getinfo(f"{name}.npy") for name in names}
        if sum(each.file_size for each in entries.values()) > 4 * size + _MORE:
            raise ValueError("its arrays would be far larger than the file")
        if any(each.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for each in entries.values()):
            raise ValueError("it is compressed in another way than numpy's")
        return {name: _parse_array(_read_entry(archive, each)) for name, each in entries.items()}


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Read an entry; unlike `zipfile.ZipFile.read`, not what is compressed in it beyond the size that it declares."""
    with archive.open(entry) as stream:
        return stream.read(entry.file_size + 1)


def _parse_array(data: bytes) -> AnyArray:
    """Parse a ``.npy``: a header and as many bytes as it says."""
    stream = io.BytesIO(data)
    shape, is_fortran, dtype = _READ_HEADER[np.lib.format.read_magic(stream)](stream)
    elements = memoryview(data)[stream.tell() :]
    if dtype.hasobject or len(elements) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of {dtype} {shape} has {len(elements)} bytes")
    code_points = np.dtype(np.uint32).newbyteorder(dtype.byteorder)
    if dtype.kind == "U" and (np.frombuffer(elements, code_points) > sys.maxunicode).any():
        raise ValueError("a text has characters that don't exist")
    return np.frombuffer(elements, dtype).reshape(shape, order="F" if is_fortran else "C").copy()
