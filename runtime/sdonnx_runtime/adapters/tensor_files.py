"""Small files of tensors, adapters' and embeddings', from strangers: safetensors, and torch's pickles without torch."""

import json
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
"""torch's names for them."""


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """An opened file."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    """By tensors' names."""
    metadata: Mapping[str, str]
    """What a safetensors file says about itself."""
    read: Callable[[str], AnyArray]
    """Gives a tensor by its name, floating point ones as float32."""


def open_safetensors(path: Path) -> TensorFile:
    """A ``.safetensors`` file, whose tensors are read when they are asked for.

    Raises:
        RequestError: it is missing, cut or no such file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(stream.read(length))
        entries = {name: _entry(name, entry, size - 8 - length) for name, entry in header.items() if name != _ABOUT}
        metadata = {str(key): str(value) for key, value in dict(header.get(_ABOUT, {})).items()}
    except OSError as error:
        raise RequestError(f"{path} can't be read ({error.strerror}); give a .safetensors file") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{path} is damaged or no safetensors file ({error}); download it again") from None

    def read(name: str) -> AnyArray:
        kind, shape, start, length_of = entries[name]
        data = np.fromfile(path, np.uint8, length_of, offset=8 + length + start)
        return _floats(data, kind).reshape(shape)

    return TensorFile(path=path, shapes={name: each[1] for name, each in entries.items()}, metadata=metadata, read=read)


_ABOUT = "__metadata__"


def _entry(name: str, entry: Any, size: int) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, first byte and bytes of a tensor."""
    kind, shape = entry["dtype"], tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if kind not in _DTYPES:
        raise ValueError(f"'{name}' is of type {kind}, which is not read")
    whole = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    if not whole or end > size or end - start != _bytes(shape, kind):
        raise ValueError(f"'{name}' lies outside of the file")
    return kind, shape, start, end - start


def _bytes(shape: tuple[int, ...], kind: str) -> int:
    count = 1
    for side in shape:
        count *= side  # Python's own numbers don't overflow
    return count * np.dtype(_DTYPES[kind]).itemsize


def _floats(data: AnyArray, kind: str) -> AnyArray:
    """(n,) of the bytes of as many elements: float32 of all floating point types."""
    values = data.view(_DTYPES[kind])
    if kind == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32) if values.dtype.kind == "f" else values


def load_pickled(path: Path) -> Any:
    """What torch saved in a ``.pt`` or ``.bin``: dictionaries, lists, texts, numbers, and tensors as arrays.

    Nothing that a pickle names is imported or called but what rebuilds a tensor.

    Raises:
        RequestError: it is missing, damaged, of torch before 1.6, or names anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {name.partition("/")[2]: name for name in archive.namelist()}
            if any(archive.getinfo(name).compress_type != zipfile.ZIP_STORED for name in entries.values()):
                raise pickle.UnpicklingError("it is compressed, as torch's never are")
            with archive.open(entries["data.pkl"]) as stream:
                return _Restricted(stream, lambda key: archive.read(entries[f"data/{key}"])).load()
    except OSError as error:
        raise RequestError(f"{path} can't be read ({error.strerror or error}); give an existing file") from None
    except pickle.UnpicklingError as error:
        raise RequestError(f"{path} is refused: {error}; get it as .safetensors") from None
    except Exception as error:  # a hostile pickle can make the unpickler raise anything
        raise RequestError(
            f"{path} is damaged or no file of torch 1.6 or later ({type(error).__name__}: {error}); "
            "get it as .safetensors"
        ) from None


@dataclass(frozen=True)
class _Storage:
    """A tensor's elements, flat."""

    values: AnyArray


class _Restricted(pickle.Unpickler):
    """Makes what tensors are made of, and nothing else."""

    def __init__(self, stream: Any, read: Callable[[str], bytes]) -> None:
        super().__init__(stream)
        self._read = read

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no tensor is made of")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or dtype not in _DTYPES:
            raise pickle.UnpicklingError(f"it has a {kind!r:.40} where a tensor's elements were expected")
        return _Storage(_floats(np.frombuffer(self._read(str(key)), np.uint8), dtype))


class _Held(dict[str, Any]):
    """torch's ParameterDict, of which its parameters are kept."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        found = cast("Mapping[str, Any]", state.get("_parameters", {}))
        self.update({str(key): value for key, value in found.items()})


def _tensor(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> AnyArray:
    """Torch's _rebuild_tensor_v2; ``stride`` counts elements."""
    flat = storage.values[offset:]
    last = sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    if min((*size, *stride, offset), default=0) < 0 or (0 not in size and last >= len(flat)):
        raise pickle.UnpicklingError("a tensor lies outside of the file")
    bytes_apart = [step * flat.itemsize for step in stride]
    return np.array(np.lib.stride_tricks.as_strided(flat, size, bytes_apart))


def _parameter(data: AnyArray, *_: Any) -> AnyArray:
    return data


_ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.nn.modules.container", "ParameterDict"): _Held,
}


def tensors_in(data: Any) -> dict[str, AnyArray]:
    """The tensors of what `load_pickled` gives, by the keys that lead to each, joined by dots."""
    found: dict[str, AnyArray] = {}
    left: list[tuple[str, Any]] = [("", data)]
    while left:
        place, value = left.pop()
        if isinstance(value, np.ndarray):
            found[place] = value
        elif isinstance(value, Mapping):
            inside = cast("Mapping[Any, Any]", value)
            left.extend((f"{place}.{key}".removeprefix("."), inside[key]) for key in reversed(list(inside)))
    return found
