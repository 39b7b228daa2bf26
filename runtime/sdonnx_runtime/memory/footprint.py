"""What opening and running a stage takes of memory and work, told from the shapes of what it is given.

The rules are those of ONNX Runtime's CPU provider as it was seen to behave: which values take over another's place,
what operators take besides, in which order they run, what becomes of weights.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from sdonnx_runtime.graphs.initializers import GRAPH, Initializer
from sdonnx_runtime.graphs.onnx_proto import submessages
from sdonnx_runtime.graphs.partition import NODE, Stage
from sdonnx_runtime.graphs.shape_inference import Node, TensorInfo, infer_shapes, node_of

_SMALL = 64
"""Elements of what may be a shape."""

_NODE_BYTES = 8192
"""What a session takes for a node."""

_IN_THE_SAME_PLACE = ("Reshape", "Unsqueeze")
_MAY_TAKE_OVER = ("Add", "Cast", "Cos", "Div", "Mul", "Relu", "Sin", "Sqrt", "Sub", "Tanh")
"""Whose output may lie where an input of its size did that nobody reads any more."""

_PRODUCTS = ("DynamicQuantizeLinear", "MatMul", "MatMulIntegerToFloat")
_WIDENED = ("Cast", "DequantizeLinear")
"""What weights are given to, to be float32."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a stage takes, in bytes."""

    weights: int
    """As they are kept while it is open, with the session around them."""
    opening: int
    """The most of weights, and of copies of them, while it is being opened."""
    packed: int
    """Of the weights those in codes that are packed anew, where other buffers come from."""
    mapped: int
    """Of these the ones whose file is in memory until all are packed."""
    spread: int
    """What of all that is packed anew is left lying about in the arena, if it is opened as a whole."""
    values: int
    """The most of values and of workspace at a time, without what the stage is given."""
    outputs: Mapping[str, TensorInfo]
    written: int
    """All values together."""
    work: int
    """Multiplications with additions."""
    coded: bool
    """Whether most of the work is done in 8 bits."""


def footprint(stage: Stage, given: Mapping[str, TensorInfo]) -> Footprint:
    """What a stage takes for inputs of these shapes.

    Raises:
        UnknownGraph: it has an operator that packages of sdonnx don't have.
    """
    (graph,) = submessages(memoryview(stage.model), GRAPH)
    nodes = _as_run([node_of(part) for part in submessages(graph, NODE)])
    values = {**given, **{name: _weight(each) for name, each in stage.weights.items()}}
    makers = {name: node for node in nodes for name in node.outputs}
    readers = Counter(name for node in nodes for name in node.inputs)
    inside = _inside(nodes, readers, stage.weights)
    last = {name: index for index, node in enumerate(nodes) for name in node.inputs}
    last |= dict.fromkeys(stage.outputs, len(nodes))
    buffers: dict[str, str] = {}  # where a value lies: in the buffer that was made for another, or for itself
    users: dict[str, int] = {}  # the last node that reads a buffer
    live = most = written = 0
    work = Counter[bool]()
    for index, node in enumerate(infer_shapes(nodes, values)):
        dying = {buffers[name] for name in node.inputs if name in buffers and users[buffers[name]] == index}
        for name in node.outputs:
            if name == "" or name in inside:
                continue
            buffer = _taken_over(node, values, buffers, dying) or name
            buffers[name] = buffer
            live += values[name].nbytes if buffer == name else 0
            written += values[name].nbytes if buffer == name else 0
            users[buffer] = max(users.get(buffer, index), last.get(name, index))
        most = max(most, live + _workspace(node, values, makers, inside, dying))
        work[node.op in _IN_CODES] += _work(node, values)
        done = {*dying, *(buffers[name] for name in node.outputs if name in buffers)}
        live -= sum(values[name].nbytes for name in done if users[name] == index)
    outputs = {name: values[name] for name in stage.outputs}
    kept, opening, packed, mapped, spread = _weights(stage, nodes, values)
    return Footprint(
        weights=kept,
        opening=opening,
        packed=packed,
        mapped=mapped,
        spread=spread,
        values=max(most, 2 * sum(each.nbytes for each in outputs.values())),  # they are copied
        outputs=outputs,
        written=written,
        work=work.total(),
        coded=work[True] > work[False],
    )


def _weight(weight: Initializer) -> TensorInfo:
    known = weight.read() if prod(weight.shape) <= _SMALL and not weight.external else None
    return TensorInfo(weight.shape, weight.length / max(prod(weight.shape), 1), known)


def _inside(nodes: Sequence[Node], readers: Mapping[str, int], weights: Collection[str]) -> set[str]:
    """What isn't there in a run.

    The operators around it are made one: codes of one reader, and widened matrices. Or a weight is widened when a
    session opens.
    """
    codes = {node.outputs[0] for node in nodes if node.op == "DynamicQuantizeLinear" and readers[node.outputs[0]] == 1}
    matrices = {node.inputs[1] for node in nodes if node.op == "MatMul"}
    folded = {node.outputs[0] for node in nodes if node.op == "Cast" and node.inputs[0] in weights}
    return codes | folded | {node.outputs[0] for node in nodes if node.op in _WIDENED and node.outputs[0] in matrices}


