"""What the values of a graph measure: ONNX's rules of shapes, for the operators that packages are written in."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

import numpy as np

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.graphs.onnx_proto import fields, submessages, varints

_INPUT, _OUTPUT, _OP, _ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_NAME, _FLOAT, _INT, _INTS = 1, 2, 3, 8
"""Fields of onnx.proto's NodeProto and AttributeProto."""

ITEMSIZES: Mapping[int, int] = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8}
"""Bytes, by ONNX's numbers for element types."""


class UnsupportedGraph(Exception):  # noqa: N818 — it is no fault
    """A graph has an operator, or an input, that those of sdonnx don't have."""


@dataclass(frozen=True)
class TensorInfo:
    """An array that isn't there."""

    shape: tuple[int, ...]
    itemsize: float = 4
    """Bytes; of 4 bits a half."""
    known: AnyArray | None = field(default=None, compare=False)
    """What it holds, of what shapes are made of."""

    @property
    def nbytes(self) -> int:
        """What it would take."""
        return int(prod(self.shape) * self.itemsize)

    @classmethod
    def of(cls, array: AnyArray) -> "TensorInfo":
        """A small array that is there."""
        return cls(array.shape, array.itemsize, array)


@dataclass(frozen=True)
class Node:
    """An operator at work."""

    op: str
    inputs: tuple[str, ...]
    """By name; empty where one is left out."""
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    """Numbers, and tuples of integers."""


def node_of(data: memoryview) -> Node:
    """What a NodeProto says."""
    inputs, outputs = (tuple(str(part, "utf-8") for part in submessages(data, number)) for number in (_INPUT, _OUTPUT))
    return Node(
        str(submessages(data, _OP)[0], "utf-8"), inputs, outputs, dict(map(_attribute, submessages(data, _ATTRIBUTE)))
    )


def _attribute(data: memoryview) -> tuple[str, Any]:
    name, value, many = "", None, list[int]()
    for number, part in fields(data):
        if number == _ATTRIBUTE_NAME and isinstance(part, memoryview):
            name = str(part, "utf-8")
        elif number == _INT and isinstance(part, int):
            value = part - (1 << 64) if part >> 63 else part
        elif number == _FLOAT and isinstance(part, memoryview):
            value = float(np.frombuffer(part, np.float32)[0])
        elif number == _INTS:
            many += [part] if isinstance(part, int) else [*varints(part)]
    return name, tuple(each - (1 << 64) if each >> 63 else each for each in many) if many else value


def infer_shapes(nodes: Sequence[Node], values: dict[str, TensorInfo]) -> Iterator[Node]:
    """Goes through nodes in their order: ``values``, what is given, has what each gives when it comes out.

    Raises:
        UnknownGraph: an operator is none of those of packages, or an input is missing.
    """
    for node in nodes:
        missing = [name for name in node.inputs if name and name not in values]
        if missing:
            raise UnsupportedGraph(f"'{missing[0]}' comes from elsewhere")
        given = [values[name] if name else None for name in node.inputs]
        values.update(zip(node.outputs, _given(node, given), strict=False))
        yield node


def _given(node: Node, given: Sequence[TensorInfo | None]) -> list[TensorInfo]:
    compute = _COMPUTED.get(node.op)
    if compute is not None and all(each is None or each.known is not None for each in given):
        known = [each.known for each in given if each is not None and each.known is not None]
        return [TensorInfo.of(np.asarray(compute(known, node.attributes)))]
    try:
        found = _RULES[node.op]([each if each is not None else TensorInfo(()) for each in given], node.attributes)
    except (KeyError, IndexError, ValueError) as error:
        raise UnsupportedGraph(f"the operator {node.op}, or how it is written") from error
    return found if isinstance(found, list) else [found]


Rule: TypeAlias = Callable[[Sequence[TensorInfo], Mapping[str, Any]], "TensorInfo | list[TensorInfo]"]


def _like_first(given: Sequence[TensorInfo], _how: Mapping[str, Any]) -> TensorInfo:
    return TensorInfo(given[0].shape, given[0].itemsize)


def _elementwise(given: Sequence[TensorInfo], _how: Mapping[str, Any]) -> TensorInfo:
    return TensorInfo(np.broadcast_shapes(*(each.shape for each in given)), given[0].itemsize)


