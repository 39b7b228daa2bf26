"""Partition a graph into stages along the marks in its nodes' metadata: each can be opened and run alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.graphs.circular_padding import pad_circularly
from sdonnx_runtime.graphs.initializers import Initializer, channels_last_weights
from sdonnx_runtime.graphs.onnx_proto import Model, Node, Tensor, ValueInfo, decode_model, package_errors
from sdonnx_runtime.graphs.split_convs import ConvSplitter

_OVERHEAD = 1 << 20
"""Bytes that stages may have more than four times the graph's: what several of them need is in each."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a graph that runs alone."""

    name: str
    model: bytes
    """Encoded; it is opened with the weights file of the whole graph."""
    inputs: tuple[str, ...]
    """Inputs of the whole graph, and outputs of earlier stages."""
    outputs: tuple[str, ...]
    """Inputs of later stages, and outputs of the whole graph."""
    weights: Mapping[str, Initializer]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Decoded each time: cached, they would need more memory than the stage."""
        return decode_model(memoryview(self.model)).nodes


@dataclass(frozen=True, kw_only=True)
class PartitionedGraph:
    """A whole graph as stages."""

    stages: tuple[Stage, ...]
    """In the order of running; a graph without marks has one."""
    outputs: tuple[str, ...]
    inputs: Mapping[str, ValueInfo]
    """By name."""

    @property
    def batch_axes(self) -> dict[str, str]:
        """The symbolic names of the inputs' first axes, where these have one."""
        sizes = {name: each.shape[0] for name, each in self.inputs.items() if each.shape}
        return {name: size for name, size in sizes.items() if isinstance(size, str)}

    @property
    def batch_independent(self) -> bool:
        """Whether running each batch entry in the batch is bit-identical to running it alone.

        With quantized weights it isn't: ranges of activations span the batch, and threads split a MatMul differently.
        """
        return not any(b"DequantizeLinear" in stage.model or b"MatMulInteger" in stage.model for stage in self.stages)


def read_stages(path: Path, *, cut: bool = True, circular: str = "", has_wrap: bool = True) -> PartitionedGraph:
    """Read an ``.onnx`` file as stages with split convolutions; without ``cut``, as one stage, with whole ones.

    Convolutions pad circularly along the axes ``circular``, for ``has_wrap`` see `pad_circularly`.
    Raises PackageError if it is damaged or missing, or doesn't describe the values between stages.
    """
    with package_errors(path):
        model = decode_model(memoryview(path.read_bytes()))
        _check_weights(path, model)
        nodes: Iterable[Node] = model.nodes
        if circular:
            nodes = pad_circularly(nodes, circular, opset=model.opset, has_wrap=has_wrap)
        return _partition(path, model, nodes, cut)


def _check_weights(path: Path, model: Model) -> None:
    for tensor in model.initializers.values():
        weight = Initializer.from_tensor(tensor, path, model.data)
        if not weight.is_in_file:
            raise PackageError(f"{weight.file} is missing or cut at '{weight.name}'; run 'sdonnx export' again")


def _partition(path: Path, model: Model, nodes: Iterable[Node], cut: bool) -> PartitionedGraph:
    tensors = dict(model.initializers)
    nodes = ConvSplitter(tensors).split(nodes) if cut else nodes
    pieces = [(name, list(each)) for name, each in groupby(nodes, key=lambda node: node.stage if cut else "")]
    last_use = {value: index for index, (_, piece) in enumerate(pieces) for node in piece for value in node.inputs}
    last_use |= dict.fromkeys(model.outputs, len(pieces))
    stages, total = list[Stage](), 0
    for index, (name, piece) in enumerate(pieces):
        produced = dict.fromkeys(value for node in piece for value in node.outputs if value)
        read = dict.fromkeys(value for node in piece for value in node.inputs if value and value not in produced)
        weights = [tensors[value] for value in read if value in tensors]
        inputs = tuple(value for value in read if value not in tensors)
        outputs = tuple(value for value in produced if last_use.get(value, index) > index)
        data = model.encode_part(name, piece, [_encode_resolved(path, each) for each in weights], inputs, outputs)
        last = channels_last_weights(piece)
        initializers = {each.name: Initializer.from_tensor(each, path, model.data, last) for each in weights}
        stages.append(Stage(name=name, model=data, inputs=inputs, outputs=outputs, weights=initializers))
        total += len(data)
        if total > 4 * len(model.data) + _OVERHEAD:
            raise ValueError("its stages together are larger than it is")
    inputs = {name: ValueInfo.decode(encoded) for name, encoded in model.inputs.items()}
    return PartitionedGraph(stages=tuple(stages), outputs=tuple(model.outputs), inputs=inputs)


def _encode_resolved(path: Path, tensor: Tensor) -> memoryview:
    """Encode a tensor for the directory of the file that ``path`` links to, as in the Hub's cache."""
    if not path.is_symlink() or "location" not in tensor.external:
        return tensor.encoded
    location = path.with_name(tensor.external["location"]).resolve().name
    return tensor.with_external(tensor.name, tensor.shape, {**tensor.external, "location": location}).encoded
