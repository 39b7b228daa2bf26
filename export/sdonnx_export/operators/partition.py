"""A model as a chain of stages: name the edges between stages, and cut the model along them.

A stage is the part of a graph between two calls of `Operators.begin_stage`. All stages of a written model point into
one weights file, so a chain runs in little memory, or from a stage in the middle.
"""

from collections.abc import Sequence
from itertools import groupby

import onnx_ir as ir
from sdonnx_runtime.packages.variant import CACHED_FEATURES, EMBEDS, CacheStep


def get_stage(node: ir.Node) -> str:
    """Return the name of the stage that a node belongs to."""
    return node.metadata_props.get("stage", "")


def name_edges(graph: ir.Graph) -> None:
    """Name each value that a later stage reads after the stage that computes it."""
    for stage, nodes in groupby(graph, key=get_stage):
        edges = [value for node in nodes for value in node.outputs if _is_stage_edge(value, stage)]
        for index, value in enumerate(edges):
            value.name = stage if index == 0 else f"{stage}.{index}"


def strip_names(graph: ir.Graph) -> None:
    """Remove what nothing reads: long names and the shapes of values within a stage."""
    for index, (stage, nodes) in enumerate(groupby(graph, key=get_stage)):
        inner = [value for node in nodes for value in node.outputs if not _is_stage_output(value, stage)]
        for number, value in enumerate(inner):
            value.name, value.type, value.shape = f"{index}.{number}", None, None


def cut(model: ir.Model) -> list[ir.Model]:
    """Cut a model into one model per stage, in the order of running.

    Inputs of each are the edges, or inputs of the whole model, that it reads; outputs are the edges, or outputs of the
    whole model, that it computes; names stay.
    """
    graph = model.graph
    available = set(graph.inputs) | set(graph.initializers.values())
    pieces = []
    for stage, nodes in [(stage, list(nodes)) for stage, nodes in groupby(graph, key=get_stage)]:
        computed = {value for node in nodes for value in node.outputs}
        read = [value for node in nodes for value in node.inputs if value is not None and value not in computed]
        inputs = [v for v in dict.fromkeys(read) if v not in available or v in graph.inputs]
        outputs = [v for node in nodes for v in node.outputs if _is_stage_output(v, stage)]
        piece = _extract(graph, inputs, outputs)
        pieces.append(ir.Model(piece, ir_version=model.ir_version))
    return pieces


def make_cache_graphs(model: ir.Model, stage: str) -> dict[CacheStep, ir.Model]:
    """Make the two graphs of DeepCache (arXiv:2312.00858) from a whole U-Net.

    ``caching`` is the whole, which also returns the output of ``stage`` as CACHED_FEATURES; ``cached`` takes
    CACHED_FEATURES in its place, and has only what the outputs need apart from it.
    """
    graph = model.graph
    edge = next(value for node in graph for value in node.outputs if value.name == stage)
    caching = _extract(graph, graph.inputs, [*graph.outputs, edge])
    cached = _extract(graph, [*graph.inputs, edge], graph.outputs)
    caching.outputs[-1] = _float32_output(caching, caching.outputs[-1], CACHED_FEATURES)
    cached.inputs[-1] = _float32_input(cached, cached.inputs[-1], CACHED_FEATURES)
    pieces: dict[CacheStep, ir.Graph] = {"caching": caching, "cached": cached}
    return {step: ir.Model(piece, ir_version=model.ir_version) for step, piece in pieces.items()}


def _float32_output(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """Name an output; what is float16 is cast by the stage that computes it, as all ports are float32."""
    producer = value.producer()
    if value.dtype != ir.DataType.FLOAT16 or producer is None:
        value.name = name
        return value
    node = _cast_node(value, ir.DataType.FLOAT, producer)
    graph.insert_after(producer, node)
    node.outputs[0].name = name
    return node.outputs[0]


def _float32_input(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """Name an input; what is float16 is cast by the first stage that reads it."""
    if value.dtype != ir.DataType.FLOAT16:
        value.name = name
        return value
    readers = {each.node for each in value.uses()}
    first = next(node for node in graph if node in readers)
    port = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
    node = _cast_node(port, ir.DataType.FLOAT16, first)
    graph.insert_before(first, node)
    value.replace_all_uses_with(node.outputs[0])
    return port


def _cast_node(value: ir.Value, dtype: ir.DataType, neighbour: ir.Node) -> ir.Node:
    """A cast in the stage of another node."""
    output = ir.Value(name=f"{value.name}.cast", type=ir.TensorType(dtype), shape=value.shape)
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)], outputs=[output])
    node.metadata_props["stage"] = get_stage(neighbour)
    return node


def make_embedded_graph(model: ir.Model) -> ir.Model:
    """Make a text encoder that takes its token embeddings as EMBEDS; the ids are read for the end of the text alone."""
    graph = model.graph
    tokens = next(value for node in graph for value in node.outputs if value.name == EMBEDS)
    piece = _extract(graph, [*graph.inputs, tokens], graph.outputs)
    return ir.Model(piece, ir_version=model.ir_version)


def _extract(graph: ir.Graph, inputs: Sequence[ir.Value | str], outputs: Sequence[ir.Value | str]) -> ir.Graph:
    """As `ir.convenience.extract`, but with initializers in the order of ``graph``: equal graphs have equal bytes."""
    piece = ir.convenience.extract(graph, inputs, outputs)
    values = dict(piece.initializers)
    piece.initializers.clear()
    for name in graph.initializers:
        if name in values:
            piece.initializers.add(values[name])
    return piece


def _is_stage_output(value: ir.Value, stage: str) -> bool:
    return value.is_graph_output() or _is_stage_edge(value, stage)


def _is_stage_edge(value: ir.Value, stage: str) -> bool:
    return not value.is_graph_output() and any(get_stage(node) != stage for node in value.consumers())
