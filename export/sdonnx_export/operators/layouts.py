"""How weights are laid out in a graph, where that is not as in the checkpoint."""

from typing import TypeAlias

import onnx_ir as ir
from onnxscript.nn import Parameter
from sdonnx_runtime.arrays import AnyArray


class TransposedWeight(Parameter):
    """A linear weight, stored (in_features, out_features): the transpose of the checkpoint's."""


class Kernel(Parameter):
    """A conv weight for channels-last images, stored (out, kH, kW, in): the checkpoint's is (out, in, kH, kW)."""


class PointwiseKernel(Parameter):
    """The weight of a 1x1 convolution that runs as MatMul, stored (in, out): the checkpoint's is (out, in, 1, 1)."""


ConvLayout: TypeAlias = type[Kernel] | type[PointwiseKernel]


def lay_out(weight: Parameter, layout: ConvLayout) -> Parameter:
    """Return a conv weight (out, in, k, k) in another layout, of the same name and type."""
    outputs, inputs, *kernel = sizes(weight)
    shape = (inputs, outputs) if layout is PointwiseKernel else (outputs, *kernel, inputs)
    return layout(shape, dtype=weight.dtype, name=weight.name)


def find_layout(weight: Parameter, stored: ir.Value) -> Parameter:
    """Return a weight in the layout that a graph stores it in: a `Kernel` is what NhwcConv reads."""
    if len(sizes(weight)) != 4:
        return weight
    if len(sizes(stored)) == 2:
        return lay_out(weight, PointwiseKernel)
    if any(node.op_type == "NhwcConv" for node in stored.consumers()):
        return lay_out(weight, Kernel)
    return weight


def checkpoint_shape(weight: ir.Value) -> tuple[int, ...]:
    """Return the shape of a weight of the graph in the checkpoint."""
    shape = sizes(weight)
    if isinstance(weight, PointwiseKernel):
        return *shape[::-1], 1, 1
    if isinstance(weight, Kernel):
        return shape[0], shape[3], *shape[1:3]
    return shape[::-1] if isinstance(weight, TransposedWeight) else shape


def to_graph_layout(weight: ir.Value, data: AnyArray) -> AnyArray:
    """Convert a weight from the checkpoint's layout to the graph's."""
    if isinstance(weight, PointwiseKernel):
        return data[:, :, 0, 0].T
    if isinstance(weight, Kernel):
        return data.transpose(0, 2, 3, 1)
    return data.T if isinstance(weight, TransposedWeight) else data


def to_checkpoint_layout(weight: ir.Value, data: AnyArray) -> AnyArray:
    """Convert a weight from the graph's layout to the checkpoint's."""
    if isinstance(weight, PointwiseKernel):
        return data.T[:, :, None, None]
    if isinstance(weight, Kernel):
        return data.transpose(0, 3, 1, 2)
    return data.T if isinstance(weight, TransposedWeight) else data


def sizes(parameter: ir.Value) -> tuple[int, ...]:
    """Return a parameter's shape in the graph."""
    return tuple(parameter.shape.numpy()) if parameter.shape is not None else ()
