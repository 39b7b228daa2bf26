"""Read and write ``.onnx`` files without the onnx library: the one place that knows the field numbers of onnx.proto."""

from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from sdonnx_runtime.errors import PackageError, SdonnxError
from sdonnx_runtime.files.kinds import describe_file

T = TypeVar("T")

Field: TypeAlias = "tuple[int, int | str | bytes | memoryview]"
"""A field's number and its value: an integer, a text, or the bytes of an array or another message."""

_IR_VERSION, _PRODUCER_NAME, _GRAPH, _OPSET_IMPORT = 1, 2, 7, 8  # ModelProto
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2  # OperatorSetIdProto
_NODE, _GRAPH_NAME, _INITIALIZER, _INPUT, _OUTPUT, _VALUE_INFO = 1, 2, 5, 11, 12, 13  # GraphProto
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _OP_TYPE, _ATTRIBUTE, _DOMAIN, _METADATA = 1, 2, 3, 4, 5, 7, 9  # NodeProto
_ATTRIBUTE_NAME, _FLOAT, _INT, _TEXT, _INTS, _ATTRIBUTE_TYPE = 1, 2, 3, 4, 8, 20  # AttributeProto
_TYPE_INT, _TYPE_TEXT, _TYPE_INTS = 2, 3, 7  # AttributeProto.AttributeType
_DIMS, _DATA_TYPE, _TENSOR_NAME, _RAW_DATA, _EXTERNAL_DATA = 1, 2, 8, 9, 13  # TensorProto
_REPLACED = (_DIMS, _DATA_TYPE, _TENSOR_NAME, _EXTERNAL_DATA)
_VALUE_NAME, _TYPE = 1, 2  # ValueInfoProto
_TENSOR_TYPE, _ELEMENT_TYPE, _SHAPE, _DIM, _DIM_VALUE = 1, 1, 2, 1, 1  # TypeProto
_KEY, _VALUE = 1, 2  # StringStringEntryProto

