"""safetensors files: what the format's own library accepts is read as torch has it, and nothing valid is "damaged"."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.files.safetensors import open_safetensors
from sdonnx_runtime.files.tensors import open_tensors

TORCH = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip
FLOAT8 = {
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip


@pytest.mark.parametrize("dtype", TORCH)
def test_tensors_are_read_as_torch_has_them(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.randn(3, 5).abs().to(dtype), "b.c": torch.ones(2, 1, 4).to(dtype)}
    tensors |= {"none": torch.zeros(0, 2, dtype=dtype), "scalar": torch.tensor(3).to(dtype)}
    save_file(tensors, tmp_path / "t.safetensors", {"about": "it"})
    file = open_safetensors(tmp_path / "t.safetensors")
    assert file.metadata["about"] == "it"
    for name, tensor in tensors.items():
        assert file.shapes[name] == tensor.shape
        assert file.dtypes[name] == TORCH[dtype]
        assert np.array_equal(file.read(name), tensor.to(torch.float32).numpy())


@pytest.mark.parametrize("dtype", FLOAT8)
def test_all_values_of_float8_are_widened_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(256).to(torch.uint8).view(dtype)
    path = tmp_path / "t.safetensors"
    _write(path, {"a": _entry(FLOAT8[dtype], [16, 16], 0, 256)}, bytes(range(256)))
    found, expected = open_safetensors(path).read("a").reshape(-1), values.float().numpy()
    assert found.dtype == np.float32
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found)[found == 0], np.signbit(expected)[expected == 0])


@pytest.mark.parametrize(
    ("dtype", "shape"), [("C64", [1]), ("F4", [16]), ("F6_E2M3", [8]), ("F6_E3M2", [8]), ("X9", [2])]
)
def test_a_dtype_that_is_not_supported_is_named_where_it_is_read(tmp_path: Path, dtype: str, shape: list[int]) -> None:
    path, size = tmp_path / "t.safetensors", 6 if dtype.startswith("F6") else 8
    _write(path, {"x": _entry(dtype, shape, 0, size), "a": _entry("F32", [2], size, size + 8)}, bytes(size + 8))
    file = open_safetensors(path)
    assert np.array_equal(file.read("a"), np.zeros(2, np.float32))
    with pytest.raises(RequestError, match=f"the dtype {dtype} of 'x' is not supported; give "):
        file.read("x")


def _entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _write(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


A, B = _entry("F32", [1], 0, 4), _entry("F32", [1], 4, 8)
UNUSUAL: dict[str, tuple[Any, bytes]] = {
    "metadata is null": ({"__metadata__": None, "a": A}, bytes(4)),
    "metadata at the end": ({"a": A, "__metadata__": {"x": "1"}}, bytes(4)),
    "metadata alone": ({"__metadata__": {"x": "1"}}, b""),
    "nothing": ({}, b""),
    "spaces behind": (json.dumps({"a": A}).encode() + b"   ", bytes(4)),
    "spaces before": (b" \n" + json.dumps({"a": A}).encode(), bytes(4)),
    "other order": ({"b": B, "a": A}, bytes(range(8))),
    "another key": ({"a": {**A, "note": {"x": [1]}}}, bytes(4)),
    "no elements": ({"z": _entry("F16", [0, 3], 0, 0), "a": A, "y": _entry("F16", [3, 0], 4, 4)}, bytes(4)),
    "a name in Chinese": ({"水墨": A}, bytes(4)),
    "an empty name": ({"": A}, bytes(4)),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_headers_are_read_as_by_the_library(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "t.safetensors"
    _write(path, *UNUSUAL[kind])
    file = open_safetensors(path)
    with safe_open(path, "np") as expected:
        assert set(file.shapes) == set(expected.keys())
        assert file.metadata == (expected.metadata() or {})
        for name in file.shapes:
            assert np.array_equal(file.read(name), expected.get_tensor(name))


def test_metadata_that_is_not_text_is_read_as_json(tmp_path: Path) -> None:
    """The library refuses it; trainers that write the header themselves don't."""
    _write(tmp_path / "t.safetensors", {"__metadata__": {"steps": 7, "tags": {"x": [1]}}, "a": A}, bytes(4))
    assert open_safetensors(tmp_path / "t.safetensors").metadata == {"steps": "7", "tags": '{"x": [1]}'}


INVALID: dict[str, tuple[Any, bytes, str]] = {
    "cut": ({"a": A}, bytes(3), "is incomplete: it has .* bytes"),
    "overlap": ({"a": A, "b": _entry("F32", [1], 2, 6)}, bytes(8), "'b' starts at byte 2; expected 4"),
    "gap": ({"a": B}, bytes(8), "'a' starts at byte 4; expected 0"),
    "shape": ({"a": _entry("F32", [2], 0, 4)}, bytes(4), "'a' has 4 bytes"),
    "negative": ({"a": _entry("F32", [-1], 0, 4)}, bytes(4), "damaged dtype, shape or offset"),
    "bool": ({"a": _entry("F32", [True], 0, 4)}, bytes(4), "damaged dtype, shape or offset"),  # type: ignore[list-item]
    "huge": ({"a": _entry("F32", [0, 2**70], 0, 0)}, b"", "damaged dtype, shape or offset"),
    "list": (b'{"__metadata__": [], "a": 1}', b"", "header that is not of the safetensors format"),
    "nesting": (b'{"a":' + b"[" * 100_000, b"", "header that is not of the safetensors format"),
    "values": (b'{"a":[' + b"[]," * 2_100_000 + b"[]]}", b"", "millions of values"),
    "half a pair": (b'{"\\ud800":' + json.dumps(A).encode() + b"}", bytes(4), "surrogates not allowed"),
    "dimensions": ({"a": _entry("F32", [1] * 72, 0, 4)}, bytes(4), "'a' has 72 dimensions; expected 8 at most"),
}


@pytest.mark.parametrize("kind", INVALID)
def test_an_invalid_file_is_refused_with_the_reason(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "t.safetensors"
    header, data, message = INVALID[kind]
    _write(path, header, data)
    if kind != "dimensions":
        with pytest.raises(SafetensorError), safe_open(path, "np"):
            pass
    with pytest.raises(RequestError, match=message) as error:
        open_tensors(path)
    assert "\n" not in str(error.value)


def test_a_download_that_was_cut_short_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.randn(30, 50)}, path)
    whole = path.read_bytes()
    for length in (20, 60, 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RequestError, match="is incomplete: it has .* bytes .*; download it again"):
            open_tensors(path)
