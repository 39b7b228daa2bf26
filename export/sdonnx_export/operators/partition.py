"""A model as a chain of stages: naming the edges between them, and cutting the model along them.

A stage is the part of a graph between two calls of `Operators.begin_stage`. Every stage of a written model
points into the same weights file, so a chain runs through little memory, or from the middle.
"""

from itertools import groupby

import onnx_ir as ir
from sdonnx_runtime.packages.manifest import CACHED_FEATURES, EMBEDS


def stage_of(node: ir.Node) -> str:
    """The name of the stage that a node belongs to."""
    return node.metadata_props.get("stage", "")


def name_edges(graph: ir.Graph) -> None:
    """Names each value that a later stage reads after the stage that makes it."""
    for stage, nodes in groupby(graph, key=stage_of):
        edges = [value for node in nodes for value in node.outputs if _crosses(value, stage)]
        for index, value in enumerate(edges):
            value.name = stage if index == 0 else f"{stage}.{index}"


def strip_names(graph: ir.Graph) -> None:
    """Takes from a graph what nothing reads: long names of values within a stage, and their shapes."""
    for index, (stage, nodes) in enumerate(groupby(graph, key=stage_of)):
        inner = [value for node in nodes for value in node.outputs if not _leaves(value, stage)]
        for number, value in enumerate(inner):
            value.name, value.type, value.shape = f"{index}.{number}", None, None


def cut(model: ir.Model) -> list[ir.Model]:
    """One model for each stage, in the order of running.

    The inputs of each are the edges (or inputs of the whole) that it reads, its outputs the edges (or outputs
    of the whole) that others read, by the names they have in the whole.
    """
    graph = model.graph
    given = set(graph.inputs) | set(graph.initializers.values())
    pieces = []
    for stage, nodes in [(stage, list(nodes)) for stage, nodes in groupby(graph, key=stage_of)]:
        made = {value for node in nodes for value in node.outputs}
        read = [value for node in nodes for value in node.inputs if value is not None and value not in made]
        inputs = [v for v in dict.fromkeys(read) if v not in given or v in graph.inputs]
        outputs = [v for node in nodes for v in node.outputs if _leaves(v, stage)]
        piece = ir.convenience.extract(graph, inputs, outputs)
        pieces.append(ir.Model(piece, ir_version=model.ir_version))
    return pieces


def cache_graphs(model: ir.Model, stage: str) -> dict[str, ir.Model]:
    """The two graphs of step reuse (DeepCache, arXiv:2312.00858), by the names of their variants.

    ``keeping`` is the whole, which also gives as KEPT what ``stage`` gives; ``reusing`` takes KEPT in its place, and
    has only what the outputs need besides.
    """
    graph = model.graph
    edge = next(value for node in graph for value in node.outputs if value.name == stage)
    keeping = ir.convenience.extract(graph, graph.inputs, [*graph.outputs, edge])
    reusing = ir.convenience.extract(graph, [*graph.inputs, edge], graph.outputs)
    keeping.outputs[-1].name = reusing.inputs[-1].name = CACHED_FEATURES
    pieces = {"keeping": keeping, "reusing": reusing}
    return {name: ir.Model(piece, ir_version=model.ir_version) for name, piece in pieces.items()}


def embedded_graph(model: ir.Model) -> ir.Model:
    """A text encoder that takes its tokens' vectors as EMBEDS; ids still tell where the text ends."""
    graph = model.graph
    tokens = next(value for node in graph for value in node.outputs if value.name == EMBEDS)
    piece = ir.convenience.extract(graph, [*graph.inputs, tokens], graph.outputs)
    return ir.Model(piece, ir_version=model.ir_version)


def _leaves(value: ir.Value, stage: str) -> bool:
    return value.is_graph_output() or _crosses(value, stage)


def _crosses(value: ir.Value, stage: str) -> bool:
    return not value.is_graph_output() and any(stage_of(node) != stage for node in value.consumers())
