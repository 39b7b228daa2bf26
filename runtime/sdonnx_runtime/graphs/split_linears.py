"""Linear layers whose outputs are split in half, as those of gated linear units, as two layers that need no Split."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from sdonnx_runtime.graphs.onnx_proto import Node, Tensor, make_node

_ROWS_AND_COLUMNS = 2


def split_linears(nodes: Sequence[Node], initializers: Mapping[str, Tensor]) -> Iterator[Node]:
    """Yield the nodes; two MatMul replace one, with a bias, whose outputs are split in half.

    Their weights are halves of the one weight, which may be cast: nodes on initializers alone, for a device that folds
    constants.
    """
    splitter = _LinearSplitter(nodes, initializers)
    layers = {node.outputs[0]: each for node in nodes if (each := splitter.find_layer(node)) is not None}
    replaced = {node.outputs[0] for layer in layers.values() for node in layer}
    for node in nodes:
        if node.outputs[0] in layers:
            yield from splitter.split(*layers[node.outputs[0]], node)
        elif node.outputs[0] not in replaced:
            yield node


class _LinearSplitter:
    """Splits the linear layers of a graph."""

    def __init__(self, nodes: Sequence[Node], initializers: Mapping[str, Tensor]) -> None:
        self._initializers = initializers
        self._producers = {name: node for node in nodes for name in node.outputs}
        self._readers = Counter(name for node in nodes for name in node.inputs)

    def find_layer(self, split: Node) -> tuple[Node, Node] | None:
        """The MatMul and the Add whose sum a Split halves, if nothing else reads them."""
        has_sizes = any(split.inputs[1:])  # which may differ
        if split.op != "Split" or has_sizes or (split.attributes.get("axis"), len(split.outputs)) != (-1, 2):
            return None
        add = self._read_once(split.inputs[0], "Add")
        product = None if add is None else self._read_once(add.inputs[0], "MatMul")
        if add is None or product is None or not self._can_halve(product.inputs[1], _ROWS_AND_COLUMNS):
            return None
        return (product, add) if self._can_halve(add.inputs[1], 1) else None

    def _read_once(self, name: str, op: str) -> Node | None:
        node = self._producers.get(name)
        return node if node is not None and node.op == op and self._readers[name] == 1 else None

    def _can_halve(self, name: str, rank: int) -> bool:
        """Whether a value is an initializer of so many axes with an even last one, or made of one that is read here."""
        node = self._producers.get(name)
        if node is None:
            tensor = self._initializers.get(name)
            return tensor is not None and len(tensor.shape) == rank and tensor.shape[-1] % 2 == 0
        return node.op == "Cast" and self._readers[name] == 1 and self._can_halve(node.inputs[0], rank)

    def split(self, product: Node, add: Node, split: Node) -> Iterator[Node]:
        """Yield the two layers that replace one, and what makes their weights and biases."""
        weights, biases = f"{split.outputs[0]}.weight", f"{split.outputs[0]}.bias"
        yield from self._halve(product.inputs[1], weights)
        yield from self._halve(add.inputs[1], biases)
        for half, output in enumerate(split.outputs):
            y = f"{output}.product"
            yield product.rewire([product.inputs[0], f"{weights}.{half}"], y)
            yield add.rewire([y, f"{biases}.{half}"], output)

    def _halve(self, name: str, halves: str) -> Iterator[Node]:
        """Yield the nodes that make halves of a value along its last axis, which get these names with .0 and .1."""
        outputs, node = (f"{halves}.0", f"{halves}.1"), self._producers.get(name)
        if node is None:
            yield make_node("Split", [name], outputs, stage="", axis=-1, num_outputs=2)
            return
        yield from self._halve(node.inputs[0], f"{halves}.stored")
        for half, output in enumerate(outputs):
            yield node.rewire([f"{halves}.stored.{half}"], output)