def _product(given: Sequence[TensorInfo], _how: Mapping[str, Any]) -> TensorInfo:
    x, weight = (each.shape for each in given[:2])
    return TensorInfo((*np.broadcast_shapes(x[:-2], weight[:-2]), *x[-2:-1], weight[-1]))


def _convolved(given: Sequence[TensorInfo], how: Mapping[str, Any]) -> TensorInfo:
    quantized = len(given) > 3  # QLinearConv
    (count, *sizes), kernel = given[0].shape, given[3 if quantized else 1].shape
    last = bool(how.get("channels_last"))
    sizes = sizes[:-1] if last else sizes[1:]
    pads = how.get("pads", (0,) * 4)
    places = [
        (size + before + after - side) // stride + 1
        for size, before, after, side, stride in zip(
            sizes, pads[:2], pads[2:], kernel[2:], how.get("strides", (1, 1)), strict=True
        )
    ]
    return TensorInfo((count, *places, kernel[0]) if last else (count, kernel[0], *places), 1 if quantized else 4)


def _pooled(given: Sequence[TensorInfo], how: Mapping[str, Any]) -> TensorInfo:
    sides = given[0].shape[2:]
    return TensorInfo((*given[0].shape[:2], *(side // step for side, step in zip(sides, how["strides"], strict=True))))


def _reshaped(given: Sequence[TensorInfo], _how: Mapping[str, Any]) -> TensorInfo:
    x, wanted = given
    shape = [x.shape[place] if size == 0 else int(size) for place, size in enumerate(_ints(wanted))]
    rest = prod(size for size in shape if size != -1)
    return TensorInfo(tuple(prod(x.shape) // rest if size == -1 else size for size in shape), x.itemsize)


def _reduced(given: Sequence[TensorInfo], how: Mapping[str, Any]) -> TensorInfo:
    axes = {axis % len(given[0].shape) for axis in _ints(given[1])}
    keep = how.get("keepdims", 1)
    sizes = [1 if axis in axes else size for axis, size in enumerate(given[0].shape) if keep or axis not in axes]
    return TensorInfo(tuple(sizes))


def _split(given: Sequence[TensorInfo], how: Mapping[str, Any]) -> list[TensorInfo]:
    shape, axis = list(given[0].shape), how.get("axis", 0)
    shape[axis] //= how["num_outputs"]
    return [TensorInfo(tuple(shape), given[0].itemsize)] * int(how["num_outputs"])


def _joined(given: Sequence[TensorInfo], how: Mapping[str, Any]) -> TensorInfo:
    shape, axis = list(given[0].shape), int(how["axis"])
    shape[axis] = sum(each.shape[axis] for each in given)
    return TensorInfo(tuple(shape), given[0].itemsize)


def _sliced(given: Sequence[TensorInfo], _how: Mapping[str, Any]) -> TensorInfo:
    shape = list(given[0].shape)
    starts, stops, *others = (_ints(each) for each in given[1:])
    axes, steps = others[0] if others else range(len(starts)), others[1] if len(others) > 1 else [1] * len(starts)
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        shape[axis] = len(range(shape[axis])[start:stop:step])
    return TensorInfo(tuple(shape), given[0].itemsize)


def _enlarged(given: Sequence[TensorInfo], _how: Mapping[str, Any]) -> TensorInfo:
    x = given[0]
    if len(given) > 3:
        return TensorInfo(tuple(_ints(given[3])), x.itemsize)
    scales = given[2].known
    return TensorInfo(
        tuple(int(size * scale) for size, scale in zip(x.shape, _listed(scales), strict=True)), x.itemsize
    )


def _transposed(given: Sequence[TensorInfo], how: Mapping[str, Any]) -> TensorInfo:
    perm: tuple[int, ...] = how["perm"]
    return TensorInfo(tuple(given[0].shape[axis] for axis in perm), given[0].itemsize)


def _unsqueezed(given: Sequence[TensorInfo], _how: Mapping[str, Any]) -> TensorInfo:
    shape, axes = list(given[0].shape), _ints(given[1])
    for axis in sorted(axis % (len(shape) + len(axes)) for axis in axes):
        shape.insert(axis, 1)
    return TensorInfo(tuple(shape), given[0].itemsize)


def _gathered(given: Sequence[TensorInfo], how: Mapping[str, Any]) -> TensorInfo:
    x, axis = given[0], how.get("axis", 0)
    return TensorInfo((*x.shape[:axis], *given[1].shape, *x.shape[axis + 1 :]), x.itemsize)


def _blocks_to_depth(given: Sequence[TensorInfo], how: Mapping[str, Any]) -> TensorInfo:
    (count, channels, *sizes), side = given[0].shape, how["blocksize"]
    return TensorInfo((count, channels * side * side, *(size // side for size in sizes)))


def _rows(given: Sequence[TensorInfo], _how: Mapping[str, Any]) -> TensorInfo:
    x, places = given[0], given[1].shape  # GatherND with batch_dims 0 or 1
    batch = _how.get("batch_dims", 0)
    return TensorInfo((*places[:-1], *x.shape[batch + places[-1] :]), x.itemsize)


def _tiled(given: Sequence[TensorInfo], _how: Mapping[str, Any]) -> TensorInfo:
    sizes = zip(given[0].shape, _ints(given[1]), strict=True)
    return TensorInfo(tuple(size * times for size, times in sizes), given[0].itemsize)


def _shape(given: Sequence[TensorInfo], how: Mapping[str, Any]) -> TensorInfo:
    return TensorInfo.of(np.array(given[0].shape[how.get("start", 0) : how.get("end")], np.int64))


def _coded(given: Sequence[TensorInfo], _how: Mapping[str, Any]) -> list[TensorInfo]:
    return [TensorInfo(given[0].shape, 1), TensorInfo(()), TensorInfo((), 1)]


def _highest(given: Sequence[TensorInfo], how: Mapping[str, Any]) -> TensorInfo:
    shape = list(given[0].shape)
    axis = how.get("axis", 0) % len(shape)
    return TensorInfo((*shape[:axis], *([1] if how.get("keepdims", 1) else []), *shape[axis + 1 :]), 8)


_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        ("Cos", "Gelu", "InstanceNormalization", "LayerNormalization", "MultiHeadAttention", "QuickGelu", "Relu", "Sin",
         "Sqrt", "Tanh"), _like_first,
    ),
    **dict.fromkeys(("Add", "Div", "Mul", "Sub"), _elementwise),
    **dict.fromkeys(("MatMul", "MatMulIntegerToFloat"), _product),
    **dict.fromkeys(("Conv", "QLinearConv"), _convolved),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceSumSquare"), _reduced),
    "ArgMax": _highest,
    "AveragePool": _pooled,
    "Cast": lambda given, how: TensorInfo(given[0].shape, ITEMSIZES[how["to"]]),
    "Concat": _joined,
    "DequantizeLinear": lambda given, _how: TensorInfo(given[0].shape, 4),
    "DynamicQuantizeLinear": _coded,
    "Equal": lambda given, how: TensorInfo(_elementwise(given, how).shape, 1),
    "Gather": _gathered,
    "GatherND": _rows,
    "QuantizeLinear": lambda given, _how: TensorInfo(given[0].shape, 1),
    "Reshape": _reshaped,
    "Resize": _enlarged,
    "Shape": _shape,
    "Slice": _sliced,
    "SpaceToDepth": _blocks_to_depth,
    "Split": _split,
    "Tile": _tiled,
    "Transpose": _transposed,
    "Unsqueeze": _unsqueezed,
}  # fmt: skip
"""What operators give."""

_COMPUTED: Mapping[str, Callable[[Sequence[AnyArray], Mapping[str, Any]], AnyArray]] = {
    "Concat": lambda given, how: np.concatenate(given, axis=how["axis"]),
    "Div": lambda given, _how: given[0] // given[1],
}
"""What shapes are computed with."""


def _ints(value: TensorInfo) -> list[int]:
    return [int(each) for each in _listed(value.known)]


def _listed(known: AnyArray | None) -> list[Any]:
    if known is None:
        raise UnsupportedGraph("a shape that isn't known")
    return [*known.reshape(-1)]
