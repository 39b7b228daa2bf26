"""Shape inference without the onnx library, for the operators that sdonnx exports."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from math import prod
from typing import Any, TypeAlias

import numpy as np

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import SdonnxError
from sdonnx_runtime.graphs.onnx_proto import Node

ITEMSIZES: Mapping[int, int] = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8}
"""Bytes of an element, by TensorProto.DataType."""


class UnsupportedGraph(Exception):  # noqa: N818 — not an error: such a graph runs, unplanned
    """A graph has an operator or input that sdonnx does not export."""


@contextmanager
def unsupported_graphs() -> Generator[None, None, None]:
    """Turn what the rules for exported graphs raise on any other graph into UnsupportedGraph."""
    try:
        yield
    except SdonnxError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UnsupportedGraph(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class TensorInfo:
    """The shape and element size of a tensor."""

    shape: tuple[int, ...]
    itemsize: float = 4
    """Bytes; 0.5 for int4."""
    known: AnyArray | None = field(default=None, compare=False)
    """Its values, where shapes are computed from them."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return int(prod(self.shape) * self.itemsize)

    @classmethod
    def of(cls, array: AnyArray) -> "TensorInfo":
        """Those of an array, which becomes its values."""
        return cls(array.shape, array.itemsize, array)


def infer_shapes(nodes: Sequence[Node], values: dict[str, TensorInfo]) -> Iterator[Node]:
    """Yield nodes in their order, each once its outputs are in ``values``, at first the inputs and initializers.

    Raises UnsupportedGraph for an operator that is not supported, or a missing input.
    """
    for node in nodes:
        if missing := [name for name in node.inputs if name and name not in values]:
            raise UnsupportedGraph(f"'{missing[0]}' is not in the graph")
        inputs = [values[name] if name else None for name in node.inputs]
        values.update(zip(node.outputs, _infer(node, inputs), strict=False))
        yield node


def _infer(node: Node, inputs: Sequence[TensorInfo | None]) -> Iterable[TensorInfo]:
    compute, known = _COMPUTED.get(node.op), [each.known for each in inputs if each is not None]
    values = [each for each in known if each is not None]
    if compute is not None and len(values) == len(known) and sum(each.size for each in values) <= _MAX_KNOWN:
        with unsupported_graphs():
            return [TensorInfo.of(np.asarray(compute(values, node.attributes)))]
    infos = [each if each is not None else TensorInfo(()) for each in inputs]
    with unsupported_graphs():
        outputs = _RULES[node.op](infos, node.attributes)
        if not isinstance(outputs, tuple):
            return outputs
        if len(outputs) > _MAX_AXES or prod(outputs) >= _MAX_ELEMENTS:
            raise UnsupportedGraph(f"a value of {len(outputs)} axes")
        return [TensorInfo(outputs, _OUTPUT_ITEMSIZES.get(node.op, infos[0].itemsize))]


_MAX_KNOWN, _MAX_AXES, _MAX_ELEMENTS = 1024, 16, 1 << 62
"""Elements that are computed for a shape, and the axes and elements of a value; no exported graph has as many."""

Rule: TypeAlias = Callable[
    [Sequence[TensorInfo], Mapping[str, Any]], "tuple[int, ...] | list[TensorInfo] | repeat[TensorInfo]"
]
"""Inputs and attributes to the shape of the one output, whose elements are as large as `_OUTPUT_ITEMSIZES` says, or as
the first input's; or to all outputs."""


def _same_as_input(inputs: Sequence[TensorInfo], _attributes: Mapping[str, Any]) -> tuple[int, ...]:
    return inputs[0].shape


def _elementwise(inputs: Sequence[TensorInfo], _attributes: Mapping[str, Any]) -> tuple[int, ...]:
    return np.broadcast_shapes(*(each.shape for each in inputs))


def _matmul(inputs: Sequence[TensorInfo], _attributes: Mapping[str, Any]) -> tuple[int, ...]:
    x, weight = (each.shape for each in inputs[:2])
    return *np.broadcast_shapes(x[:-2], weight[:-2]), *x[-2:-1], weight[-1]


