"""Estimate the memory and MACs of a stage from the shapes of its inputs.

The rules describe ONNX Runtime's CPU provider as it was observed: in-place outputs, workspaces, execution order,
copies of weights.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from sdonnx_runtime.graphs.initializers import Initializer
from sdonnx_runtime.graphs.onnx_proto import Node
from sdonnx_runtime.graphs.partition import Stage
from sdonnx_runtime.graphs.shape_inference import TensorInfo, infer_shapes
from sdonnx_runtime.memory.constants import CONV_REORDER, INT8_BLOCK_SUMS, INT8_FRAGMENTATION, NODE_BYTES

_SHAPE_ELEMENTS = 64
"""The most elements of an initializer that may be part of a shape."""

_VIEWS = ("Reshape", "Unsqueeze")
"""Operators whose output is their input's buffer."""
_MAY_RUN_IN_PLACE = ("Add", "Cast", "Cos", "Div", "LeakyRelu", "Mul", "Relu", "Sin", "Sqrt", "Sub", "Tanh")
"""Operators whose output may take the buffer of an input of its size that no later node reads."""

_MATMULS = ("DynamicQuantizeLinear", "MatMul", "MatMulIntegerToFloat")
_TO_FLOAT32 = ("Cast", "DequantizeLinear")
_INT8_OPS = {"MatMulIntegerToFloat", "QLinearConv"}


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """The memory of a stage, in bytes, and its MACs."""

    weights: int
    """Bytes of weights and session while the stage is open."""
    opening: int
    """The peak of weights and their copies while the stage is being opened."""
    prepacked: int
    """Bytes of int8 weights that are prepacked into buffers of the arena; included in ``weights``."""
    mmapped: int
    """Bytes of ``prepacked`` whose mapped file stays in memory until all weights are prepacked."""
    shared: int
    """Bytes of ``weights`` that all sessions of the component have together."""
    fragmentation: int
    """Bytes that prepacking leaves unused in the arena if the graph is opened whole."""
    activations: int
    """The peak of values and workspaces, without the stage's inputs."""
    outputs: Mapping[str, TensorInfo]
    allocated: int
    """Bytes of all values together."""
    macs: int
    """Multiply-accumulate operations."""
    is_int8: bool
    """Whether most of ``macs`` are in int8."""


def footprint(stage: Stage, inputs: Mapping[str, TensorInfo]) -> Footprint:
    """Estimate the footprint of a stage for inputs of these shapes; raises UnsupportedGraph as `infer_shapes` does."""
    nodes = _execution_order(stage.nodes)
    values = {**inputs, **{name: weight_info(each) for name, each in stage.weights.items()}}
    producers = {name: node for node in nodes for name in node.outputs}
    readers = Counter(name for node in nodes for name in node.inputs)
    fused = _fused(nodes, readers, stage.weights)

    def workspace(node: Node, dying: Collection[str]) -> int:
        return _workspace(node, values, producers, fused, dying)

    peak, allocated = trace_buffers(nodes, values, stage.outputs, fused, workspace)
    macs = Counter[bool]()
    for node in nodes:
        macs[node.op in _INT8_OPS] += _macs(node, values)
    outputs = {name: values[name] for name in stage.outputs}
    return Footprint(
        **_weight_bytes(stage, nodes, values),
        activations=max(peak, 2 * sum(each.nbytes for each in outputs.values())),  # outputs are copied
        outputs=outputs,
        allocated=allocated,
        macs=macs.total(),
        is_int8=macs[True] > macs[False],
    )


Workspace: TypeAlias = Callable[[Node, Collection[str]], int]
"""The bytes of an operator's temporary buffers; the second argument are the buffers that it is the last to read."""


