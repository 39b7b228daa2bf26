"""Seeded mutations of bytes, JSON, texts and archives: what chance, bad disks and malice make of a real input."""

import json
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from random import Random
from typing import Any, TypeAlias

Mutate: TypeAlias = Callable[[Random, bytes, Sequence[bytes]], bytes]
"""Changes an input; the last argument are others of its kind, to take parts of."""

_BITS = (7, 8, 15, 16, 24, 31, 32, 53, 63, 64)
INTEGERS = (0, 1, 2, *(sign * (1 << bits) + more for bits in _BITS for sign in (1, -1) for more in (-1, 0, 1)))
_DEEP = "DEEP"


def mutate_bytes(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change bytes in 1 to 8 places; in half of the cases the length stays."""
    changed, mutations = bytearray(data), _IN_PLACE if rng.random() < 0.5 else _BYTE_MUTATIONS
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        rng.choice(mutations)(rng, changed, others)
    return bytes(changed)


def _place(rng: Random, data: bytearray) -> int:
    """An index; in half of the cases near the beginning, where headers are."""
    return rng.randrange(min(len(data), 512) if rng.random() < 0.5 else len(data)) if data else 0


def _flip(rng: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    if data:
        data[_place(rng, data)] ^= 1 << rng.randrange(8)


def _set(rng: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    if data:
        data[_place(rng, data)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))


def _integer(rng: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    at, size = _place(rng, data), rng.choice((1, 2, 4, 8))
    number = rng.choice(INTEGERS) % (1 << 8 * size)
    data[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))[: len(data) - at]


def _truncate(rng: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    del data[_place(rng, data) :]


def _delete(rng: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    at = _place(rng, data)
    del data[at : at + rng.choice((1, 2, 8, 64))]


def _insert(rng: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    at = _place(rng, data)
    data[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))


def _duplicate(rng: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    at, start = _place(rng, data), _place(rng, data)
    data[at:at] = data[start : start + rng.choice((1, 8, 64, 512))] * rng.choice((1, 1, 2, 50))


def _splice(rng: Random, data: bytearray, others: Sequence[bytes]) -> None:
    at, other = _place(rng, data), bytearray(rng.choice(others))
    data[at:] = other[_place(rng, other) :]


_IN_PLACE = (_flip, _flip, _set, _integer)
_BYTE_MUTATIONS = (*_IN_PLACE, _truncate, _delete, _insert, _duplicate, _splice)


def mutate_json(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Swap types, delete, rename and repeat keys, nest deeply; now and then change its bytes."""
    if rng.random() < 0.1:
        return mutate_bytes(rng, data, others)
    value = json.loads(data)
    for _ in range(1 << rng.randrange(3)):
        value = _change_node(rng, value)
    depth = rng.choice((10, 500, 100_000))
    return json.dumps(value).replace(f'"{_DEEP}"', "[" * depth + "]" * depth).encode()


def _change_node(rng: Random, value: Any) -> Any:
    """Change the value or, more often, a value somewhere in it."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or rng.random() < 0.05:
        return _other_value(rng, value)
    key = rng.choice(keys)
    if isinstance(value[key], (dict, list)) and rng.random() < 0.8:
        value[key] = _change_node(rng, value[key])
        return value
    match rng.randrange(8):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[rng.choice((f"{key}_", str(key).upper(), "", "a\nb", "\ud800", "__class__", *STRINGS))] = value[key]
        case 1:
            value *= rng.choice((0, 2, 50))
        case 2:
            value[key] = value[rng.choice(keys)]
        case _:
            value[key] = _other_value(rng, value[key])
    return value


STRINGS = (
    "", " ", "a\nb", "\x1b[31m", "\x00", "\ud800", "\u202e", "é", "\U0001f34e", "../../x", "/etc/passwd", "C:\\x",
    "NaN", "1e999", "-1", "x" * 5000, "{}", "%s", "unet", "plain",
)  # fmt: skip
_NUMBERS = (
    0.0, -0.0, 0.5, -1.5, 1e-320, 1e300, -1e300, math.inf, -math.inf, math.nan, 10**30, 3, 7, 64, 1000, *INTEGERS,
)  # fmt: skip


def _other_value(rng: Random, value: Any) -> Any:
    """Another value, in half of the cases of the same type."""
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if rng.random() < 0.5 and (numeric or isinstance(value, str)):
        return rng.choice(_NUMBERS if numeric else STRINGS)
    others = (None, True, False, [], {}, [value], {"a": value}, [value] * 3, _DEEP, str(value)[:100])
    return rng.choice((*others, rng.choice(_NUMBERS), rng.choice(STRINGS)))


def mutate_text(words: Sequence[str]) -> Mutate:
    """Make a mutation of a UTF-8 text: insert ``words`` of its grammar and odd characters, cut, repeat, nest."""

    def mutate(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
        text = data.decode("utf-8", "surrogatepass")
        for _ in range(1 << rng.randrange(5)):
            at, start = rng.randint(0, len(text)), rng.randint(0, len(text))
            match rng.randrange(6):
                case 0:
                    text = text[:at] + text[at + rng.choice((1, 3, 20)) :]
                case 1:
                    text = text[:at] + text[start : start + rng.choice((1, 5, 40))] + text[at:]
                case 2:
                    other = rng.choice(others).decode("utf-8", "surrogatepass")
                    text = text[:at] + other[rng.randint(0, len(other)) :]
                case 3:
                    text = text[:at] + rng.choice((*words, *STRINGS[:13], *_CHARACTERS)) + text[at:]
                case _:
                    times = rng.choice((1,) * 20 + (2, 3, 9, 40, 1000)) if len(text) < 4000 else 1
                    text = text[:at] + rng.choice(words) * times + text[at:]
        return text.encode("utf-8", "surrogatepass")

    return mutate


_CHARACTERS = (
    "\u0130", "\ufb03", "\u0345", "\u017f", "\u0301" * 50, "\ufeff", "\u200d", "\udc80", "\U0010ffff", "\u4e00",
    "\u3000", "\r", "\t", "\x7f", "\u2028", "\U0001d4ea", "ß", "٣",
)  # fmt: skip


def mutate_zip(names: Sequence[str] = ()) -> Mutate:
    """Make a mutation of the members of a zip archive whose names end in ``names``; in one of 5 cases of its bytes."""

    def mutate(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
        if rng.random() < 0.2:
            return mutate_bytes(rng, data, others)
        members = _unzip(data)
        chosen = rng.choice([name for name in members if name.endswith(tuple(names) or "")])
        donors = [part for other in others for name, part in _unzip(other).items() if name.endswith(tuple(names) or "")]
        members[chosen] = mutate_bytes(rng, members[chosen], donors)
        if rng.random() < 0.1:
            del members[rng.choice(list(members))]
        stream = BytesIO()
        with zipfile.ZipFile(stream, "w", rng.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))) as archive:
            for name, part in members.items():
                archive.writestr(name, part)
        return stream.getvalue()

    return mutate


def _unzip(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def mutate_safetensors(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change the header's JSON or, in one of 3 cases, any bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data, others)
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = mutate_json(rng, data[8:end], [data[8:end]])
    return struct.pack("<Q", len(header)) + header + data[end:]


def mutate_png(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change the content of a chunk and give it a valid checksum; in one of 4 cases any bytes."""
    if rng.random() < 0.25:
        return mutate_bytes(rng, data, others)
    chunks, at = [], 8
    while at < len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += size + 12
    index = rng.randrange(len(chunks))
    kind, content = chunks[index]
    chunks[index] = kind, mutate_bytes(rng, content, [content for _, content in chunks])
    if rng.random() < 0.2:
        chunks.insert(rng.randrange(len(chunks)), rng.choice(chunks))
    packed = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return data[:8] + b"".join(packed)


def mutate_files(mutations: Mapping[str, Mutate]) -> Mutate:
    """Make a mutation of one file of a `pack_files`: by name, or by the end of a name."""

    def mutate(rng: Random, data: bytes, _others: Sequence[bytes]) -> bytes:
        files = unpack_files(data)
        name = rng.choice([name for name in files if name.endswith(tuple(mutations))])
        change = next(each for end, each in mutations.items() if name.endswith(end))
        files[name] = change(rng, files[name], [files[name]])
        if rng.random() < 0.02:
            del files[name]
        return pack_files(files)

    return mutate


def pack_files(files: Mapping[str, bytes]) -> bytes:
    """Join files to one input of a parser that reads several."""
    return json.dumps({name: data.decode("latin-1") for name, data in files.items()}).encode()


def unpack_files(data: bytes) -> dict[str, bytes]:
    """Split what `pack_files` joined."""
    return {name: text.encode("latin-1") for name, text in json.loads(data).items()}
