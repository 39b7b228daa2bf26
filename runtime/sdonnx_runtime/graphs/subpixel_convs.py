"""Convolutions of what is upsampled by 2 as four of what isn't, which take 4/9 of the multiplications.

That is sub-pixel convolution, arXiv:1609.05158, with the weights that make it equal nearest-neighbour upsampling and
convolution, arXiv:1707.02937.
"""

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product

import numpy as np

from sdonnx_runtime.graphs.initializers import DTYPES
from sdonnx_runtime.graphs.onnx_proto import Model, Node, Tensor, ValueInfo, make_node
from sdonnx_runtime.graphs.shape_inference import ITEMSIZES, TensorInfo, UnsupportedGraph, infer_shapes

_KERNEL, _ROWS, _COLUMNS = (3, 3), 2, 3
"""Of a conv weight, (out, in, 3, 3), the last two axes' sizes and numbers."""


def find_upsamplings(model: Model, sizes: Mapping[str, int]) -> set[str]:
    """The outputs of the Resize nodes that double height and width.

    ``sizes`` are those of the free dimensions, by their names; without them, only what is doubled at any size is found.
    """
    values = {name: _tensor_info(each) for name, each in model.initializers.items()}
    ports = {name: ValueInfo.decode(encoded) for name, encoded in model.inputs.items()}
    for name, port in ports.items():
        shape = tuple(sizes.get(size, _ANY_SIZE) if isinstance(size, str) else size for size in port.shape)
        values[name] = TensorInfo(shape, ITEMSIZES.get(port.data_type, 4))
    has_sizes = all(size in sizes for port in ports.values() for size in port.shape if isinstance(size, str))
    found = set[str]()
    with suppress(UnsupportedGraph):  # what comes after stays as it is
        for node in infer_shapes(model.nodes, values):
            if node.op == "Resize" and _doubles(node, values) and (has_sizes or len(node.inputs) == _WITH_SCALES):
                found.add(node.outputs[0])
    return found


_ANY_SIZE = 64
_WITH_SCALES = 3
"""Inputs of a Resize that has scales instead of sizes."""


def _tensor_info(tensor: Tensor) -> TensorInfo:
    """The shape and element size of an initializer, with its values where they are in the graph itself."""
    dtype = DTYPES.get(tensor.data_type)
    known = None if dtype is None or not tensor.raw_data else np.frombuffer(tensor.raw_data, dtype)
    return TensorInfo(tensor.shape, ITEMSIZES.get(tensor.data_type, 4), known)


def _doubles(node: Node, values: Mapping[str, TensorInfo]) -> bool:
    x, y = (values[name].shape for name in (node.inputs[0], node.outputs[0]))
    is_nearest = node.attributes.get("mode", "nearest") == "nearest" and node.attributes.get("nearest_mode") == "floor"
    is_asymmetric = node.attributes.get("coordinate_transformation_mode") == "asymmetric"
    return is_nearest and is_asymmetric and y == (*x[:2], *(2 * size for size in x[2:]))


def split_upsampled_convs(
    nodes: Sequence[Node], upsamplings: Container[str], weights: Mapping[str, Tensor]
) -> Iterator[Node]:
    """Yield the nodes; four convolutions with kernels of 2x2 replace one with a kernel of 3x3 after upsampling.

    Their weights are sums of the one weight's, made by nodes on initializers alone, for a device that folds constants.

    Args:
        nodes: of a graph of opset 18 or later.
        upsamplings: the outputs of nodes that double height and width by repeating rows and columns.
        weights: initializers, by the names of the values that are made of them alone.
    """
    readers = Counter(name for node in nodes for name in node.inputs)
    sources = {node.outputs[0]: node.inputs[0] for node in nodes if node.outputs[0] in upsamplings}
    convs = [node for node in nodes if node.inputs and node.inputs[0] in sources and _is_plain(node, weights)]
    replaced = {node.inputs[0] for node in convs if readers[node.inputs[0]] == 1}
    for node in nodes:
        if node.op == "Conv" and node.inputs[0] in replaced:
            yield from _split(node, sources[node.inputs[0]])
        elif node.outputs[0] not in replaced:
            yield node


def _is_plain(node: Node, weights: Mapping[str, Tensor]) -> bool:
    """Whether it is a dense convolution with a kernel of 3x3 that keeps the size."""
    attributes = node.attributes
    return (
        node.op == "Conv"
        and node.inputs[1] in weights
        and weights[node.inputs[1]].shape[_ROWS:] == _KERNEL
        and attributes.get("pads") == (1,) * 4
        and attributes.get("strides", (1, 1)) == (1, 1)
        and attributes.get("dilations", (1, 1)) == (1, 1)
        and attributes.get("group", 1) == 1
    )


def _split(conv: Node, x: str) -> Iterator[Node]:
    """Yield the convolutions of a feature map that compute those of the upsampled one, and put their pixels together.

    Of the upsampled rows 2 i + p, the kernel's three meet only two rows of the feature map: i - 1 and i where p is 0,
    i and i + 1 where it is 1. So it is with columns.
    """
    (weight, *bias), (output,), phases = conv.inputs[1:], conv.outputs, list(product((0, 1), (0, 1)))

    def make(op: str, inputs: Sequence[str], *names: str, **attributes: "int | str | Sequence[int]") -> Node:
        outputs = tuple(f"{output}.{name}" for name in names)
        return make_node(op, inputs, outputs, stage=conv.stage, **attributes)

    yield from _add_taps(weight, f"{output}.kernel", _ROWS, conv.stage)
    for row, column in phases:
        kernel = f"{output}.kernel.{row}"
        if column == 0:
            yield from _add_taps(kernel, kernel, _COLUMNS, conv.stage)
        pads = [1 - row, 1 - column, row, column]
        yield make("Conv", [x, f"{kernel}.{column}", *bias], f"pixels.{row}{column}", pads=pads)
    pixels = [f"{output}.pixels.{row}{column}" for row, column in phases]
    yield make("Concat", pixels, "pixels", axis=1)
    yield make_node("DepthToSpace", [f"{output}.pixels"], output, stage=conv.stage, blocksize=2, mode="DCR")


def _add_taps(weight: str, kernels: str, axis: int, stage: str) -> Iterator[Node]:
    """Yield what makes kernels of 2 taps, ``kernels`` with .0 and .1, of one of 3: (a, b + c) and (a + b, c)."""
    first, middle, last, left, right = (f"{kernels}.{name}" for name in ("first", "middle", "last", "left", "right"))
    yield make_node("Split", [weight], (first, middle, last), stage=stage, axis=axis, num_outputs=3)
    yield make_node("Add", [middle, last], right, stage=stage)
    yield make_node("Add", [first, middle], left, stage=stage)
    yield make_node("Concat", [first, right], f"{kernels}.0", stage=stage, axis=axis)
    yield make_node("Concat", [left, last], f"{kernels}.1", stage=stage, axis=axis)