def trace_buffers(
    nodes: Sequence[Node], values: dict[str, TensorInfo], outputs: Iterable[str], fused: Collection[str],
    workspace: Workspace,
) -> tuple[int, int]:  # fmt: skip
    """Follow the buffers of a run: the peak of those that are live at a time, and the bytes of all together.

    Args:
        nodes: in the order of running.
        values: the inputs and weights; those that the nodes compute are added.
        outputs: what is live at the end.
        fused: the values that are never allocated.
        workspace: of each operator.
    """
    last_use = {name: index for index, node in enumerate(nodes) for name in node.inputs}
    last_use |= dict.fromkeys(outputs, len(nodes))
    buffers: dict[str, str] = {}  # the value that a value's buffer was allocated for
    users: dict[str, int] = {}  # the last node that reads a buffer
    live = peak = allocated = 0
    for index, node in enumerate(infer_shapes(nodes, values)):
        dying = {buffers[name] for name in node.inputs if name in buffers and users[buffers[name]] == index}
        for name in node.outputs:
            if name == "" or name in fused:
                continue
            buffer = _in_place(node, values, buffers, dying) or name
            buffers[name] = buffer
            live += values[name].nbytes if buffer == name else 0
            allocated += values[name].nbytes if buffer == name else 0
            users[buffer] = max(users.get(buffer, index), last_use.get(name, index))
        peak = max(peak, live + workspace(node, dying))
        unread = {*dying, *(buffers[name] for name in node.outputs if name in buffers)}
        live -= sum(values[name].nbytes for name in unread if users[name] == index)
    return peak, allocated


def weight_info(weight: Initializer) -> TensorInfo:
    """The shape and element size of a weight, with its values where they may be part of a shape."""
    known = weight.read() if prod(weight.shape) <= _SHAPE_ELEMENTS and not weight.external else None
    return TensorInfo(weight.shape, weight.length / max(prod(weight.shape), 1), known)


def _fused(nodes: Sequence[Node], readers: Mapping[str, int], weights: Collection[str]) -> set[str]:
    """The values that are never allocated: fused activations and dequantized linear weights, and cast weights."""
    linear = {node.inputs[1] for node in nodes if node.op == "MatMul"}
    return {
        node.outputs[0]
        for node in nodes
        if (node.op == "DynamicQuantizeLinear" and readers[node.outputs[0]] == 1)
        or (node.op == "Cast" and node.inputs[0] in weights)
        or (node.op in _TO_FLOAT32 and node.outputs[0] in linear)
    }


def _weight_bytes(stage: Stage, nodes: Sequence[Node], values: Mapping[str, TensorInfo]) -> dict[str, int]:
    """The fields of a `Footprint` that are about weights."""
    readers = defaultdict[str, list[Node]](list)
    for node in nodes:
        for name in stage.weights.keys() & node.inputs:
            readers[name].append(node)
    conv_weights = {node.inputs[1] for node in nodes if node.op == "Conv"}
    linear_weights = {node.inputs[1] for node in nodes if node.op == "MatMul"}
    folded = reorder_peak = reordered = largest = prepacked = mmapped = blocks = 0
    weights = len(nodes) * NODE_BYTES
    for name, users in readers.items():
        ops = {node.op for node in users}
        if ops == {"Gather"}:
            continue  # mapped: only the rows that are read are in memory
        cast = next((node.outputs[0] for node in users if node.op == "Cast"), name)
        size = values[cast].nbytes
        weights += size
        folded += size if cast != name else 0  # all are cast before any is reordered
        if cast in conv_weights:
            reorder_peak = max(reorder_peak, reordered + CONV_REORDER * size)
            reordered += size
        else:
            largest = max(largest, size)
        dequantized = any(node.op == "DequantizeLinear" and node.outputs[0] in linear_weights for node in users)
        blocks += size if dequantized else 0
        prepacked += size if ops & _INT8_OPS else 0
        mmapped += size if "QLinearConv" in ops else 0
    weights += int(blocks * INT8_BLOCK_SUMS)
    return {
        "weights": weights, "opening": max(folded + reorder_peak, weights + largest), "prepacked": prepacked,
        "mmapped": mmapped, "shared": 0, "fragmentation": int(blocks * INT8_FRAGMENTATION),
    }  # fmt: skip