_MAX_ENTRIES = 200_000
"""Fields of a message, and numbers of a field: each takes a hundred times its bytes; the largest graphs have 20,000."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tensor:
    """A TensorProto: an initializer."""

    encoded: memoryview
    name: str
    data_type: int
    """A TensorProto.DataType."""
    shape: tuple[int, ...]
    raw_data: memoryview
    """The elements, where they are in the ``.onnx`` file itself."""
    external: Mapping[str, str]
    """Otherwise ``location``, ``offset`` and ``length`` of them in another file; empty if there is none."""

    def with_external(self, name: str, shape: Iterable[int], external: Mapping[str, str], kind: int = 0) -> "Tensor":
        """The tensor with another name, shape, ``external`` and, unless it is 0, ``data_type``."""
        others = [each for each in fields(self.encoded) if each[0] not in _REPLACED]
        ends = [*((_DIMS, size) for size in shape), (_DATA_TYPE, kind or self.data_type), (_TENSOR_NAME, name)]
        return _decode_tensor(memoryview(_encode(*ends, *others, *_encode_entries(_EXTERNAL_DATA, external))))


@dataclass(frozen=True, kw_only=True, eq=False)
class Node:
    """A NodeProto: one operator."""

    encoded: memoryview
    op: str
    inputs: tuple[str, ...]
    """By name; empty where an optional one is left out."""
    outputs: tuple[str, ...]
    stage: str
    """The stage that its metadata puts it in; empty without one."""

    @cached_property
    def name(self) -> str:
        """The name of the node itself; empty without one."""
        return next(iter(_texts(_group(self.encoded)[_NODE_NAME])), "")

    @cached_property
    def attributes(self) -> Mapping[str, Any]:
        """Numbers, texts, and tuples of integers, by name."""
        return dict(map(_decode_attribute, _bytes(_group(self.encoded)[_ATTRIBUTE])))

    def rewire(self, inputs: Sequence[str], *outputs: str) -> "Node":
        """The same operator with other inputs and outputs; its name is left out."""
        kept = [each for each in fields(self.encoded) if each[0] not in (_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME)]
        ends = [*((_NODE_INPUT, each) for each in inputs), *((_NODE_OUTPUT, each) for each in outputs)]
        return replace(self, encoded=memoryview(_encode(*ends, *kept)), inputs=tuple(inputs), outputs=outputs)

    def with_attribute(self, name: str, value: "int | Sequence[int]") -> "Node":
        """The same operator with another value of an attribute."""
        kept = [
            (number, each)
            for number, each in fields(self.encoded)
            if number != _ATTRIBUTE or isinstance(each, int) or _texts(_group(each)[_ATTRIBUTE_NAME]) != (name,)
        ]
        return replace(self, encoded=memoryview(_encode(*kept, _encode_attribute(name, value))))


@dataclass(frozen=True, kw_only=True)
class ValueInfo:
    """A ValueInfoProto: an input or output."""

    data_type: int
    """A TensorProto.DataType; 0 if it has none."""
    shape: tuple[int | str, ...]
    """The size of each axis, or its symbolic name; empty text where it has neither."""

    @classmethod
    def decode(cls, encoded: memoryview) -> "ValueInfo":
        """Raises ValueError or IndexError if it is damaged, or not a tensor."""
        tensor = _group(_bytes(_group(_bytes(_group(encoded)[_TYPE])[0])[_TENSOR_TYPE])[0])
        dims = [dim for shape in _bytes(tensor[_SHAPE]) for dim in _bytes(_group(shape)[_DIM])]
        sizes = [[value if isinstance(value, int) else str(value, "utf-8") for _, value in fields(dim)] for dim in dims]
        return cls(data_type=_integer(tensor[_ELEMENT_TYPE]), shape=tuple(size[0] if size else "" for size in sizes))


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A ModelProto with its GraphProto."""

    data: memoryview
    """The whole file, of which all `memoryview` are parts."""
    nodes: tuple[Node, ...]
    initializers: Mapping[str, Tensor]
    inputs: Mapping[str, memoryview]
    """Encoded `ValueInfo`, as are ``outputs`` and ``value_info``."""
    outputs: Mapping[str, memoryview]
    value_info: Mapping[str, memoryview]
    """Of values between nodes."""

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators; 0 if it says none."""
        imports = map(_group, _bytes(_group(self.data)[_OPSET_IMPORT]))
        return next((_integer(each[_OPSET_VERSION]) for each in imports if not any(_texts(each[_OPSET_DOMAIN]))), 0)

    def encode_part(
        self, name: str, nodes: Iterable[Node], weights: Iterable[memoryview], inputs: Iterable[str],
        outputs: Iterable[str], opset: int | None = None,
    ) -> bytes:  # fmt: skip
        """Encode a part of the graph as a model of the same versions; KeyError for an input without a `ValueInfo`.

        ``opset`` is another version of ONNX's own operators.
        """
        described = {**self.value_info, **self.outputs, **self.inputs}
        body: list[Field] = [(_NODE, node.encoded) for node in nodes]
        body += [(_INITIALIZER, each) for each in weights]
        body += [(_INPUT, described[each]) for each in inputs] + [(_OUTPUT, described[each]) for each in outputs]
        graph = _encode((_GRAPH_NAME, name), *body)
        versions = [each for each in fields(self.data) if each[0] not in (_PRODUCER_NAME, _GRAPH)]
        if opset is not None:
            others = [(number, each) for number, each in versions if number != _OPSET_IMPORT or _is_domain(each)]
            versions = [*others, (_OPSET_IMPORT, _encode((_OPSET_VERSION, opset)))]
        return _encode(*versions, (_GRAPH, graph))


def decode_model(data: memoryview, *, nodes: bool = True) -> Model:
    """Decode an ``.onnx`` file but its weights, without ``nodes`` if False; ValueError or IndexError if damaged."""
    (graph,) = _bytes(_group(data)[_GRAPH])
    parts = _group(graph)
    inputs, outputs, value_info = (
        {_texts(_group(each)[_VALUE_NAME])[0]: each for each in _bytes(parts[number])}
        for number in (_INPUT, _OUTPUT, _VALUE_INFO)
    )
    tensors = {each.name: each for each in map(_decode_tensor, _bytes(parts[_INITIALIZER]))}
    decoded = tuple(map(_decode_node, _bytes(parts[_NODE] if nodes else [])))
    return Model(data=data, nodes=decoded, initializers=tensors, inputs=inputs, outputs=outputs, value_info=value_info)


@contextmanager
def package_errors(path: Path) -> Generator[None, None, None]:
    """Turn what reading and decoding an ``.onnx`` file raises into a PackageError."""
    try:
        yield
    except SdonnxError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        what = describe_file(path, is_text=True) if path.suffix == ".onnx" else None
        what = what or f"is damaged ({error}); run 'sdonnx export' again"
        raise PackageError(f"{path} {what}") from None
    except OSError as error:
        raise PackageError(f"{path} can't be read ({error.strerror}); run 'sdonnx export' again") from None


def make_node(
    op: str, inputs: Sequence[str], output: str | tuple[str, ...], *, stage: str,
    **attributes: int | str | Sequence[int],
) -> Node:  # fmt: skip
    """An operator of ONNX's own in a stage, with one output or several."""
    outputs = (output,) if isinstance(output, str) else output
    ends = [*((_NODE_INPUT, each) for each in inputs), *((_NODE_OUTPUT, each) for each in outputs)]
    encoded = [_encode_attribute(name, value) for name, value in attributes.items()]
    metadata = _encode_entries(_METADATA, {"stage": stage})
    return _decode_node(memoryview(_encode(*ends, (_OP_TYPE, op), *encoded, *metadata)))


