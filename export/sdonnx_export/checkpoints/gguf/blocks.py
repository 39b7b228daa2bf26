"""The types of GGUF's tensors, and their conversion to float32 with the same bits as ggml's.

A quantized row is a sequence of blocks, of 32 or 256 elements. An element is an integer of 2 to 8 bits times the scale
of its block; the K types have another scale for every 16 or 32 elements, and most of them a minimum that is added.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.files.dtypes import stored_dtype, widen

TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""ggml's types by their number in a file."""

_AT_ONCE = 1 << 20
"""Elements that are dequantized at once; it bounds what that takes besides the result."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A quantized type."""

    elements: int
    """In a block."""
    dtype: np.dtype[Any]
    """The block's fields as stored."""
    values: Callable[[AnyArray], AnyArray]
    """Return the elements of blocks, ``(n, elements)``, or that many in any shape."""


def dequantize(stored: AnyArray, type_name: str) -> AnyArray:
    """Return a tensor's elements, flat, from its bytes: float16 and integers as stored, all others as float32."""
    plain = stored_dtype(type_name)
    if plain is not None:
        return widen(stored.view(plain), type_name)
    block = BLOCKS[type_name]
    blocks = stored.view(block.dtype)
    result = np.empty((len(blocks), block.elements), np.float32)
    step = _AT_ONCE // block.elements
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), step):
            part = blocks[start : start + step]
            result[start : start + step] = block.values(part).reshape(len(part), -1)
    return result.reshape(-1)


def num_bytes(type_name: str, elements: int) -> int:
    """Return the bytes of so many elements, a multiple of the block's."""
    plain = stored_dtype(type_name)
    if plain is not None:
        return elements * plain.itemsize
    return elements // BLOCKS[type_name].elements * BLOCKS[type_name].dtype.itemsize


def block_elements(type_name: str) -> int | None:
    """Return the elements of a block, 1 where they aren't quantized; None for a type that can't be converted."""
    if stored_dtype(type_name) is not None:
        return 1
    return BLOCKS[type_name].elements if type_name in BLOCKS else None


def _unpack(packed: AnyArray, bits: int, group: int) -> AnyArray:
    """Split bytes into integers: of every ``group`` bytes first the lowest ``bits`` of each, then the next."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, np.newaxis]
    planes = packed.reshape(len(packed), -1, 1, group) >> shifts
    return (planes & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)  # (n, bytes * 8 / bits)


def _single(numbers: AnyArray) -> AnyArray:
    """Return one number per block as float32, ``(n, 1)``."""
    return numbers.astype(np.float32)[:, np.newaxis]


def _q4(blocks: AnyArray) -> AnyArray:
    return _unpack(blocks["low"], 4, 16)


def _q5(blocks: AnyArray) -> AnyArray:
    return _q4(blocks) | _unpack(blocks["high"], 1, 1) << 4


def _centered(integers: AnyArray, middle: int) -> AnyArray:
    return (integers.astype(np.int8) - np.int8(middle)).astype(np.float32)


def _q4_0(blocks: AnyArray) -> AnyArray:
    return _single(blocks["scale"]) * _centered(_q4(blocks), 8)


def _q4_1(blocks: AnyArray) -> AnyArray:
    return _single(blocks["scale"]) * _q4(blocks).astype(np.float32) + _single(blocks["minimum"])


def _q5_0(blocks: AnyArray) -> AnyArray:
    return _single(blocks["scale"]) * _centered(_q5(blocks), 16)


def _q5_1(blocks: AnyArray) -> AnyArray:
    return _single(blocks["scale"]) * _q5(blocks).astype(np.float32) + _single(blocks["minimum"])


def _q8_0(blocks: AnyArray) -> AnyArray:
    return _single(blocks["scale"]) * blocks["low"].astype(np.float32)


def _grouped(integers: AnyArray, scales: AnyArray) -> AnyArray:
    """Return integers as float32 beside the scales of their groups, ``(n, groups, elements)``."""
    return integers.reshape(*scales.shape, -1).astype(np.float32)


def _q2_k(blocks: AnyArray) -> AnyArray:
    scales = _single(blocks["scale"]) * (blocks["scales"] & 15).astype(np.float32)  # (n, 16)
    minima = _single(blocks["minimum"]) * (blocks["scales"] >> 4).astype(np.float32)
    values = _grouped(_unpack(blocks["low"], 2, 32), scales)
    return scales[..., np.newaxis] * values - minima[..., np.newaxis]


def _q3_k(blocks: AnyArray) -> AnyArray:
    packed = blocks["scales"]
    low, high = _unpack(packed[:, :8], 4, 8), _unpack(packed[:, 8:], 2, 4)
    scales = _single(blocks["scale"]) * _centered(low | high << 4, 32)  # (n, 16)
    values = _unpack(blocks["low"], 2, 32) | _unpack(blocks["high"], 1, 32) << 2
    return scales[..., np.newaxis] * _grouped(_centered(values, 4), scales)


def _six_bits(packed: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Unpack 8 scales and 8 minima of 6 bits from 12 bytes; the upper two bits of the last four lie with the first."""
    scales, minima, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return (
        np.concatenate([scales & 63, last & 15 | scales >> 6 << 4], axis=1).astype(np.float32),
        np.concatenate([minima & 63, last >> 4 | minima >> 6 << 4], axis=1).astype(np.float32),
    )


