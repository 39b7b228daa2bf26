"""The dtypes of tensor files: their numpy types, and exact conversion to those that numpy computes with."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from sdonnx_runtime.arrays import AnyArray

_STORED: Mapping[str, str] = {
    "F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2", "BOOL": "?",
    "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1",
    "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E4M3FNUZ": "u1", "F8_E5M2FNUZ": "u1", "F8_E8M0": "u1",
}  # fmt: skip
"""Names of the safetensors format, and what numpy reads their elements as."""

_UNSUPPORTED_BITS: Mapping[str, int] = {"C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits of the format's dtypes that can't be converted."""

_FLOAT8: Mapping[str, tuple[int, int]] = {
    "F8_E4M3": (3, 7), "F8_E5M2": (2, 15), "F8_E4M3FNUZ": (3, 8), "F8_E5M2FNUZ": (2, 16),
}  # fmt: skip
"""Bits of the mantissa, and bias of the exponent."""


def element_bits(dtype: str) -> int | None:
    """Return the bits of an element; None for a dtype that the format didn't have."""
    if dtype in _STORED:
        return 8 * np.dtype(_STORED[dtype]).itemsize
    return _UNSUPPORTED_BITS.get(dtype)


def stored_dtype(dtype: str, *, big_endian: bool = False) -> np.dtype[Any] | None:
    """Return the numpy type of stored elements; None for a dtype that is not supported."""
    return np.dtype((">" if big_endian else "<") + _STORED[dtype]) if dtype in _STORED else None


def widen(stored: AnyArray, dtype: str) -> AnyArray:
    """Convert stored elements exactly: bfloat16 and float8 to float32, float64 to the nearest float32."""
    if dtype == "BF16":  # the upper half of a float32
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype.startswith("F8_"):
        return _float8_values(dtype)[stored]
    native = np.float32 if dtype == "F64" else stored.dtype.newbyteorder("=")
    return stored.astype(native, copy=False)


@lru_cache
def _float8_values(dtype: str) -> AnyArray:
    """Return the values of a float8 by its byte, (256,); OCP 8-bit floating point, FNUZ as in arXiv:2206.02915."""
    code = np.arange(256)
    if dtype == "F8_E8M0":
        return np.where(code == 255, np.nan, np.ldexp(1.0, code - 127)).astype(np.float32)
    mantissa_bits, bias = _FLOAT8[dtype]
    exponent, mantissa = (code & 127) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    is_normal = exponent > 0
    significand = mantissa + np.where(is_normal, 1 << mantissa_bits, 0)
    values = np.ldexp(significand.astype(np.float64), np.where(is_normal, exponent, 1) - bias - mantissa_bits)
    if dtype == "F8_E5M2":
        values[exponent == 31] = np.nan
        values[0b1_1111_00 & 127] = np.inf
        values[0b1_1111_00 | 128] = np.inf
    elif dtype == "F8_E4M3":
        values[[127, 255]] = np.nan
    values[128:] *= -1
    if dtype.endswith("FNUZ"):
        values[128] = np.nan
    return values.astype(np.float32)
