"""Untrusted tensor files of adapters: safetensors, and torch's pickles without torch."""

import json
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import RequestError

_MAX_HEADER = 100_000_000
"""Bytes that the safetensors format allows its header."""

_DTYPES: Mapping[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip

_STORAGES: Mapping[str, str] = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip
"""The dtypes of torch's storage classes."""


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """An open tensor file."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    """By tensor name."""
    metadata: Mapping[str, str]
    """A safetensors file's ``__metadata__``."""
    read: Callable[[str], AnyArray]
    """Reads a tensor by name, floating point as float32."""


def open_safetensors(path: Path) -> TensorFile:
    """Open a ``.safetensors`` file; tensors are read on demand.

    Raises:
        RequestError: it is missing, damaged or not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError(f"its header has {length} bytes")
            header = json.loads(stream.read(length))
        metadata = {str(key): str(value) for key, value in dict(header.pop("__metadata__", {})).items()}
        entries = {name: _parse_entry(name, entry, size - 8 - length) for name, entry in header.items()}
    except OSError as error:
        raise RequestError(f"{path} can't be read ({error.strerror}); give a .safetensors file") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{path} is damaged or not a safetensors file ({error}); download it again") from None

    def read(name: str) -> AnyArray:
        kind, shape, start, num_bytes = entries[name]
        data = np.fromfile(path, np.uint8, num_bytes, offset=8 + length + start)
        return _to_float32(data, kind).reshape(shape)

    return TensorFile(path=path, shapes={name: each[1] for name, each in entries.items()}, metadata=metadata, read=read)


def _parse_entry(name: str, entry: Any, size: int) -> tuple[str, tuple[int, ...], int, int]:
    """Parse a tensor's dtype, shape, first byte and number of bytes."""
    kind, shape = entry["dtype"], tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if kind not in _DTYPES:
        raise ValueError(f"'{name}' has the unsupported dtype {kind}")
    is_valid = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    if not is_valid or end > size or end - start != math.prod(shape) * np.dtype(_DTYPES[kind]).itemsize:
        raise ValueError(f"'{name}' is outside of the file")
    return kind, shape, start, end - start


def _to_float32(data: AnyArray, kind: str) -> AnyArray:
    """Convert the bytes of n elements to (n,), floating point to float32."""
    values = data.view(_DTYPES[kind])
    if kind == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32) if values.dtype.kind == "f" else values


def load_pickled(path: Path) -> Any:
    """Load a ``.pt`` or ``.bin`` of torch: dictionaries, lists, strings, numbers, and tensors as arrays.

    Nothing is imported or called except what rebuilds a tensor.

    Raises:
        RequestError: it is missing, damaged, of torch before 1.6, or has any other global.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {name.partition("/")[2]: name for name in archive.namelist()}
            if any(archive.getinfo(name).compress_type != zipfile.ZIP_STORED for name in entries.values()):
                raise pickle.UnpicklingError("compressed, unlike torch's files")
            with archive.open(entries["data.pkl"]) as stream:
                return _Restricted(stream, lambda key: archive.read(entries[f"data/{key}"])).load()
    except OSError as error:
        raise RequestError(f"{path} can't be read ({error.strerror or error}); give an existing file") from None
    except pickle.UnpicklingError as error:
        raise RequestError(f"{path} is refused: {error}; get it as .safetensors") from None
    except Exception as error:  # a hostile pickle can make the unpickler raise anything
        raise RequestError(
            f"{path} is damaged or not a file of torch 1.6 or later ({type(error).__name__}: {error}); "
            "get it as .safetensors"
        ) from None


@dataclass(frozen=True)
class _Storage:
    """A tensor's elements, flat."""

    values: AnyArray


class _Restricted(pickle._Unpickler):  # pyright: ignore[reportPrivateUsage]
    """An unpickler that allows the globals of tensors only.

    It is the one in Python: the one in C allocates as much memory as a file's memo index says.
    """

    def __init__(self, stream: Any, read: Callable[[str], bytes]) -> None:
        super().__init__(stream)
        self._read = read

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise pickle.UnpicklingError(f"disallowed global {module}.{name} in pickle")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or dtype not in _DTYPES:
            raise pickle.UnpicklingError(f"{kind!r:.40} is not a tensor's storage")
        return _Storage(_to_float32(np.frombuffer(self._read(str(key)), np.uint8), dtype))


class _StateDict(dict[str, Any]):
    """The parameters of torch's ParameterDict."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        parameters = cast("Mapping[str, Any]", state.get("_parameters", {}))
        self.update({str(key): value for key, value in parameters.items()})


def _rebuild_tensor(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> AnyArray:
    """Rebuild a tensor as torch's _rebuild_tensor_v2; ``stride`` is in elements."""
    flat = storage.values[offset:]
    last = sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    if min((*size, *stride, offset), default=0) < 0 or (0 not in size and max(last + 1, math.prod(size)) > len(flat)):
        raise pickle.UnpicklingError("a tensor is outside of the file")
    byte_strides = [step * flat.itemsize for step in stride]
    return np.array(np.lib.stride_tricks.as_strided(flat, size, byte_strides))


def _rebuild_parameter(data: AnyArray, *_: Any) -> AnyArray:
    return data


_ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch.nn.modules.container", "ParameterDict"): _StateDict,
}


def tensors_in(data: Any) -> dict[str, AnyArray]:
    """Collect the tensors in `load_pickled`'s data, by their keys joined by dots."""
    tensors: dict[str, AnyArray] = {}
    stack: list[tuple[str, Any]] = [("", data)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, np.ndarray):
            tensors[path] = value
        elif isinstance(value, Mapping):
            items = cast("Mapping[Any, Any]", value)
            stack.extend((f"{path}.{key}".removeprefix("."), items[key]) for key in reversed(list(items)))
    return tensors
