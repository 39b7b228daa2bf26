"""Split convolutions with large weights by output channels: opening a stage takes less memory, with the same bits.

ONNX Runtime's CPU provider has four copies of a conv weight in memory while it reorders it.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from math import ceil, prod

from sdonnx_runtime.graphs.onnx_proto import Node, Tensor, make_node

LIMIT = 1 << 26
"""The largest conv weight that isn't split, in bytes of float32."""

_BLOCK = 16
"""ONNX Runtime computes at most so many output channels together."""


class ConvSplitter:
    """Splits the convolutions of a graph; adds the initializers of the parts to its ``tensors``."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self._cast = dict[str, list[int]]()  # weights stored in fewer bytes, by the name of what they are cast to

    def split(self, nodes: Iterable[Node]) -> Iterator[Node]:
        """Yield the nodes; several convolutions and a Concat replace one whose weight is too large."""
        for node in nodes:
            if node.op == "Cast" and (bounds := self._bounds(node.inputs[0])):
                self._cast[node.outputs[0]] = bounds
                stored, outputs = self._split_tensor(node.inputs[0], bounds), _part_names(node.outputs[0], bounds)
                yield from (node.rewire([name], output) for name, output in zip(stored, outputs, strict=True))
                continue
            known = node.op == "Conv" and all(name in self._tensors for name in node.inputs[2:])
            bounds = self._cast.get(node.inputs[1]) or self._bounds(node.inputs[1]) if known else []
            if not bounds:
                yield node
                continue
            x, weight, *bias = node.inputs
            parts = [_part_names(weight, bounds) if weight in self._cast else self._split_tensor(weight, bounds)]
            parts += [self._split_tensor(each, bounds) for each in bias]
            outputs = _part_names(node.outputs[0], bounds)
            for *inputs, output in zip(*parts, outputs, strict=True):
                yield node.rewire([x, *inputs], output)
            yield make_node("Concat", outputs, node.outputs[0], axis=1, stage=node.stage)

    def _bounds(self, name: str) -> list[int]:
        """The first output channel of each part, and their number; empty where the weight isn't to be split."""
        weight = self._tensors.get(name)
        if weight is None or len(weight.shape) != 4 or min(weight.shape) < 1 or "location" not in weight.external:
            return []
        if prod(weight.shape) > 2 * int(weight.external.get("length", "0")):  # int4 has two elements to a byte
            raise ValueError(f"'{name}' is shorter than its shape")
        count, channels = ceil(4 * prod(weight.shape) / LIMIT), weight.shape[0]
        return [] if count == 1 or channels % (count * _BLOCK) != 0 else [*range(0, channels + 1, channels // count)]

    def _split_tensor(self, name: str, bounds: list[int]) -> list[str]:
        """Split a tensor along its first axis; the parts stay where they are in the weights file."""
        whole, names = self._tensors[name], _part_names(name, bounds)
        offset, length = (int(whole.external.get(key, "0")) for key in ("offset", "length"))
        size = length // whole.shape[0]
        for part, (start, stop) in zip(names, pairwise(bounds), strict=True):
            where = {"offset": str(offset + start * size), "length": str((stop - start) * size)}
            shape = (stop - start, *whole.shape[1:])
            self._tensors[part] = whole.with_external(part, shape, {**whole.external, **where})
        return names


def _part_names(name: str, bounds: list[int]) -> list[str]:
    """An adapter finds a layer's parts by these names."""
    return [f"{name}_{start}" for start in bounds[:-1]]
