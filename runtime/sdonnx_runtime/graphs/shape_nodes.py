"""The nodes of a graph that compute with integers alone: shapes, indices, token ids."""

from collections.abc import Iterable

from sdonnx_runtime.graphs.onnx_proto import Model, ValueInfo

_INTEGERS = (6, 7, 9)
"""TensorProto.DataType of int32, int64 and bool; int8 is what quantized layers compute in."""


def shape_nodes(model: Model) -> set[tuple[str, str]]:
    """Find the nodes whose inputs are integers, or looked at for their shape: names, which may be empty, and operators.

    ONNX Runtime leaves such nodes to the CPU by design.
    """
    integers = {name for name, each in model.initializers.items() if each.data_type in _INTEGERS}
    integers |= {name for name, each in model.inputs.items() if ValueInfo.decode(each).data_type in _INTEGERS}
    found, neutral = set[tuple[str, str]](), set[str]()
    for node in model.nodes:
        takes = node.op in _OF_ANY or _are_integers(node.inputs, integers, neutral)
        gives = node.op in _TO_INTEGERS or (takes if node.op != "Cast" else node.attributes.get("to") in _INTEGERS)
        if node.op == "Constant":
            neutral |= {*node.outputs}
        found |= {(node.name, node.op)} if takes else set()
        integers |= {*node.outputs} if gives else set()
    return found


_OF_ANY = ("Shape", "Size")
"""Operators that look at the shape of their input alone."""

_TO_INTEGERS = (*_OF_ANY, "ArgMax", "ArgMin", "Equal", "Greater", "Less", "NonZero")
"""Operators whose outputs are integers, whatever their inputs are."""


def _are_integers(inputs: Iterable[str], integers: set[str], neutral: set[str]) -> bool:
    names = {name for name in inputs if name}
    return bool(names & integers) and names <= integers | neutral
