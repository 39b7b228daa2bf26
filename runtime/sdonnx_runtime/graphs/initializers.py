"""A graph's initializers: their names, types, shapes and where their bytes are."""

import math
import mmap
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.graphs.onnx_proto import Node, Tensor, decode_model, package_errors

FLOAT, FLOAT16, INT4 = 1, 10, 22
"""Of TensorProto.DataType; int4 has two elements to a byte, the first in its lower half."""

DTYPES: Mapping[int, Any] = {
    FLOAT: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 9: np.bool_, FLOAT16: np.float16,
    11: np.float64, INT4: np.int8,
}  # fmt: skip
"""numpy's types by TensorProto.DataType; int4 is unpacked to int8."""

_MAX_AXES = 16
"""More than any layer's weight has; numpy allows 64."""


@dataclass(frozen=True, kw_only=True)
class Initializer:
    """A weight of a graph, not yet read."""

    name: str
    data_type: int
    """A TensorProto.DataType."""
    shape: tuple[int, ...]
    file: Path
    """The file with its elements: the graph's or another in its directory."""
    offset: int
    """Bytes from the file's beginning."""
    length: int
    """Bytes."""
    is_channels_last: bool = False
    """Whether it is a conv weight (out, kH, kW, in); others are (out, in, kH, kW)."""

    @classmethod
    def from_tensor(
        cls, tensor: Tensor, path: Path, data: memoryview, channels_last: Collection[str] = ()
    ) -> "Initializer":
        """An initializer of the ``.onnx`` file at ``path`` with content ``data``; ValueError for unsafe locations.

        ``channels_last`` are the names of those that are `is_channels_last`.
        """
        location = tensor.external.get("location", "")
        if Path(location).name != location:
            raise ValueError(f"'{location}' is not in its directory")
        offset, length = (int(tensor.external.get(key, "0")) for key in ("offset", "length"))
        if location == "":
            start, first = (np.frombuffer(each, np.uint8).ctypes.data for each in (data, tensor.raw_data or data))
            offset, length = first - start, len(tensor.raw_data)
        return cls(
            name=tensor.name, data_type=tensor.data_type, shape=tensor.shape, offset=offset, length=length,
            file=path.with_name(location or path.name), is_channels_last=tensor.name in channels_last,
        )  # fmt: skip

    @property
    def external(self) -> bool:
        """Whether it is in a weights file, so that a session can be given other values for it."""
        return self.file.suffix != ".onnx"

    @property
    def dtype(self) -> Any:
        """numpy's; int8 of int4."""
        return DTYPES.get(self.data_type)

    def read(self) -> AnyArray:
        """Read its elements; int4 as int8. PackageError if the file is truncated or missing, or the type unknown."""
        self.check()
        data = np.fromfile(self.file, np.uint8, self.length, offset=self.offset)
        values = unpack_int4(data, math.prod(self.shape)) if self.data_type == INT4 else data.view(self.dtype)
        return values.reshape(self.shape)

    def map(self) -> AnyArray:
        """Map its elements into memory, read-only; of any type but int4. PackageError as `read`, or without any."""
        self.check(least=1)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)

    def check(self, *, least: int = 0) -> None:
        """Raise PackageError if its length is not that of its shape and type, or ``least`` more, or its file is cut."""
        sizes, count = (*self.shape, self.offset, self.length - least), math.prod(self.shape)
        expected = (count + 1) // 2 if self.data_type == INT4 else count * np.dtype(self.dtype).itemsize
        is_known = self.dtype is not None and len(sizes) < _MAX_AXES and min(sizes) >= 0 and self.length == expected
        if not is_known or not self.is_in_file:
            raise PackageError(f"{self.file} is damaged at '{self.name}'; run 'sdonnx export' again")

    @property
    def is_in_file(self) -> bool:
        """Whether the file is there and long enough."""
        return self.file.is_file() and 0 <= self.offset <= self.file.stat().st_size - self.length


@dataclass(frozen=True, kw_only=True)
class TensorData:
    """Values that replace an initializer's in a session."""

    data_type: int
    """A TensorProto.DataType."""
    data: AnyArray
    """Of the initializer's shape and type; int4 is packed into the first half of as many bytes."""
    is_inline: bool = False
    """Whether the initializer is in the ``.onnx`` file, where ONNX Runtime doesn't replace it."""

    @classmethod
    def of(cls, values: AnyArray, data_type: int, *, is_inline: bool = False) -> "TensorData":
        """Convert values to a type; of int4, they are int8."""
        dtype = np.dtype(DTYPES[data_type] if data_type != INT4 else np.uint8)
        stored = values.reshape(-1) if data_type != INT4 else pack_int4(values)
        # a memory mapping of its own, which goes back to the system at once when it is freed
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        data = np.frombuffer(mmap.mmap(-1, max(values.size * dtype.itemsize, 1), **private), dtype, values.size)
        data[: len(stored)] = stored
        return cls(data_type=data_type, data=data.reshape(values.shape), is_inline=is_inline)


def unpack_int4(data: AnyArray, count: int) -> AnyArray:
    """int8 values (count,) of packed int4."""
    pairs = np.stack([data << 4, data], axis=-1).view(np.int8) >> 4  # the shift keeps the sign
    return pairs.reshape(-1)[:count]


def pack_int4(values: AnyArray) -> AnyArray:
    """Pack int8 values in -8..7 to int4, two to a byte."""
    nibbles = values.reshape(-1).view(np.uint8) & 15
    nibbles = np.append(nibbles, np.zeros(len(nibbles) % 2, np.uint8))
    return nibbles[0::2] | (nibbles[1::2] << 4)


def read_initializers(path: Path, encoded: bytes | None = None) -> dict[str, Initializer]:
    """The initializers of an ``.onnx`` file by name, or those of an ``encoded`` graph that replaces it.

    Raises PackageError if it is damaged or missing.
    """
    with package_errors(path):
        model = decode_model(memoryview(path.read_bytes() if encoded is None else encoded))
        last = channels_last_weights(model.nodes)
        tensors = model.initializers.items()
        return {name: Initializer.from_tensor(each, path, model.data, last) for name, each in tensors}


def channels_last_weights(nodes: Iterable[Node]) -> set[str]:
    """The names of the conv weights that are (out, kH, kW, in): those that NhwcConv reads."""
    return {name for node in nodes if node.op == "NhwcConv" for name in node.inputs[1:2]}


def embed_values(model: bytes, values: Mapping[str, TensorData]) -> bytes:
    """Replace initializers that are in an encoded graph itself."""
    data, found = bytearray(model), decode_model(memoryview(model)).initializers
    for name, value in values.items():
        stored = found[name].raw_data
        start = np.frombuffer(stored, np.uint8).ctypes.data - np.frombuffer(model, np.uint8).ctypes.data
        data[start : start + len(stored)] = value.data.tobytes()[: len(stored)]
    return bytes(data)
