"""Shapes of equal nodes are inferred once: a network repeats its blocks, and a component's graphs repeat each other."""

from typing import Any

import onnx_ir as ir
from onnxscript import GraphBuilder

_MAX_NODES = 20_000
"""With more different ones, all are forgotten."""

_MAX_ELEMENTS = 20
"""Of constants that can say something about shapes."""

_Info = tuple[ir.DataType | None, ir.Shape | None]

_known: dict[Any, tuple[_Info, ...]] = {}


class InferringBuilder(GraphBuilder):
    """onnxscript's builder of graphs, without its inference for each node anew."""

    def _infer_shapes(self, node: ir.Node) -> None:
        """Called by onnxscript for each node that is added; if it is not, all are inferred anew."""
        key = _key(node)
        if key in _known:
            for value, (dtype, shape) in zip(node.outputs, _known[key], strict=True):
                value.type = None if dtype is None else ir.TensorType(dtype)
                value.shape = None if shape is None else shape.copy()
            return
        super()._infer_shapes(node)
        if key is not None:
            if len(_known) == _MAX_NODES:
                _known.clear()
            _known[key] = tuple((each.dtype, each.shape and each.shape.copy()) for each in node.outputs)


def _key(node: ir.Node) -> Any:
    """What the types and shapes of a node's outputs depend on; None where they are known or it can't be compared."""
    attributes = [(each.name, each.type, _plain(each.value)) for each in node.attributes.values()]
    if any(value is None for *_, value in attributes):
        return None
    if any(each.type is not None or each.shape is not None for each in node.outputs):
        return None
    inputs = tuple(None if each is None else _describe(each) for each in node.inputs)
    return node.op_identifier(), node.version, len(node.outputs), tuple(attributes), inputs


def _plain(value: Any) -> Any:
    """A number, a text or several as a key; None for others."""
    many = tuple(value) if isinstance(value, list | tuple) else (value,)
    return many if all(isinstance(each, int | float | str) for each in many) else None


def _describe(value: ir.Value) -> tuple[Any, ...]:
    constant = value.const_value
    content = None if constant is None or constant.size > _MAX_ELEMENTS else constant.tobytes()
    return value.type, None if value.shape is None else value.shape.dims, content
