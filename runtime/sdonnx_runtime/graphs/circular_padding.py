"""Circular padding of convolutions, with which images tile seamlessly: a graph is rewritten when it is opened."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

from sdonnx_runtime.graphs.onnx_proto import Node, make_node

_CONVS = ("Conv", "NhwcConv", "QLinearConv")
_WRAP_OPSET = 19
"""The first in which Pad has the mode wrap."""
_END = 1 << 31
"""Of a Slice: beyond any axis."""

_Sizes: TypeAlias = Mapping[int, tuple[int, int]]
"""How many pixels are added before and after an image, by axis of a convolution's input."""


def pad_circularly(nodes: Iterable[Node], axes: str, *, opset: int, has_wrap: bool) -> Iterator[Node]:
    """Yield the nodes with convolutions that pad with the opposite border instead of zeros.

    As torch's Conv2d with ``padding_mode="circular"``, also where a convolution pads one side alone.

    Args:
        nodes: of a graph.
        axes: x, y, or xy: images go on to the right, downwards, or both.
        opset: of the graph.
        has_wrap: whether the device has the mode wrap of Pad, which is faster than slices.
    """
    pad = _wrap if has_wrap and opset >= _WRAP_OPSET else _slice
    for node in nodes:
        pads, sizes = _circular_sizes(node, axes)
        if not sizes:
            yield node
            continue
        *others, padded = pad(node, sizes)
        yield from (*others, padded)
        yield node.rewire([padded.outputs[0], *node.inputs[1:]], node.outputs[0]).with_attribute("pads", pads)


def _circular_sizes(node: Node, axes: str) -> tuple[list[int], _Sizes]:
    """The pads that a convolution keeps, and what it is to wrap."""
    pads = [*node.attributes.get("pads", ())] if node.op in _CONVS else []
    if len(pads) != 4:  # of images: top, left, bottom, right
        return pads, {}
    is_last = node.op == "NhwcConv" or node.attributes.get("channels_last")
    first, sizes = 1 if is_last else 2, dict[int, tuple[int, int]]()
    for index, name in enumerate("yx"):
        if name in axes and (pads[index] > 0 or pads[index + 2] > 0):
            sizes[first + index] = pads[index], pads[index + 2]
            pads[index] = pads[index + 2] = 0
    return pads, sizes


def _wrap(node: Node, sizes: _Sizes) -> Iterator[Node]:
    pads = [sizes.get(axis, (0, 0))[end] for end in (0, 1) for axis in range(4)]
    yield (constant := _constant(node, "pads", pads))
    inputs = [node.inputs[0], constant.outputs[0]]
    yield make_node("Pad", inputs, f"{node.outputs[0]}.padded", mode="wrap", stage=node.stage)


def _slice(node: Node, sizes: _Sizes) -> Iterator[Node]:
    x, output = node.inputs[0], node.outputs[0]
    for axis, (before, after) in sizes.items():
        parts = dict[str, str]()
        for name, size, bounds in (("before", before, (-before, _END)), ("after", after, (0, after))):
            if size > 0:
                values = zip(("start", "stop", "axis"), (*bounds, axis), strict=True)
                constants = [_constant(node, f"{name}{axis}.{key}", [value]) for key, value in values]
                parts[name] = f"{output}.{name}{axis}"
                yield from constants
                inputs = [x, *(each.outputs[0] for each in constants)]
                yield make_node("Slice", inputs, parts[name], stage=node.stage)
        around = [parts.get("before"), x, parts.get("after")]
        x = f"{output}.padded{axis}"
        yield make_node("Concat", [each for each in around if each is not None], x, axis=axis, stage=node.stage)


def _constant(node: Node, name: str, values: list[int]) -> Node:
    return make_node("Constant", [], f"{node.outputs[0]}.{name}", value_ints=values, stage=node.stage)
