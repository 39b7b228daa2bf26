"""Protocol buffers' messages, read and put together field by field: what there is to an ``.onnx`` file."""

from collections.abc import Iterator


def fields(data: memoryview) -> Iterator[tuple[int, "int | memoryview"]]:
    """The fields of a protocol buffer's message: numbers, and numbers or bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if kind == 2:
            length, place = _varint(data, place)
        else:
            length = {1: 8, 5: 4}.get(kind, len(data))
        if place + length > len(data):
            raise ValueError("it is cut")
        yield key >> 3, data[place : place + length]
        place += length


def submessages(data: memoryview, number: int) -> list[memoryview]:
    """What the fields of a ``number`` hold that are bytes: texts, arrays or other messages."""
    return [part for found, part in fields(data) if found == number and isinstance(part, memoryview)]


def encode_message(*submessages: tuple[int, "int | bytes | memoryview"]) -> bytes:
    """A message of fields, as `fields` gives them."""
    pieces: list[bytes | memoryview] = []
    for number, part in submessages:
        if isinstance(part, int):
            pieces += [_number(number << 3), _number(part)]
        else:
            pieces += [_number(number << 3 | 2), _number(len(part)), part]
    return b"".join(pieces)


def single_node_model(op: str, inputs: int, *sizes: int) -> bytes:
    """An ``.onnx`` file of one operator of opset 13 that is given ``x`` so many times and gives ``y``, both in float32.

    ``sizes`` are those of both.
    """
    tensor = encode_message((1, 1), (2, encode_message(*((1, encode_message((1, size))) for size in sizes))))
    ports = [
        (number, encode_message((1, name), (2, encode_message((1, tensor)))))
        for number, name in ((11, b"x"), (12, b"y"))
    ]
    node = encode_message(*[(1, b"x")] * inputs, (2, b"y"), (4, op.encode()))
    return encode_message((1, 8), (8, encode_message((2, 13))), (7, encode_message((1, node), (2, b"one"), *ports)))


def _number(value: int) -> bytes:
    """What `_varint` reads."""
    digits = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(digit | 128 for digit in digits[:-1]), digits[-1]])


def varints(data: memoryview) -> Iterator[int]:
    """Numbers that are packed in a field."""
    place = 0
    while place < len(data):
        value, place = _varint(data, place)
        yield value


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """A number of seven bits to a byte, and where what follows it begins."""
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number has no end")
