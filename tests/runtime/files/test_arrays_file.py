"""A .npz of latents is read as numpy reads it, and one that declares more than it has takes no memory."""

import io
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.files.arrays_file import read_arrays
from sdonnx_runtime.outputs.latents_file import load_latents


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_those_that_numpy_reads(tmp_path: Path, save: Callable[..., None]) -> None:
    arrays = {
        "rows": np.arange(6.0).reshape(2, 3).astype(np.float32),
        "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "text": np.array("a recipe, 水墨"),
        "none": np.zeros((0, 4), np.float32),
    }
    save(tmp_path / "a.npz", **arrays)
    found = read_arrays(tmp_path / "a.npz", [*arrays])
    with np.load(tmp_path / "a.npz") as expected:
        for name in arrays:
            assert found[name].dtype == expected[name].dtype
            assert np.array_equal(found[name], expected[name])


def _npy(shape: str, dtype: str = "<f4", data: bytes = b"") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header = header.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


HOSTILE = {
    "two gigabytes of zeros": (_npy("(536870912,)", data=bytes(60_000_000)), zipfile.ZIP_DEFLATED),
    "more than is declared": (_npy("(14999968,)", data=bytes(60_000_000)), zipfile.ZIP_DEFLATED),
    "more than is declared, by bzip2": (_npy("(14999968,)", data=bytes(60_000_000)), zipfile.ZIP_BZIP2),
    "more elements than bytes": (_npy("(1, 4, 99999, 99999)", data=bytes(64)), zipfile.ZIP_STORED),
    "a negative size": (_npy("(-1, -16)", data=bytes(64)), zipfile.ZIP_STORED),
    "a text of gigabytes": (_npy("()", "<U999999999", bytes(64)), zipfile.ZIP_STORED),
    "objects": (_npy("(1,)", "|O", b"\x80\x02cos\nsystem\nU\x04echoR."), zipfile.ZIP_STORED),
    "no header": (b"\x93NUMPY", zipfile.ZIP_STORED),
    "a header of version 9": (b"\x93NUMPY\x09\x00" + bytes(64), zipfile.ZIP_STORED),
    "nested tuples": (_npy("(" * 50_000), zipfile.ZIP_STORED),
}


def test_characters_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    """NumPy makes a str of them, at which Python fails later."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("text.npy", _npy("()", "<U2", b"\0\0\0\x7fa\0\0\0"))
    with pytest.raises(ValueError, match="characters that don't exist"):
        read_arrays(tmp_path / "a.npz", ["text"])


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_the_memory_of_its_size(tmp_path: Path, kind: str) -> None:
    latents, compression = HOSTILE[kind]
    with io.BytesIO() as recipe, zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        np.save(recipe, np.array("{}"))
        archive.writestr("latents.npy", latents)
        archive.writestr("recipe.npy", recipe.getvalue())
    if "declared" in kind:
        data, sizes = (tmp_path / "a.npz").read_bytes(), (len(latents), len(HOSTILE["no header"][0]))
        real, declared = (size.to_bytes(4, "little") for size in sizes)
        assert data.count(real) == 2, "before the entry, and in the directory"
        (tmp_path / "a.npz").write_bytes(data.replace(real, declared))
    tracemalloc.start(1)
    try:
        with pytest.raises(RequestError, match=r"a\.npz holds no latents, or is damaged"):
            load_latents(tmp_path / "a.npz")
        assert tracemalloc.get_traced_memory()[1] < 10 * (tmp_path / "a.npz").stat().st_size + 20e6
    finally:
        tracemalloc.stop()