def single_node_model(
    op: str, inputs: int, *sizes: int, domain: str = "", data_type: int = 1, any_shape: bool = False, **attributes: int
) -> bytes:  # fmt: skip
    """Encode a model of one operator of opset 13, or of another domain: ``y = op(x, x, …)``, of ``sizes``."""
    shape = _encode(*((_DIM, _encode((_DIM_VALUE, size))) for size in sizes))
    shapes: list[Field] = [] if any_shape else [(_SHAPE, shape)]
    kind = _encode((_TENSOR_TYPE, _encode((_ELEMENT_TYPE, data_type), *shapes)))
    x, y = (_encode((_VALUE_NAME, name), (_TYPE, kind)) for name in (b"x", b"y"))
    details: list[Field] = [(_OP_TYPE, op), *(_encode_attribute(*each) for each in attributes.items())]
    imports: list[Field] = [(_OPSET_IMPORT, _encode((_OPSET_VERSION, 13)))]
    if domain:
        details.append((_DOMAIN, domain))
        imports.append((_OPSET_IMPORT, _encode((_OPSET_DOMAIN, domain), (_OPSET_VERSION, 1))))
    node = _encode(*[(_NODE_INPUT, b"x")] * inputs, (_NODE_OUTPUT, b"y"), *details)
    graph = _encode((_NODE, node), (_GRAPH_NAME, b"one"), (_INPUT, x), (_OUTPUT, y))
    return _encode((_IR_VERSION, 8), *imports, (_GRAPH, graph))


def _is_domain(imported: "int | memoryview") -> bool:
    """Whether an OperatorSetId is not that of ONNX's own operators."""
    return not isinstance(imported, int) and any(_texts(_group(imported)[_OPSET_DOMAIN]))


def _decode_node(encoded: memoryview) -> Node:
    parts = _group(encoded)
    stage = _decode_entries(parts[_METADATA]).get("stage", "")
    inputs, outputs, op = (_texts(parts[number]) for number in (_NODE_INPUT, _NODE_OUTPUT, _OP_TYPE))
    return Node(encoded=encoded, op=op[0], inputs=inputs, outputs=outputs, stage=stage)


def _decode_tensor(encoded: memoryview) -> Tensor:
    parts = _group(encoded)
    return Tensor(
        encoded=encoded, name=_texts(parts[_TENSOR_NAME])[0], data_type=_integer(parts[_DATA_TYPE]),
        shape=_integers(parts[_DIMS]), raw_data=(*_bytes(parts[_RAW_DATA]), memoryview(b""))[0],
        external=_decode_entries(parts[_EXTERNAL_DATA]),
    )  # fmt: skip


def _decode_attribute(encoded: memoryview) -> tuple[str, Any]:
    parts = _group(encoded)
    floats = [float(np.frombuffer(each, np.float32)[0]) for each in _bytes(parts[_FLOAT])]
    single = (*_integers(parts[_INT]), *floats, *_texts(parts[_TEXT]))
    value = _integers(parts[_INTS]) or next(iter(single), None)
    return _texts(parts[_ATTRIBUTE_NAME])[0], value