def _conv(inputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> tuple[int, ...]:
    (count, *sizes), weight = inputs[0].shape, inputs[3 if len(inputs) > 3 else 1].shape  # QLinearConv's, or Conv's
    last = bool(attributes.get("channels_last"))
    sizes = sizes[:-1] if last else sizes[1:]
    pads, strides = attributes.get("pads", (0,) * 4), attributes.get("strides", (1, 1))
    sizes = [
        (size + before + after - width) // stride + 1
        for size, before, after, width, stride in zip(sizes, pads[:2], pads[2:], weight[2:], strides, strict=True)
    ]
    return (count, *sizes, weight[0]) if last else (count, weight[0], *sizes)


def _nhwc_conv(inputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> tuple[int, ...]:
    outputs, *kernel, channels = inputs[1].shape
    weight = TensorInfo((outputs, channels, *kernel), inputs[1].itemsize)
    return _conv([inputs[0], weight], {**attributes, "channels_last": 1})


def _bias_split_gelu(inputs: Sequence[TensorInfo], _attributes: Mapping[str, Any]) -> tuple[int, ...]:
    return *inputs[0].shape[:-1], inputs[0].shape[-1] // 2


def _reshape(inputs: Sequence[TensorInfo], _attributes: Mapping[str, Any]) -> tuple[int, ...]:
    x, target = inputs
    shape = [x.shape[axis] if size == 0 else int(size) for axis, size in enumerate(_ints(target))]
    rest = prod(size for size in shape if size != -1)
    return tuple(prod(x.shape) // rest if size == -1 else size for size in shape)


def _reduce(inputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> tuple[int, ...]:
    shape, axes = inputs[0].shape, _ints(inputs[1]) if len(inputs) > 1 else [attributes.get("axis", 0)]
    reduced, keep = {axis % len(shape) for axis in axes}, attributes.get("keepdims", 1)
    return tuple(1 if axis in reduced else size for axis, size in enumerate(shape) if keep or axis not in reduced)


def _split(inputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> "repeat[TensorInfo]":
    shape, axis = list(inputs[0].shape), attributes.get("axis", 0)
    shape[axis] //= attributes["num_outputs"]
    return repeat(TensorInfo(tuple(shape), inputs[0].itemsize))


def _concat(inputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> tuple[int, ...]:
    shape, axis = list(inputs[0].shape), int(attributes["axis"])
    shape[axis] = sum(each.shape[axis] for each in inputs)
    return tuple(shape)


def _slice(inputs: Sequence[TensorInfo], _attributes: Mapping[str, Any]) -> tuple[int, ...]:
    shape = list(inputs[0].shape)
    starts, stops, *others = (_ints(each) for each in inputs[1:])
    axes, steps = others[0] if others else range(len(starts)), others[1] if len(others) > 1 else [1] * len(starts)
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        shape[axis] = len(range(shape[axis])[start:stop:step])
    return tuple(shape)


def _pad(inputs: Sequence[TensorInfo], _attributes: Mapping[str, Any]) -> tuple[int, ...]:
    shape, pads = inputs[0].shape, _ints(inputs[1])
    befores, afters = pads[: len(shape)], pads[len(shape) :]
    return tuple(size + before + after for size, before, after in zip(shape, befores, afters, strict=True))


def _resize(inputs: Sequence[TensorInfo], _attributes: Mapping[str, Any]) -> tuple[int, ...]:
    if len(inputs) > 3:
        return tuple(_ints(inputs[3]))
    return tuple(int(size * scale) for size, scale in zip(inputs[0].shape, _values(inputs[2].known), strict=True))


def _unsqueeze(inputs: Sequence[TensorInfo], _attributes: Mapping[str, Any]) -> tuple[int, ...]:
    shape, axes = list(inputs[0].shape), _ints(inputs[1])
    for axis in sorted(axis % (len(shape) + len(axes)) for axis in axes):
        shape.insert(axis, 1)
    return tuple(shape)


def _gather(inputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> tuple[int, ...]:
    shape, axis = inputs[0].shape, attributes.get("axis", 0)
    return *shape[:axis], *inputs[1].shape, *shape[axis + 1 :]


def _gather_nd(inputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> tuple[int, ...]:
    indices, batch = inputs[1].shape, attributes.get("batch_dims", 0)  # 0 or 1
    return *indices[:-1], *inputs[0].shape[batch + indices[-1] :]


def _window(inputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> tuple[int, ...]:
    count, channels, *sizes = inputs[0].shape
    kernel, pads = attributes["kernel_shape"], attributes.get("pads", (0,) * 4)
    strides = attributes.get("strides", (1, 1))
    steps = zip(sizes, pads[:2], pads[2:], kernel, strides, strict=True)
    return count, channels, *((size + before + after - width) // step + 1 for size, before, after, width, step in steps)


def _space_to_depth(inputs: Sequence[TensorInfo], attributes: Mapping[str, Any]) -> tuple[int, ...]:
    (count, channels, height, width), side = inputs[0].shape, attributes["blocksize"]
    return count, channels * side**2, height // side, width // side


def _depth_to_space(shape: Sequence[int], side: int) -> tuple[int, ...]:
    count, depth, height, width = shape
    return count, depth // side**2, height * side, width * side


_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        ("Cos", "DequantizeLinear", "Gelu", "GroupNorm", "Identity", "InstanceNormalization", "LayerNormalization",
         "LeakyRelu", "MultiHeadAttention", "PRelu", "QuantizeLinear", "QuickGelu", "Relu", "Sin", "Softmax", "Sqrt",
         "Tanh"),
        _same_as_input,
    ),
    **dict.fromkeys(("Add", "Div", "Equal", "Mul", "Sub"), _elementwise),
    **dict.fromkeys(("MatMul", "MatMulIntegerToFloat"), _matmul),
    **dict.fromkeys(("Conv", "QLinearConv"), _conv),
    **dict.fromkeys(("ArgMax", "ReduceMean", "ReduceSum", "ReduceSumSquare"), _reduce),
    **dict.fromkeys(("AveragePool", "MaxPool"), _window),
    "BiasSplitGelu": _bias_split_gelu,
    "Cast": lambda inputs, attributes: [TensorInfo(inputs[0].shape, ITEMSIZES[attributes["to"]])],
    "Concat": _concat,
    "DepthToSpace": lambda inputs, attributes: _depth_to_space(inputs[0].shape, attributes["blocksize"]),
    "DynamicQuantizeLinear": lambda inputs, _: [TensorInfo(inputs[0].shape, 1), TensorInfo(()), TensorInfo((), 1)],
    "Expand": lambda inputs, _: np.broadcast_shapes(inputs[0].shape, tuple(_ints(inputs[1]))),
    "Gather": _gather,
    "GatherND": _gather_nd,
    "NhwcConv": _nhwc_conv,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": lambda inputs, attributes: [
        TensorInfo.of(np.array(inputs[0].shape[attributes.get("start", 0) : attributes.get("end")], np.int64))
    ],
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Tile": lambda inputs, _: tuple(a * times for a, times in zip(inputs[0].shape, _ints(inputs[1]), strict=True)),
    "Transpose": lambda inputs, attributes: tuple(inputs[0].shape[int(axis)] for axis in attributes["perm"]),
    "Unsqueeze": _unsqueeze,
}  # fmt: skip

_OUTPUT_ITEMSIZES: Mapping[str, float] = {
    "ArgMax": 8, "DequantizeLinear": 4, "Equal": 1, "MatMulIntegerToFloat": 4, "QLinearConv": 1, "QuantizeLinear": 1,
}  # fmt: skip

_COMPUTED: Mapping[str, Callable[[Sequence[AnyArray], Mapping[str, Any]], AnyArray]] = {
    "Constant": lambda _inputs, attributes: np.array(attributes["value_ints"], np.int64),
    "Concat": lambda inputs, attributes: np.concatenate(inputs, axis=attributes["axis"]),
    "Div": lambda inputs, _attributes: inputs[0] // inputs[1],
}
"""Operators that compute shapes, on values that are known."""


def _ints(value: TensorInfo) -> list[int]:
    return [int(each) for each in _values(value.known)]


def _values(known: AnyArray | None) -> list[Any]:
    if known is None:
        raise UnsupportedGraph("a shape that is computed from inputs")
    return [*known.reshape(-1)]
