"""A graph as a chain of stages, cut from its file without the onnx library: each can be opened and run alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.graphs.initializers import EXTERNAL_DATA, GRAPH, INITIALIZER, Initializer, initializer_of
from sdonnx_runtime.graphs.onnx_proto import encode_message, fields, submessages
from sdonnx_runtime.graphs.split_convs import ConvSplitter

NODE, _GRAPH_NAME, _INPUT, _OUTPUT, _VALUE_INFO = 1, 2, 11, 12, 13
_READ, _MADE, _MARK = 1, 2, 9
_VALUE_NAME, _TENSOR_NAME = 1, 8
"""Fields of onnx.proto's GraphProto, NodeProto, ValueInfoProto and TensorProto."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a graph, with what it takes from others."""

    name: str
    model: bytes
    """As an ``.onnx`` file has it, to be opened beside the weights of the whole."""
    inputs: tuple[str, ...]
    """Inputs of the whole and edges, which are what earlier stages give."""
    outputs: tuple[str, ...]
    """Edges and outputs of the whole."""
    weights: Mapping[str, Initializer]


@dataclass(frozen=True)
class _Node:
    data: memoryview
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    stage: str


@dataclass(frozen=True, kw_only=True)
class Input:
    """What a graph is given, as its file describes it."""

    data_type: int
    """ONNX's number for its element type."""
    sizes: tuple[int | str, ...]
    """Of each axis the size, or what it is called; empty where it isn't called anything."""


@dataclass(frozen=True, kw_only=True)
class PartitionedGraph:
    """A whole graph, cut."""

    stages: tuple[Stage, ...]
    """In the order of running; of a graph without marks there is one."""
    outputs: tuple[str, ...]
    inputs: Mapping[str, Input]
    """By name."""

    @property
    def leading(self) -> dict[str, str]:
        """What inputs call their first size, where it is free."""
        sizes = {name: each.sizes[0] for name, each in self.inputs.items() if each.sizes}
        return {name: size for name, size in sizes.items() if isinstance(size, str)}

    @property
    def rows_are_apart(self) -> bool:
        """Whether each row comes out bit by bit as it would alone: with weights in codes it doesn't.

        Ranges are found over all rows, or products are shared out among threads otherwise.
        """
        return not any(b"DequantizeLinear" in stage.model or b"MatMulInteger" in stage.model for stage in self.stages)


def read_stages(path: Path, *, cut: bool = True) -> PartitionedGraph:
    """The stages of an ``.onnx`` file, with narrow kernels; without ``cut``, all of it as one, as it is.

    Raises:
        PackageError: it is damaged or missing, or doesn't say what its edges are.
    """
    try:
        return _cut(path, memoryview(path.read_bytes()), cut)
    except (IndexError, KeyError, ValueError) as error:
        raise PackageError(f"{path} is damaged ({error}); run 'sdonnx export' again") from None
    except OSError as error:
        raise PackageError(f"{path} can't be read ({error.strerror}); run 'sdonnx export' again") from None


def _cut(path: Path, data: memoryview, cut: bool) -> PartitionedGraph:
    (graph,) = submessages(data, GRAPH)
    head = [(number, part) for number, part in fields(data) if number != GRAPH]
    tensors = {_text(part, _TENSOR_NAME): part for part in submessages(graph, INITIALIZER)}
    given, results, edges = (
        {_text(part, _VALUE_NAME): part for part in submessages(graph, number)}
        for number in (_INPUT, _OUTPUT, _VALUE_INFO)
    )
    described = {**edges, **results, **given}
    written = ConvSplitter(path, data, tensors)(submessages(graph, NODE)) if cut else submessages(graph, NODE)
    pieces = [
        (name, list(nodes)) for name, nodes in groupby(map(_node, written), key=lambda node: node.stage if cut else "")
    ]
    last = {value: index for index, (_, nodes) in enumerate(pieces) for node in nodes for value in node.reads}
    last |= dict.fromkeys(results, len(pieces))
    stages: list[Stage] = []
    for index, (name, nodes) in enumerate(pieces):
        made = dict.fromkeys(value for node in nodes for value in node.makes)
        read = dict.fromkeys(value for node in nodes for value in node.reads if value not in made)
        mine = [tensors[value] for value in read if value in tensors]
        inputs = [value for value in read if value not in tensors]
        outputs = [value for value in made if last.get(value, index) > index]
        body = encode_message(
            (_GRAPH_NAME, name.encode()),
            *((NODE, node.data) for node in nodes),
            *((INITIALIZER, _placed(path, tensor)) for tensor in mine),
            *((_INPUT, described[value]) for value in inputs),
            *((_OUTPUT, described[value]) for value in outputs),
        )
        weights = [initializer_of(path, data, tensor) for tensor in mine]
        stages.append(
            Stage(
                name=name,
                model=encode_message(*head, (GRAPH, body)),
                inputs=tuple(inputs),
                outputs=tuple(outputs),
                weights={weight.name: weight for weight in weights},
            )
        )
    inputs = {name: _input(part) for name, part in given.items()}
    return PartitionedGraph(stages=tuple(stages), outputs=tuple(results), inputs=inputs)


def _node(data: memoryview) -> _Node:
    reads, makes = (tuple(str(part, "utf-8") for part in submessages(data, number)) for number in (_READ, _MADE))
    marks = (
        [str(part, "utf-8") for _, part in fields(each) if isinstance(part, memoryview)]
        for each in submessages(data, _MARK)
    )
    stage = next((value for key, value in marks if key == "stage"), "")
    return _Node(data, tuple(value for value in reads if value), makes, stage)


def _placed(path: Path, tensor: memoryview) -> bytes | memoryview:
    """A tensor as it is opened beside the file that ``path`` is a link to, as in the Hub's cache."""
    if not path.is_symlink():
        return tensor
    placed: list[tuple[int, int | bytes | memoryview]] = []
    for number, value in fields(tensor):
        if number == EXTERNAL_DATA and isinstance(value, memoryview) and _text(value, 1) == "location":
            target = path.with_name(_text(value, 2)).resolve().name
            placed.append((number, encode_message((1, b"location"), (2, target.encode()))))
        else:
            placed.append((number, value))
    return encode_message(*placed)


def _text(data: memoryview, number: int) -> str:
    return str(submessages(data, number)[0], "utf-8")


def _input(described: memoryview) -> Input:
    """What a ValueInfoProto says of it."""
    (kind,) = submessages(submessages(described, 2)[0], 1)
    data_type = next((value for number, value in fields(kind) if number == 1 and isinstance(value, int)), 0)
    dims = [dim for shape in submessages(kind, 2) for dim in submessages(shape, 1)]
    return Input(data_type=data_type, sizes=tuple(_size(dim) for dim in dims))


def _size(dim: memoryview) -> int | str:
    found = [value if isinstance(value, int) else str(value, "utf-8") for _, value in fields(dim)]
    return found[0] if found else ""
