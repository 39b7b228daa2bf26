"""Wide kernels made several narrow ones: opening a stage takes less memory then, and it gives the same bits.

ONNX Runtime's CPU provider has four copies of a kernel in memory while it puts it in the order that it wants.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from math import ceil, prod
from pathlib import Path

from sdonnx_runtime.graphs.initializers import EXTERNAL_DATA, initializer_of
from sdonnx_runtime.graphs.onnx_proto import encode_message, fields, submessages

LIMIT = 1 << 26
"""Bytes, in float32, that are not too many for a kernel."""

_BLOCK = 16
"""Outputs that are computed together at most."""

_READ, _MADE, _NAME, _OP, _ATTRIBUTE, _MARK = 1, 2, 3, 4, 5, 9
_DIMS, _DATA_TYPE, _TENSOR_NAME, _DATA_LOCATION, _EXTERNAL = 1, 2, 8, 14, 1
_ATTRIBUTE_NAME, _INT, _TYPE, _OF_INT = 1, 3, 20, 2
"""Fields of onnx.proto's NodeProto, TensorProto and AttributeProto, and values of two."""


class ConvSplitter:
    """Rewrites the convolutions of a graph.

    Args:
        path: the ``.onnx`` file.
        data: what is in it.
        tensors: its initializers by name, to which those of pieces are added.
    """

    def __init__(self, path: Path, data: memoryview, tensors: dict[str, memoryview]) -> None:
        self._path, self._data, self._tensors = path, data, tensors
        self._widened = dict[str, list[int]]()  # kernels that are stored in less space, and where they are cut

    def __call__(self, nodes: Iterable[memoryview]) -> Iterator[memoryview]:
        """The nodes, where a convolution with a wide kernel is several, and what they give is joined."""
        for node in nodes:
            op, reads, makes = ([str(part, "utf-8") for part in submessages(node, key)] for key in (_OP, _READ, _MADE))
            if op == ["Cast"] and self._borders(reads[0]):
                borders = self._widened[makes[0]] = self._borders(reads[0])
                for stored, made in zip(self._cut(reads[0], borders), _named(makes[0], borders), strict=True):
                    yield _changed(node, [stored], made)
                continue
            known = op == ["Conv"] and all(name in self._tensors for name in reads[2:])
            borders = self._widened.get(reads[1]) or self._borders(reads[1]) if known else []
            if not borders:
                yield node
                continue
            picture, kernel, *bias = reads
            pieces = [_named(kernel, borders) if kernel in self._widened else self._cut(kernel, borders)]
            pieces += [self._cut(each, borders) for each in bias]
            made = _named(makes[0], borders)
            for *mine, output in zip(*pieces, made, strict=True):
                yield _changed(node, [picture, *mine], output)
            yield _joining(made, makes[0], submessages(node, _MARK))

    def _borders(self, name: str) -> list[int]:
        """The outputs that pieces of a kernel begin and end with; none if it isn't wide, or not to be cut."""
        if name not in self._tensors:
            return []
        kernel = initializer_of(self._path, self._data, self._tensors[name])
        count = ceil(4 * prod(kernel.shape) / LIMIT)
        if len(kernel.shape) != 4 or count == 1 or not kernel.external or kernel.shape[0] % (count * _BLOCK) != 0:
            return []
        return [*range(0, kernel.shape[0] + 1, kernel.shape[0] // count)]

    def _cut(self, name: str, borders: list[int]) -> list[str]:
        """The pieces of a tensor along its first axis, which lie where it does."""
        whole = initializer_of(self._path, self._data, self._tensors[name])
        size, names = whole.length // whole.shape[0], _named(name, borders)
        for piece, (start, stop) in zip(names, pairwise(borders), strict=True):
            where = {
                "location": whole.file.name,
                "offset": whole.offset + start * size,
                "length": (stop - start) * size,
            }
            entries = (encode_message((1, key.encode()), (2, str(value).encode())) for key, value in where.items())
            self._tensors[piece] = memoryview(
                encode_message(
                    *((_DIMS, size) for size in (stop - start, *whole.shape[1:])),
                    (_DATA_TYPE, whole.data_type),
                    (_TENSOR_NAME, piece.encode()),
                    *((EXTERNAL_DATA, entry) for entry in entries),
                    (_DATA_LOCATION, _EXTERNAL),
                )
            )
        return names


def _named(name: str, borders: list[int]) -> list[str]:
    """What pieces are called: an adapter's layers are known by that."""
    return [f"{name}_{start}" for start in borders[:-1]]


def _changed(node: memoryview, reads: list[str], made: str) -> memoryview:
    """A node that reads and makes something else."""
    others = [(number, value) for number, value in fields(node) if number not in (_READ, _MADE, _NAME)]
    return memoryview(encode_message(*((_READ, each.encode()) for each in reads), (_MADE, made.encode()), *others))


def _joining(reads: list[str], made: str, marks: list[memoryview]) -> memoryview:
    """A node that joins channels."""
    axis = encode_message((_ATTRIBUTE_NAME, b"axis"), (_INT, 1), (_TYPE, _OF_INT))
    inputs = ((_READ, each.encode()) for each in reads)
    marked = ((_MARK, mark) for mark in marks)
    return memoryview(encode_message(*inputs, (_MADE, made.encode()), (_OP, b"Concat"), (_ATTRIBUTE, axis), *marked))
