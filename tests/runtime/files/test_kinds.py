"""What was downloaded instead of a file is named, with how to get the file."""

import gzip
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sdonnx_models
from PIL import Image
from sdonnx_export.checkpoints.open import open_checkpoint
from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.adapters.merging import match_loras
from sdonnx_runtime.adapters.textual_inversion import read_embedding
from sdonnx_runtime.errors import ExportError, PackageError, RequestError
from sdonnx_runtime.files.tensors import open_tensors
from sdonnx_runtime.graphs.initializers import read_initializers
from sdonnx_runtime.outputs.latents_file import load_latents
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.text.tokenizer import Tokenizer

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 4265380512\n"
)


def _zip() -> bytes:
    with io.BytesIO() as stream:
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("model/readme.txt", "x")
        return stream.getvalue()


def _tar() -> bytes:
    with io.BytesIO() as stream:
        with tarfile.open(fileobj=stream, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("storages"))
        return stream.getvalue()


def _png() -> bytes:
    with io.BytesIO() as stream:
        Image.new("RGB", (8, 8)).save(stream, "PNG")
        return stream.getvalue()


def _npy() -> bytes:
    with io.BytesIO() as stream:
        np.save(stream, np.zeros(3))
        return stream.getvalue()


KINDS = {
    "git-LFS pointer": (POINTER, "is a git-LFS pointer, .*; run 'git lfs pull'"),
    "git-annex pointer": (b"/annex/objects/SHA256E-s9--a.ckpt\n", "is a git-annex pointer, .*; run 'git annex get'"),
    "web page": (b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title>", "is a web page, .*logged in"),
    "web page after a byte-order mark": (b"\xef\xbb\xbf<HTML><body>403 Forbidden", "is a web page"),
    "XML of a bucket": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "is a web page"),
    "JSON": (b'{"error": "Unauthorized", "message": "log in"}', "is JSON .*Unauthorized.*; download it again"),
    "text": (b"Repository Not Found", "is text .*Repository Not Found.*; download it again"),
    "long text": ("Zugriff verweigert für dich. ".encode() * 100, "is text .*verweigert"),
    "nothing": (b"", "is empty; download it again"),
    "zeros": (bytes(5000), "its download has not finished"),
    "zip": (_zip(), "zip archive of model/readme.txt; unpack it"),
    "cut zip": (_zip()[:-5], "is damaged or incomplete"),
    "tar": (_tar(), "is a tar archive; unpack it"),
    "gzip": (gzip.compress(b"x"), "is a gzip archive; unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "is a 7-Zip archive; unpack it"),
    "rar": (b"Rar!\x1a\x07\x01\0", "is a RAR archive; unpack it"),
    "GGUF": (
        b"GGUF\3\0\0\0" + bytes(16),
        "is a GGUF file; only sdonnx export reads these: give a .safetensors file here",
    ),
    "PNG": (_png(), "is a PNG image; give the file of the model"),
    "NumPy": (_npy(), "is a NumPy array"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    "noise": (bytes(range(128, 256)), "is not a file of tensors"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_named_as_weights(tmp_path: Path, kind: str, suffix: str) -> None:
    content, message = KINDS[kind]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message) as error:
        open_tensors(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def _read_lora(path: Path) -> None:
    match_loras("model", {"unet": ["conv_in.weight"]}, [Lora(path=path)])


@pytest.mark.parametrize("read", [_read_lora, read_embedding, load_latents])
def test_all_readers_of_tensors_name_it(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = tmp_path / "file.pt"
    for kind in ("git-LFS pointer", "web page", "nothing"):
        content, message = KINDS[kind]
        path.write_bytes(content)
        with pytest.raises(RequestError, match=message):
            read(path)


def test_a_missing_file_or_a_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="can't be read .*No such file"):
        open_tensors(tmp_path / "none.pt")
    with pytest.raises(RequestError, match="can't be read"):
        open_tensors(tmp_path)


def test_a_header_of_any_length_is_a_safetensors_file(tmp_path: Path) -> None:
    """Its first byte can be any: here that of "{", of "<", of "G"."""
    for length in b"{<GPv\x80":
        text = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
        header = text.ljust(length + 256)
        path = tmp_path / "t.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\1")
        assert open_tensors(path).read("a") == [1]


@pytest.mark.parametrize("name", ["sdonnx.json", "unet/model.onnx", "unet/model.onnx_data"])
@pytest.mark.parametrize("kind", ["git-LFS pointer", "web page", "nothing"])
def test_a_package_names_it(tmp_path: Path, name: str, kind: str) -> None:
    """Of a package that was cloned without git-LFS: its manifest tells the sizes."""
    content, message = KINDS[kind]
    bundled = Path(sdonnx_models.__file__).parent / "pictogram"
    shutil.copytree(bundled, tmp_path / "package")
    (tmp_path / "package" / name).write_bytes(content)
    with pytest.raises(PackageError, match=message):
        Package.open(tmp_path / "package")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_tokenizer_names_it(tmp_path: Path, name: str) -> None:
    bundled = Path(sdonnx_models.__file__).parent / "pictogram" / "tokenizer"
    shutil.copytree(bundled, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / name).write_bytes(POINTER)
    with pytest.raises(PackageError, match=f"{name} is a git-LFS pointer, .*; run 'git lfs pull' [^;]*$") as error:
        Tokenizer.open(tmp_path / "tokenizer")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("kind", ["git-LFS pointer", "web page", "nothing"])
def test_a_graph_names_it(tmp_path: Path, kind: str) -> None:
    """Of an optimum export, which tells no sizes."""
    content, message = KINDS[kind]
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(PackageError, match=message):
        read_initializers(tmp_path / "model.onnx")


@pytest.mark.parametrize("kind", ["git-LFS pointer", "web page", "nothing"])
def test_a_diffusers_directory_names_it(tmp_path: Path, kind: str) -> None:
    content, message = KINDS[kind]
    (tmp_path / "model_index.json").write_bytes(content)
    with pytest.raises(ExportError, match=message):
        open_checkpoint(str(tmp_path))