def _weights(stage: Stage, nodes: Sequence[Node], values: Mapping[str, TensorInfo]) -> tuple[int, int, int, int, int]:
    """What a stage's weights take once it is open, the most before, and of them `packed`, `mapped` and `spread`."""
    readers: dict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        for name in node.inputs:
            if name in stage.weights:
                readers[name].append(node)
    kernels = {node.inputs[1] for node in nodes if node.op == "Conv"}
    folded = reordered = before = largest = packed = mapped = blocks = 0
    matrices = {node.inputs[1] for node in nodes if node.op == "MatMul"}
    kept = len(nodes) * _NODE_BYTES
    for name, users in readers.items():
        ops = {node.op for node in users}
        if ops == {"Gather"}:
            continue  # of what is mapped the rows that are read
        wide = next((node.outputs[0] for node in users if node.op == "Cast"), name)
        size = values[wide].nbytes
        kept += size
        folded += size if wide != name else 0  # all are, before any is reordered
        if wide in kernels:
            reordered = max(
                reordered, before + 4 * size
            )  # its file, what is read of it, and what becomes of that twice
            before += size
        else:
            largest = max(largest, size)
        blocks += size if any(node.op == "DequantizeLinear" and node.outputs[0] in matrices for node in users) else 0
        packed += size if ops & _IN_CODES else 0
        mapped += size if "QLinearConv" in ops else 0
    kept += blocks // 5  # codes that are multiplied with as they are have sums beside them
    return kept, max(folded + reordered, kept + largest), packed, mapped, blocks // 2


_IN_CODES = {"MatMulIntegerToFloat", "QLinearConv"}


def _as_run(nodes: Sequence[Node]) -> list[Node]:
    """Nodes in the order that ONNX Runtime runs them in.

    Products are rewritten, and come before what isn't, the next time that there is one to run: as soon as what they
    multiply is there. So do kernels that are made of codes. A convolution of what another gives comes directly after
    it, for it takes its blocks of channels.
    """
    makers = {name: index for index, node in enumerate(nodes) for name in node.outputs}
    places = [*range(len(nodes))]
    products = [index for index, node in enumerate(nodes) if node.op in _PRODUCTS]
    for index, node in enumerate(nodes):
        before = [makers[name] for name in node.inputs if name in makers]
        if node.op == "Cast" and not before:
            places[index] = 0
        elif node.op in _PRODUCTS or (node.op == "DequantizeLinear" and not before):
            ready = max((places[each] + 1 for each in before), default=0)
            places[index] = min(index, next((each for each in products if each >= ready), index))
        if node.op == "Conv":
            picture, kernel = (makers.get(name) for name in node.inputs[:2])
            if picture is not None and nodes[picture].op == "Conv":
                places[index] = max(places[each] for each in before)
            if kernel is not None and nodes[kernel].op == "DequantizeLinear":
                places[kernel] = min(kernel, products[0] if products else kernel)
    return [nodes[index] for index in sorted(range(len(nodes)), key=lambda index: (places[index], index))]


def _taken_over(
    node: Node, values: Mapping[str, TensorInfo], buffers: Mapping[str, str], dying: Collection[str]
) -> str | None:
    """The buffer of an input that what a node gives is put into."""
    if node.op in _IN_THE_SAME_PLACE:
        return buffers.get(node.inputs[0])
    size = values[node.outputs[0]].nbytes
    given = (buffers.get(name, "") for name in node.inputs if node.op in _MAY_TAKE_OVER)
    return next((buffer for buffer in given if buffer in dying and values[buffer].nbytes == size), None)


def _workspace(
    node: Node,
    values: Mapping[str, TensorInfo],
    makers: Mapping[str, Node],
    inside: Collection[str],
    dying: Collection[str],
) -> int:
    """What an operator takes besides what it is given and gives."""
    if node.op == "MultiHeadAttention":  # heads apart
        return sum(values[name].nbytes for name in node.inputs[:3])
    if node.op == "MatMulIntegerToFloat" and node.inputs[0] in inside:
        return values[node.inputs[0]].nbytes
    if node.op != "Conv":
        return 0
    name, made, kernel = node.inputs[0], values[node.outputs[0]], values[node.inputs[1]].shape
    if node.inputs[1] in makers and makers[node.inputs[1]].op == "DequantizeLinear":  # columns of one picture
        places = prod(made.shape[2:])
        return prod(kernel[1:]) * places * 4 if kernel[0] > places and prod(kernel[2:]) > 1 else 0
    given = values[name].nbytes  # in blocks of channels, into and out of which pictures are copied
    if name in makers and makers[name].op in ("Conv", "Resize"):
        return made.nbytes if name not in dying else max(0, made.nbytes - given)
    kept = given if name not in dying else 0
    return max(2 * given, kept + given + made.nbytes, kept + 2 * made.nbytes) - given - made.nbytes


def _work(node: Node, values: Mapping[str, TensorInfo]) -> int:
    if node.op in ("MatMul", "MatMulIntegerToFloat"):
        return prod(values[node.outputs[0]].shape) * values[node.inputs[0]].shape[-1]
    if node.op in ("Conv", "QLinearConv"):
        kernel = values[node.inputs[3 if node.op == "QLinearConv" else 1]].shape
        return prod(values[node.outputs[0]].shape) * prod(kernel[1:])
    if node.op == "MultiHeadAttention":
        query, key = (values[name].shape for name in node.inputs[:2])
        return 2 * prod(query) * key[1]
    return 0
