"""Graphs that compute in bfloat16, made of those that compute in float32."""

from collections.abc import Collection, Iterator, Mapping

from sdonnx_runtime.graphs.initializers import FLOAT, FLOAT16
from sdonnx_runtime.graphs.onnx_proto import Model, Node, ValueInfo, make_node

BFLOAT16 = 16
"""Of TensorProto.DataType."""

BFLOAT16_OPSET = 22
"""The first with Conv in bfloat16."""

_OPSETS = range(20, BFLOAT16_OPSET + 1)
"""Of graphs that can be rewritten: sdonnx exports 20 and later."""

_MULTIPLY = ("Conv", "MatMul")

_ALL = 99
_FLOAT_INPUTS: Mapping[str, int] = {
    "Add": _ALL, "Concat": _ALL, "Conv": _ALL, "Div": _ALL, "InstanceNormalization": _ALL, "LayerNormalization": _ALL,
    "MatMul": _ALL, "Mul": _ALL, "MultiHeadAttention": _ALL, "PRelu": _ALL, "Sub": _ALL, "Gelu": 1, "LeakyRelu": 1,
    "QuickGelu": 1, "Relu": 1, "Reshape": 1, "Resize": 1, "Sigmoid": 1, "Slice": 1, "Softmax": 1, "Split": 1,
    "Tanh": 1, "Tile": 1, "Transpose": 1, "Unsqueeze": 1,
}  # fmt: skip
"""Operators that compute in bfloat16 once an input is in it, with the number of inputs that must be then; the inputs
of others are cast to float32."""

_SUBGRAPHS = ("If", "Loop", "Scan")
"""Operators whose subgraphs read values by name, of the types that these have."""

_ANY_TYPE = ("Cast", "Shape")
"""Operators that read a value of any type."""


def find_weights(model: Model) -> set[str]:
    """The names of what a graph multiplies by: weights in float32, and what those in float16 are cast to.

    None of a graph that is quantized as a whole, has subgraphs, or has operators that don't take bfloat16.
    """
    if model.opset not in _OPSETS or any(_excludes(node) for node in model.nodes):
        return set()
    cast = {node.outputs[0]: node.inputs[0] for node in model.nodes if node.op == "Cast"}
    read = {node.inputs[1] for node in model.nodes if node.op in _MULTIPLY}
    stored = {name: model.initializers.get(cast.get(name, name)) for name in read}
    types = {name: FLOAT16 if name in cast else FLOAT for name in read}
    return {name for name, each in stored.items() if each is not None and each.data_type == types[name]}


def _excludes(node: Node) -> bool:
    """Whether a graph with this node can't be rewritten."""
    return "Quantize" in node.op.removeprefix("Dequantize") or node.op in _SUBGRAPHS


def compute_in_bfloat16(model: Model, weights: Collection[str]) -> Iterator[Node]:
    """Yield nodes, of opset BFLOAT16_OPSET, that compute in bfloat16 from the first of these weights on.

    What comes before stays in float32, such as the sines of timesteps. The weights, of `find_weights`, stay as they
    are stored, and are cast to bfloat16.
    """
    return _Rewriting(model, weights).rewrite()


class _Rewriting:
    """A graph whose nodes are being rewritten."""

    def __init__(self, model: Model, weights: Collection[str]) -> None:
        self._nodes, self._outputs, self._weights = model.nodes, model.outputs, weights
        self._bfloat16_names = dict[str, str]()  # what is in bfloat16, with the name that it has there
        self._made = set[str]()

    def rewrite(self) -> Iterator[Node]:
        """Yield the nodes."""
        for node in self._nodes:
            if node.op == "Cast" and node.outputs[0] in self._weights:
                self._bfloat16_names[node.outputs[0]] = node.outputs[0]
                yield make_node("Cast", node.inputs, node.outputs[0], stage=node.stage, to=BFLOAT16)
            else:
                yield from self._rewrite_node(node)
        for name in [each for each in self._outputs if each in self._bfloat16_names]:
            data_type = ValueInfo.decode(self._outputs[name]).data_type
            yield make_node("Cast", [self._bfloat16_names[name]], name, stage="", to=data_type)

    def _rewrite_node(self, node: Node) -> Iterator[Node]:
        count = _float_inputs(node)
        multiplies = node.op in _MULTIPLY and node.inputs[1] in self._weights
        in_bfloat16 = multiplies or any(name in self._bfloat16_names for name in node.inputs[:count])
        inputs = list[str]()
        for index, name in enumerate(node.inputs):
            is_one = name in self._bfloat16_names
            must_be = is_one if node.op in _ANY_TYPE else in_bfloat16 and index < count
            if not name or must_be == is_one:
                inputs.append(self._bfloat16_names.get(name, name))
                continue
            inputs.append(f"{name}.{'bf16' if must_be else 'f32'}")
            if inputs[-1] not in self._made:
                self._made.add(inputs[-1])
                source, to = self._bfloat16_names.get(name, name), BFLOAT16 if must_be else FLOAT
                yield make_node("Cast", [source], inputs[-1], stage=node.stage, to=to)
        if not in_bfloat16:
            yield node.rewire(inputs, *node.outputs)
            return
        outputs = [f"{name}.bf16" if name in self._outputs else name for name in node.outputs]
        self._bfloat16_names.update(zip(node.outputs, outputs, strict=True))
        rewired = node.rewire(inputs, *outputs)
        if node.op == "LayerNormalization":  # the type that it computes in: OpenVINO casts to any other one
            rewired = rewired.with_attribute("stash_type", BFLOAT16)
        yield from _swish(node, inputs, *outputs) if node.op == "QuickGelu" else [rewired]


def _float_inputs(node: Node) -> int:
    """How many inputs must be in bfloat16 once one is; 0 of an operator that doesn't compute in it."""
    is_gelu = node.op == "QuickGelu" and node.attributes.get("alpha") != 1
    return 0 if is_gelu else _FLOAT_INPUTS.get(node.op, 0)


def _swish(node: Node, inputs: list[str], output: str) -> Iterator[Node]:
    """QuickGelu with an alpha of 1: x * sigmoid(x). OpenVINO reads the operator itself in float32 alone."""
    yield make_node("Sigmoid", inputs, f"{output}.sigmoid", stage=node.stage)
    yield make_node("Mul", [*inputs, f"{output}.sigmoid"], output, stage=node.stage)