def _with_minima(blocks: AnyArray, integers: AnyArray) -> AnyArray:
    scales, minima = _six_bits(blocks["scales"])
    scales, minima = _single(blocks["scale"]) * scales, _single(blocks["minimum"]) * minima  # (n, 8)
    return scales[..., np.newaxis] * _grouped(integers, scales) - minima[..., np.newaxis]


def _q4_k(blocks: AnyArray) -> AnyArray:
    return _with_minima(blocks, _unpack(blocks["low"], 4, 32))


def _q5_k(blocks: AnyArray) -> AnyArray:
    return _with_minima(blocks, _unpack(blocks["low"], 4, 32) | _unpack(blocks["high"], 1, 32) << 4)


def _q6_k(blocks: AnyArray) -> AnyArray:
    scales = _single(blocks["scale"]) * blocks["scales"].astype(np.float32)  # (n, 16)
    values = _unpack(blocks["low"], 4, 64) | _unpack(blocks["high"], 2, 32) << 4
    return scales[..., np.newaxis] * _grouped(_centered(values, 32), scales)


def _fields(**fields: str | tuple[str, int]) -> np.dtype[Any]:
    return np.dtype([(name, *([kind] if isinstance(kind, str) else kind)) for name, kind in fields.items()])


_HALF = "<f2"
BLOCKS: Mapping[str, Block] = {
    "Q4_0": Block(elements=32, values=_q4_0, dtype=_fields(scale=_HALF, low=("u1", 16))),
    "Q4_1": Block(elements=32, values=_q4_1, dtype=_fields(scale=_HALF, minimum=_HALF, low=("u1", 16))),
    "Q5_0": Block(elements=32, values=_q5_0, dtype=_fields(scale=_HALF, high=("u1", 4), low=("u1", 16))),
    "Q5_1": Block(elements=32, values=_q5_1, dtype=_fields(scale=_HALF, minimum=_HALF, high=("u1", 4), low=("u1", 16))),
    "Q8_0": Block(elements=32, values=_q8_0, dtype=_fields(scale=_HALF, low=("i1", 32))),
    "Q2_K": Block(
        elements=256, values=_q2_k, dtype=_fields(scales=("u1", 16), low=("u1", 64), scale=_HALF, minimum=_HALF)
    ),
    "Q3_K": Block(
        elements=256, values=_q3_k, dtype=_fields(high=("u1", 32), low=("u1", 64), scales=("u1", 12), scale=_HALF)
    ),
    "Q4_K": Block(
        elements=256, values=_q4_k, dtype=_fields(scale=_HALF, minimum=_HALF, scales=("u1", 12), low=("u1", 128))
    ),
    "Q5_K": Block(
        elements=256,
        values=_q5_k,
        dtype=_fields(scale=_HALF, minimum=_HALF, scales=("u1", 12), high=("u1", 32), low=("u1", 128)),
    ),
    "Q6_K": Block(
        elements=256, values=_q6_k, dtype=_fields(low=("u1", 128), high=("u1", 64), scales=("i1", 16), scale=_HALF)
    ),
}
"""The quantized types that can be converted."""
