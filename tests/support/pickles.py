"""Files of torch, as its writer makes them and as a hostile one would."""

import contextlib
import struct
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def class_of_another_library(name: str) -> Iterator[type]:
    """A class ``module.Class`` that can be pickled here and is not installed where the pickle is read."""
    module, _, class_name = name.rpartition(".")
    made = type(class_name, (), {"__module__": module})
    parents = [module.rsplit(".", count)[0] for count in range(module.count(".") + 1)]
    sys.modules |= {parent: types.ModuleType(parent) for parent in parents}
    setattr(sys.modules[module], class_name, made)
    try:
        yield made
    finally:
        for parent in parents:
            del sys.modules[parent]


def write_archive(path: Path, pickled: bytes, *storages: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """Write a file of torch 1.6 or later from its pickle and its storages."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for index, each in enumerate(storages or (b"",)):
            archive.writestr(f"archive/data/{index}", each)
    return path


def pickled_tensor(size: list[int], stride: list[int], *, offset: int = 0, count: int = 8) -> bytes:
    """The opcodes of a float32 tensor in storage 0, of which it says that it has ``count`` elements."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + _integers(count) + b"tQ"
    shapes = b"".join(b"(" + _integers(*each) + b"t" for each in (size, stride))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _integers(offset) + shapes + b"\x89}tR"


def pickled_text(text: str) -> bytes:
    """The opcodes of a string."""
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _integers(*values: int) -> bytes:
    return b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values)
