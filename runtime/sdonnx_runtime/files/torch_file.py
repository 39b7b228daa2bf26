"""Files of ``torch.save``, of any age, without torch: a pickle as data, and storages that are read on demand."""

import io
import math
import mmap
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.files.dtypes import element_bits
from sdonnx_runtime.files.kinds import describe_file
from sdonnx_runtime.files.pickles import PickleError, read_pickle
from sdonnx_runtime.files.state_dict import CALLS, Storage, Tensor, find_metadata, find_tensors, make_storage
from sdonnx_runtime.files.tensor_file import StoredTensor, TensorFile, stored_tensors

_REMEDY = "get it as .safetensors"
_MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of files before torch 1.6; three others follow it, then the storages."""


def is_torch_file(head: bytes) -> bool:
    """Whether a file's first bytes are those of a zip archive, or of the pickle of `_MAGIC`."""
    return head.startswith(b"PK\x03\x04") or _MAGIC.to_bytes(10, "little") in head[:32] or str(_MAGIC).encode() in head


def open_torch_file(path: Path) -> TensorFile:
    """Open the tensors of a ``.ckpt``, ``.pt``, ``.pth`` or ``.bin``, by their keys joined by dots.

    They are those of "state_dict", if the file has that. Nothing in the file is imported or called.

    Raises:
        RequestError: it is missing, damaged, hostile, or not a file of ``torch.save``.
    """
    try:
        with path.open("rb") as stream:
            is_zip = stream.read(4) == b"PK\x03\x04"
            root, places = (_read_zip if is_zip else _read_legacy)(stream)
        tensors = {name: _place(name, tensor, places) for name, tensor in find_tensors(root).items()}
        _check_total(path, tensors)
    except OSError as error:
        raise RequestError(f"{path} can't be read ({error.strerror or error}); give an existing file") from None
    except PickleError as error:
        raise RequestError(f"{path} is refused: {error}; {_REMEDY}") from None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, RuntimeError) as error:
        what = describe_file(path) or f"is not a file of torch; {_REMEDY}"
        raise RequestError(f"{path} is damaged or incomplete ({error}): it {what}") from None
    return stored_tensors(path, tensors, find_metadata(root))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Places:
    """Where the storages of a file are."""

    find: Callable[[str], tuple[int, int]]
    """Returns the first byte and the number of bytes of a storage by its key."""
    big_endian: bool = False


def _read_zip(stream: IO[bytes]) -> tuple[Any, _Places]:
    """Read the pickle of a file of torch 1.6 or later: a zip archive that is not compressed."""
    with zipfile.ZipFile(stream) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        _check_entries(entries)
        with archive.open(entries["data.pkl"]) as pickled:
            root = _read(io.BytesIO(pickled.read()))
        order = archive.read(entries["byteorder"]) if "byteorder" in entries else b"little"
    starts = {
        name.removeprefix("data/"): (_start_of(stream, info), info.file_size)
        for name, info in entries.items()
        if name.startswith("data/")
    }
    return root, _Places(find=lambda key: _find(starts, key), big_endian=order == b"big")


def _check_entries(entries: Mapping[str, zipfile.ZipInfo]) -> None:
    if "constants.pkl" in entries:
        raise PickleError("it is a TorchScript archive of torch.jit.save, which holds code")
    if "data.pkl" not in entries:
        names = ", ".join(sorted(info.filename for info in entries.values())[:3])
        raise PickleError(f"it is a zip archive of {names or 'nothing'}; unpack it and give the file inside")
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in entries.values()):
        raise PickleError("it is compressed or encrypted, unlike torch's files")


def _start_of(stream: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Return the first byte of an entry's data, which follows its local header."""
    stream.seek(info.header_offset)
    header = stream.read(30)
    return info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _find(places: Mapping[str, tuple[int, int]], key: str) -> tuple[int, int]:
    if key not in places:
        raise PickleError(f"its storage {key!r:.40} is missing")
    return places[key]


def _read_legacy(stream: IO[bytes]) -> tuple[Any, _Places]:
    """Read the pickles of a file of torch before 1.6, and find the storages behind them."""
    storages: dict[str, Storage] = {}
    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if _read(data) != _MAGIC:
            raise PickleError("it is a pickle, but not of torch.save")
        for _ in ("the protocol's version", "the sizes of C's types"):
            _read(data)
        root = _read(data, storages)
        keys, position = _read(data), data.tell()
        places: dict[str, tuple[int, int]] = {}
        for key in cast("list[Any]", keys) if isinstance(keys, list) else ():
            bits = element_bits(storages[key].dtype) if isinstance(key, str) and key in storages else None
            if bits is None:
                raise PickleError(f"its storage {key!r:.40} is unknown, or of a dtype that is not supported")
            count = int.from_bytes(data[position : position + 8], "little")
            places[key] = position + 8, count * bits // 8
            position += 8 + count * bits // 8
        if position > len(data):
            raise PickleError("it is incomplete; download it again")
    return root, _Places(find=lambda key: _find(places, key))


def _read(stream: Any, storages: dict[str, Storage] | None = None) -> Any:
    """Read one pickle, and note the storages that it names by their keys."""

    def load_storage(pid: Any) -> Any:
        if isinstance(pid, tuple) and pid[:1] == ("module",):  # a class with its source code, before torch 1.6
            return cast("tuple[Any, ...]", pid)[1]
        storage = make_storage(pid)
        if storages is not None:
            storages[storage.key] = storage
        return storage

    return read_pickle(stream, CALLS, load_storage)


def _place(name: str, tensor: Tensor, places: _Places) -> StoredTensor:
    """Find a tensor in the file.

    Raises:
        PickleError: it is outside of its storage, or that is outside of the file.
    """
    storage = tensor.storage
    start, num_bytes = places.find(storage.key)
    bits, storage_bits = element_bits(tensor.dtype) or 8, element_bits(storage.dtype) or 8
    placed = StoredTensor(
        dtype=tensor.dtype,
        shape=tensor.shape,
        start=start + (storage.offset * storage_bits + tensor.offset * bits) // 8,
        strides=tensor.strides,
        big_endian=places.big_endian,
    )
    elements = max(placed.span, math.prod(tensor.shape))
    if (storage.offset + storage.count) * storage_bits > 8 * num_bytes:
        raise PickleError(f"the storage of '{name}' is outside of the file")
    if elements and (tensor.offset + elements) * bits > storage.count * storage_bits:
        raise PickleError(f"'{name}' is outside of its storage, or has more elements than that")
    return placed


def _check_total(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Check that tensors don't share their elements, a few aside: they would take more memory than the file.

    Raises:
        PickleError: they do.
    """
    total = sum(math.prod(each.shape) * (element_bits(each.dtype) or 8) // 8 for each in tensors.values())
    if total > 2 * path.stat().st_size + 1_000_000:
        raise PickleError(f"its tensors have {total} bytes, more than twice the file's")