def _group(data: memoryview) -> "defaultdict[int, list[int | memoryview]]":
    """The values of a message's fields by number."""
    parts = defaultdict[int, "list[int | memoryview]"](list)
    for number, value in _limit(fields(data)):
        parts[number].append(value)
    return parts


def _limit(entries: Iterable[T]) -> Iterator[T]:
    for count, each in enumerate(entries):
        if count == _MAX_ENTRIES:
            raise ValueError(f"it has more than {_MAX_ENTRIES} entries in one place")
        yield each


def _bytes(values: "Iterable[int | memoryview]") -> list[memoryview]:
    return [value for value in values if isinstance(value, memoryview)]


def _texts(values: "Iterable[int | memoryview]") -> tuple[str, ...]:
    return tuple(str(value, "utf-8") for value in _bytes(values))


def _integer(values: "Iterable[int | memoryview]") -> int:
    return next((value for value in values if isinstance(value, int)), 0)


def _integers(values: "Iterable[int | memoryview]") -> tuple[int, ...]:
    """Signed integers, which may be packed."""
    many = [each for value in values for each in ([value] if isinstance(value, int) else _limit(_varints(value)))]
    return tuple(each - (1 << 64) if each >> 63 else each for each in many)


def _decode_entries(values: "Iterable[int | memoryview]") -> dict[str, str]:
    entries = [
        {number: str(text, "utf-8") for number, text in fields(each) if not isinstance(text, int)}
        for each in _bytes(values)
    ]
    return {each.get(_KEY, ""): each.get(_VALUE, "") for each in entries}


def _encode_attribute(name: str, value: "int | str | Sequence[int]") -> Field:
    if isinstance(value, int):
        content: list[Field] = [(_INT, value), (_ATTRIBUTE_TYPE, _TYPE_INT)]
    elif isinstance(value, str):
        content = [(_TEXT, value), (_ATTRIBUTE_TYPE, _TYPE_TEXT)]
    else:
        content = [*((_INTS, each) for each in value), (_ATTRIBUTE_TYPE, _TYPE_INTS)]
    return _ATTRIBUTE, _encode((_ATTRIBUTE_NAME, name), *content)


def _encode_entries(number: int, entries: Mapping[str, str]) -> list[Field]:
    return [(number, _encode((_KEY, key), (_VALUE, value))) for key, value in entries.items()]


def fields(data: memoryview) -> Iterator[tuple[int, "int | memoryview"]]:
    """Split a protobuf message into its fields, by their numbers; ValueError or IndexError if it is damaged."""
    offset = 0
    while offset < len(data):
        key, offset = _varint(data, offset)
        wire_type = key & 7
        if wire_type == 0:
            value, offset = _varint(data, offset)
            yield key >> 3, value
            continue
        if wire_type == 2:
            length, offset = _varint(data, offset)
        else:
            length = {1: 8, 5: 4}.get(wire_type, len(data))
        if offset + length > len(data):
            raise ValueError("it is cut")
        yield key >> 3, data[offset : offset + length]
        offset += length


def _encode(*message: Field) -> bytes:
    """Encode a message of fields, as `fields` gives them."""
    pieces: list[bytes | memoryview] = []
    for number, value in message:
        value = value.encode() if isinstance(value, str) else value
        if isinstance(value, int):
            pieces += [_encode_varint(number << 3), _encode_varint(value)]
        else:
            pieces += [_encode_varint(number << 3 | 2), _encode_varint(len(value)), value]
    return b"".join(pieces)


def _encode_varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # two's complement
    digits = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(digit | 128 for digit in digits[:-1]), digits[-1]])


def _varints(data: memoryview) -> Iterator[int]:
    """The integers of a packed field."""
    offset = 0
    while offset < len(data):
        value, offset = _varint(data, offset)
        yield value


def _varint(data: memoryview, offset: int) -> tuple[int, int]:
    """An integer of seven bits a byte, and the offset after it."""
    value = shift = 0
    while True:
        byte = data[offset]
        offset += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, offset
        shift += 7
        if shift > 63:
            raise ValueError("a number has no end")
