"""A graph as a chain of stages, cut from its file without the onnx library: each can be opened and run alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.initializers import EXTERNAL_DATA, GRAPH, INITIALIZER, Initializer, initializer_of
from sdonnx_runtime.protobuf import fields, message, parts

_NODE, _GRAPH_NAME, _INPUT, _OUTPUT, _VALUE_INFO = 1, 2, 11, 12, 13
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
class Staged:
    """A whole graph, cut."""

    stages: tuple[Stage, ...]
    """In the order of running; of a graph without marks there is one."""
    outputs: tuple[str, ...]
    leading: Mapping[str, str]
    """What inputs call their first size, where it is free."""


def read_stages(path: Path) -> Staged:
    """The stages of an ``.onnx`` file.

    Raises:
        PackageError: it is damaged or missing, or doesn't say what its edges are.
    """
    try:
        return _cut(path, memoryview(path.read_bytes()))
    except (IndexError, KeyError, ValueError) as error:
        raise PackageError(f"{path} is damaged ({error}); run 'sdonnx export' again") from None
    except OSError as error:
        raise PackageError(f"{path} can't be read ({error.strerror}); run 'sdonnx export' again") from None


def _cut(path: Path, data: memoryview) -> Staged:
    (graph,) = parts(data, GRAPH)
    head = [(number, part) for number, part in fields(data) if number != GRAPH]
    tensors = {_text(part, _TENSOR_NAME): part for part in parts(graph, INITIALIZER)}
    given, results, edges = (
        {_text(part, _VALUE_NAME): part for part in parts(graph, number)} for number in (_INPUT, _OUTPUT, _VALUE_INFO)
    )
    described = {**edges, **results, **given}
    pieces = [
        (name, list(nodes)) for name, nodes in groupby(map(_node, parts(graph, _NODE)), key=lambda node: node.stage)
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
        body = message(
            (_GRAPH_NAME, name.encode()),
            *((_NODE, node.data) for node in nodes),
            *((INITIALIZER, _placed(path, tensor)) for tensor in mine),
            *((_INPUT, described[value]) for value in inputs),
            *((_OUTPUT, described[value]) for value in outputs),
        )
        weights = [initializer_of(path, data, tensor) for tensor in mine]
        stages.append(
            Stage(
                name=name,
                model=message(*head, (GRAPH, body)),
                inputs=tuple(inputs),
                outputs=tuple(outputs),
                weights={weight.name: weight for weight in weights},
            )
        )
    leading = {name: first for name, part in given.items() for first in _first_size(part)}
    return Staged(stages=tuple(stages), outputs=tuple(results), leading=leading)


def _node(data: memoryview) -> _Node:
    reads, makes = (tuple(str(part, "utf-8") for part in parts(data, number)) for number in (_READ, _MADE))
    marks = (
        [str(part, "utf-8") for _, part in fields(each) if isinstance(part, memoryview)] for each in parts(data, _MARK)
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
            placed.append((number, message((1, b"location"), (2, target.encode()))))
        else:
            placed.append((number, value))
    return message(*placed)


def _text(data: memoryview, number: int) -> str:
    return str(parts(data, number)[0], "utf-8")


def _first_size(described: memoryview) -> list[str]:
    """What a ValueInfoProto calls its first size; none of one that is fixed, or of a number."""
    found = [described]
    for number in (2, 1, 2):  # type, tensor_type, shape
        found = [part for each in found for part in parts(each, number)]
    dims = [part for each in found for part in parts(each, 1)]
    return [str(name, "utf-8") for name in parts(dims[0], 2)] if dims else []
