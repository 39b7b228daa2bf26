"""MultiHeadAttention, rewritten when a graph is opened: around a kernel that fails, or that rounds too much."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from sdonnx_runtime.graphs.initializers import FLOAT
from sdonnx_runtime.graphs.onnx_proto import Node, make_node

_MASKED = -(10**9)
"""Added to scores that don't count; infinite in fp16."""


def decompose_attention(nodes: Iterable[Node], has_to: Callable[[int], bool]) -> Iterator[Node]:
    """Yield the nodes with MultiHeadAttention as softmax(q k^T / sqrt(d) + bias) v, arXiv:1706.03762.

    Takes memory for the scores of all heads, (N, heads, S, T), twice.

    Args:
        nodes: of a graph of opset 15 or later.
        has_to: whether an attention of so many heads is to be replaced.
    """
    for node in nodes:
        if _is_plain(node) and has_to(node.attributes["num_heads"]):
            yield from _decompose(node)
        else:
            yield node


def _is_plain(node: Node) -> bool:
    """Whether it reads queries, keys, values and a bias of the scores, and nothing else."""
    return (
        node.op == "MultiHeadAttention"
        and len(node.outputs) == 1
        and all(node.inputs[:3])
        and not any((*node.inputs[3:5], *node.inputs[6:]))
        and not node.attributes.keys() - {"num_heads", "unidirectional"}
    )


def _decompose(node: Node) -> Iterator[Node]:
    (q, k, v), (output,), heads = node.inputs[:3], node.outputs, node.attributes["num_heads"]

    def make(op: str, name: str, *inputs: str, **attributes: "int | list[int]") -> Node:
        return make_node(op, inputs, f"{output}.{name}", stage=node.stage, **attributes)

    yield (split := make("Constant", "split", value_ints=[0, 0, heads, -1]))
    for name, x, perm in (("q", q, [0, 2, 1, 3]), ("k", k, [0, 2, 3, 1]), ("v", v, [0, 2, 1, 3])):
        yield make("Reshape", f"{name}.heads", x, split.outputs[0])
        yield make("Transpose", name, f"{output}.{name}.heads", perm=perm)
    yield make("Shape", "width", q, start=2)
    yield make("Constant", "count", value_ints=[heads])
    yield make("Div", "size", f"{output}.width", f"{output}.count")
    yield make("Cast", "size.float", f"{output}.size", to=FLOAT)
    yield make("Sqrt", "root", f"{output}.size.float")
    yield make("CastLike", "scale", f"{output}.root", q)
    yield make("Div", "q.scaled", f"{output}.q", f"{output}.scale")
    yield (scores := make("MatMul", "scores", f"{output}.q.scaled", f"{output}.k"))
    for name in node.inputs[5:6]:
        yield (scores := make("Add", "biased", scores.outputs[0], name))
    if node.attributes.get("unidirectional"):
        *mask, scores = _mask_later(make, scores.outputs[0], q)
        yield from (*mask, scores)
    yield make("Softmax", "weights", scores.outputs[0], axis=-1)
    yield make("MatMul", "attended", f"{output}.weights", f"{output}.v")
    yield make("Transpose", "sequence", f"{output}.attended", perm=[0, 2, 1, 3])
    yield make("Constant", "joined", value_ints=[0, 0, -1])
    yield make_node("Reshape", [f"{output}.sequence", f"{output}.joined"], output, stage=node.stage)


def _mask_later(make: Callable[..., Node], scores: str, like: str) -> Iterator[Node]:
    """Let each query see the keys up to its own."""
    yield (shape := make("Shape", "square", scores, start=2))
    yield (value := make("Constant", "masked", value_ints=[_MASKED]))
    yield (value := make("CastLike", "masked.float", value.outputs[0], like))
    yield (full := make("Expand", "masked.square", value.outputs[0], shape.outputs[0]))
    yield (first := make("Constant", "diagonal", value_ints=[1]))
    yield (axes := make("Constant", "axes", value_ints=[0]))
    yield (first := make("Squeeze", "diagonal.scalar", first.outputs[0], axes.outputs[0]))
    yield (mask := make("Trilu", "mask", full.outputs[0], first.outputs[0], upper=1))
    yield make("Add", "causal", scores, mask.outputs[0])


def dequantize_scores(nodes: Sequence[Node]) -> Iterator[Node]:
    """Yield the nodes with queries and keys of MultiHeadAttention that are not quantized and dequantized before it."""
    producers = {name: node for node in nodes for name in node.outputs}
    readers = Counter(name for node in nodes for name in node.inputs)

    def quantize_before(name: str) -> Node | None:
        """The QuantizeLinear whose values, dequantized, are read as ``name``, if nothing else reads them."""
        dequantize = producers.get(name)
        if dequantize is None or dequantize.op != "DequantizeLinear" or readers[name] != 1:
            return None
        quantize = producers.get(dequantize.inputs[0])
        is_pair = quantize is not None and quantize.op == "QuantizeLinear" and readers[quantize.outputs[0]] == 1
        return quantize if is_pair else None

    attended = [name for node in nodes if node.op == "MultiHeadAttention" for name in node.inputs[:2]]
    quantized = {name: each for name in attended if (each := quantize_before(name)) is not None}
    dropped = {*quantized, *(each.outputs[0] for each in quantized.values())}
    for node in nodes:
        if node.op == "MultiHeadAttention" and not quantized.keys().isdisjoint(node.inputs):
            inputs = [quantized[name].inputs[0] if name in quantized else name for name in node.inputs]
            yield node.rewire(inputs, *node.outputs)
        elif node.outputs[0] not in dropped:
            yield node
