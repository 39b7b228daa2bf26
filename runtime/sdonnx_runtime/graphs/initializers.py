"""A graph's initializers, read without the onnx library: what its weights are called, and what is in them."""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.graphs.onnx_proto import fields, submessages, varints

FLOAT, INT4 = 1, 22
"""ONNX's numbers for two types; of 4 bits there are two elements to a byte, the first in its lower half."""

_DTYPES: Mapping[int, Any] = {
    FLOAT: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16, 11: np.float64,
    INT4: np.int8,
}  # fmt: skip
"""By ONNX's numbers for element types."""

GRAPH, INITIALIZER = 7, 5
_DIMS, _DATA_TYPE, _NAME, _RAW_DATA, EXTERNAL_DATA = 1, 2, 8, 9, 13
"""Fields of onnx.proto's ModelProto, GraphProto and TensorProto."""


@dataclass(frozen=True, kw_only=True)
class Initializer:
    """One weight as a graph has it."""

    name: str
    data_type: int
    """ONNX's number for its element type."""
    shape: tuple[int, ...]
    file: Path
    """Where its elements are."""
    offset: int
    """Where they begin there."""
    length: int
    """Bytes."""

    @property
    def external(self) -> bool:
        """Whether it lies in a file beside its graph, from where a session can be told to take it instead."""
        return self.file.suffix != ".onnx"

    @property
    def dtype(self) -> Any:
        """numpy's; int8 of 4 bits."""
        return _DTYPES.get(self.data_type)

    def read(self) -> AnyArray:
        """Its elements; those of 4 bits as int8.

        Raises:
            PackageError: the file is cut, or the type is one that no package has.
        """
        dtype = self.dtype
        count = int(np.prod(self.shape))
        expected = (count + 1) // 2 if self.data_type == INT4 else count * np.dtype(dtype).itemsize
        if dtype is None or self.length != expected or self.file.stat().st_size < self.offset + self.length:
            raise PackageError(f"{self.file} is damaged at '{self.name}'; run 'sdonnx export' again")
        data = np.fromfile(self.file, np.uint8, self.length, offset=self.offset)
        return (
            unpack_int4(data, count).reshape(self.shape) if self.data_type == INT4 else _viewed(data, dtype, self.shape)
        )


def _viewed(data: AnyArray, dtype: Any, shape: tuple[int, ...]) -> AnyArray:
    return data.view(dtype).reshape(shape)


@dataclass(frozen=True, kw_only=True)
class TensorData:
    """What a session takes in an initializer's place."""

    data_type: int
    """ONNX's number for the element type."""
    data: AnyArray
    """Of the initializer's shape and type; of 4 bits, what is packed lies in the first half of as many bytes."""

    @classmethod
    def of(cls, values: AnyArray, data_type: int) -> "TensorData":
        """Values as an initializer of a type has them; those of 4 bits come as int8."""
        if data_type != INT4:
            data = _apart(values.shape, _DTYPES[data_type])
            data[...] = values
            return cls(data_type=data_type, data=data)
        data = _apart(values.shape, np.uint8)
        codes = pack_int4(values)
        data.reshape(-1)[: len(codes)] = codes
        return cls(data_type=data_type, data=data)


def _apart(shape: tuple[int, ...], dtype: Any) -> AnyArray:
    """An array in pages of its own, so that what was used to make it goes back to the system."""
    count = int(np.prod(shape))
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    pages = mmap.mmap(-1, max(count * np.dtype(dtype).itemsize, 1), **private)
    return np.frombuffer(pages, dtype, count).reshape(shape)


def unpack_int4(data: AnyArray, count: int) -> AnyArray:
    """int8 values (count,) of as many in 4 bits."""
    pairs = np.stack([data << 4, data], axis=-1).view(np.int8) >> 4  # the shift keeps the sign
    return pairs.reshape(-1)[:count]


def pack_int4(values: AnyArray) -> AnyArray:
    """What `unpack_int4` reads."""
    nibbles = values.reshape(-1).view(np.uint8) & 15
    nibbles = np.append(nibbles, np.zeros(len(nibbles) % 2, np.uint8))
    return nibbles[0::2] | (nibbles[1::2] << 4)


def read_initializers(path: Path) -> dict[str, Initializer]:
    """Those of an ``.onnx`` file by their names.

    Raises:
        PackageError: it is damaged or missing.
    """
    try:
        data = memoryview(path.read_bytes())
        tensors = [tensor for graph in submessages(data, GRAPH) for tensor in submessages(graph, INITIALIZER)]
        found = [initializer_of(path, data, tensor) for tensor in tensors]
    except (IndexError, ValueError) as error:
        raise PackageError(f"{path} is damaged ({error}); run 'sdonnx export' again") from None
    except OSError as error:
        raise PackageError(f"{path} can't be read ({error.strerror}); run 'sdonnx export' again") from None
    return {each.name: each for each in found}


def initializer_of(path: Path, whole: memoryview, tensor: memoryview) -> Initializer:
    """What a TensorProto says, a part of the ``whole`` file at ``path``; raises ValueError or IndexError."""
    name, data_type, inside = "", 0, memoryview(b"")
    shape: list[int] = []
    where = {"location": "", "offset": "0", "length": "0"}
    for number, value in fields(tensor):
        if number == _DIMS:
            shape.extend([value] if isinstance(value, int) else varints(value))
        elif number == _DATA_TYPE and isinstance(value, int):
            data_type = value
        elif number == _NAME and isinstance(value, memoryview):
            name = str(value, "utf-8")
        elif number == _RAW_DATA and isinstance(value, memoryview):
            inside = value
        elif number == EXTERNAL_DATA and isinstance(value, memoryview):
            key, text = (str(part, "utf-8") for _, part in fields(value) if isinstance(part, memoryview))
            where[key] = text
    if where["location"] == "":
        return Initializer(
            name=name, data_type=data_type, shape=tuple(shape), file=path,
            offset=_distance(whole, inside), length=len(inside),
        )  # fmt: skip
    if Path(where["location"]).name != where["location"]:
        raise ValueError(f"'{where['location']}' is not beside it")
    return Initializer(
        name=name, data_type=data_type, shape=tuple(shape), file=path.with_name(where["location"]),
        offset=int(where["offset"]), length=int(where["length"]),
    )  # fmt: skip


def _distance(whole: memoryview, part: memoryview) -> int:
    """Where ``part`` begins in what it is a slice of."""
    if len(part) == 0:
        return 0
    first, second = (np.frombuffer(each, np.uint8).ctypes.data for each in (whole, part))
    return second - first