def _execution_order(nodes: Sequence[Node]) -> list[Node]:
    """Nodes in the order in which ONNX Runtime runs them.

    Rewritten MatMuls run before other nodes: when their inputs are ready, at the next MatMul. So do nodes that
    dequantize conv weights. A Conv on another's output runs directly after it, since it reads its blocks of channels.
    """
    producers = {name: index for index, node in enumerate(nodes) for name in node.outputs}
    order = [*range(len(nodes))]
    matmuls = [index for index, node in enumerate(nodes) if node.op in _MATMULS]
    for index, node in enumerate(nodes):
        before = [producers[name] for name in node.inputs if name in producers]
        if node.op == "Cast" and not before:
            order[index] = 0
        elif node.op in _MATMULS or (node.op == "DequantizeLinear" and not before):
            ready = max((order[each] + 1 for each in before), default=0)
            order[index] = min(index, next((each for each in matmuls if each >= ready), index))
        if node.op == "Conv":
            x, weight = (producers.get(name) for name in node.inputs[:2])
            if x is not None and nodes[x].op == "Conv":
                order[index] = max(order[each] for each in before)
            if weight is not None and nodes[weight].op == "DequantizeLinear":
                order[weight] = min(weight, matmuls[0] if matmuls else weight)
    return [nodes[index] for index in sorted(range(len(nodes)), key=lambda index: (order[index], index))]


def _in_place(
    node: Node, values: Mapping[str, TensorInfo], buffers: Mapping[str, str], dying: Collection[str]
) -> str | None:
    """The buffer of an input that a node's output is written to; None if it gets its own."""
    if node.op in _VIEWS:
        return buffers.get(node.inputs[0])
    size = values[node.outputs[0]].nbytes
    candidates = (buffers.get(name, "") for name in node.inputs if node.op in _MAY_RUN_IN_PLACE)
    return next((buffer for buffer in candidates if buffer in dying and values[buffer].nbytes == size), None)


def _workspace(
    node: Node, values: Mapping[str, TensorInfo], producers: Mapping[str, Node], fused: Collection[str],
    dying: Collection[str],
) -> int:  # fmt: skip
    """The bytes of the temporary buffers of an operator."""
    if node.op == "MultiHeadAttention":  # transposed heads
        return sum(values[name].nbytes for name in node.inputs[:3])
    if node.op == "MatMulIntegerToFloat" and node.inputs[0] in fused:
        return values[node.inputs[0]].nbytes
    if node.op != "Conv":
        return 0
    name, output, weight = node.inputs[0], values[node.outputs[0]], values[node.inputs[1]].shape
    if node.inputs[1] in producers and producers[node.inputs[1]].op == "DequantizeLinear":  # im2col of one image
        pixels = prod(output.shape[2:])
        return prod(weight[1:]) * pixels * 4 if weight[0] > pixels and prod(weight[2:]) > 1 else 0
    if name in producers and producers[name].op == "LeakyRelu":  # part of the Conv before it
        name = producers[name].inputs[0]
    size = values[name].nbytes  # in blocks of channels, to and from which images are copied
    if name in producers and producers[name].op in ("Conv", "Resize"):
        return output.nbytes if name not in dying else max(0, output.nbytes - size)
    live = size if name not in dying else 0
    return max(2 * size, live + size + output.nbytes, live + 2 * output.nbytes) - size - output.nbytes


def _macs(node: Node, values: Mapping[str, TensorInfo]) -> int:
    if node.op in ("MatMul", "MatMulIntegerToFloat"):
        return prod(values[node.outputs[0]].shape) * values[node.inputs[0]].shape[-1]
    if node.op in ("Conv", "NhwcConv", "QLinearConv"):
        weight = values[node.inputs[3 if node.op == "QLinearConv" else 1]].shape
        return prod(values[node.outputs[0]].shape) * prod(weight[1:])
    if node.op == "MultiHeadAttention":
        query, key = (values[name].shape for name in node.inputs[:2])
        return 2 * prod(query) * key[1]
    return 0
