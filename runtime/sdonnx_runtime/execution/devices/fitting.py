"""Rewrite a graph, when it is opened, around what an adapter's kernels can't do."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from sdonnx_runtime.errors import DeviceError
from sdonnx_runtime.execution.devices.kernel_checks import KernelChecks
from sdonnx_runtime.graphs.attention import decompose_attention, dequantize_scores
from sdonnx_runtime.graphs.bfloat16 import BFLOAT16_OPSET, compute_in_bfloat16, find_weights
from sdonnx_runtime.graphs.initializers import FLOAT, FLOAT16
from sdonnx_runtime.graphs.onnx_proto import Model, Node, Tensor, decode_model, make_node, package_errors
from sdonnx_runtime.graphs.partition import read_stages
from sdonnx_runtime.graphs.split_linears import split_linears
from sdonnx_runtime.graphs.subpixel_convs import find_upsamplings, split_upsampled_convs

_CONV_RANK, _THREE, _MULTIPLE = 4, 3, 4
"""Axes of a 2-D convolution's weight; it is wrong for multiples of 3 that are none of 4, but for 3 itself."""
_MIN_OPSET = 15
"""Of `decompose_attention`."""


def fit_graph(path: Path, model: bytes | None, checks: KernelChecks) -> bytes | None:
    """Rewrite a graph for an adapter; ``model`` itself where there is nothing to rewrite.

    MultiHeadAttention is decomposed where its kernel fails. Convolutions of 6, 9 or 15 channels, which the WebGPU
    provider computes wrong, get channels of zeros up to a multiple of 4: inpainting models have 9. Where there is no
    fp16, tables that are stored in it are cast before they are looked up; ONNX Runtime casts all other weights when it
    loads them.

    Args:
        path: the ``.onnx`` file.
        model: an encoded graph that replaces the file's.
        checks: what the adapter's kernels can do.

    Raises:
        DeviceError: the graph computes in fp16, and the adapter doesn't.
        PackageError: the graph is damaged.
    """
    with package_errors(path):
        decoded = decode_model(memoryview(path.read_bytes() if model is None else model))
        has_float16 = not _stores_float16(decoded) or checks.has_float16
        failing = {heads for heads in _attention_heads(decoded) if not checks.attends(heads)}
        uneven = _uneven_convs(decoded)
        if has_float16 and not failing and not uneven:
            return model
        if model is None:  # whose weights file may be a link, as in the Hub's cache
            decoded = decode_model(memoryview(read_stages(path, cut=False).stages[0].model))
        nodes = decompose_attention(_pad_channels(decoded.nodes, uneven), failing.__contains__)
        if not has_float16:
            nodes = _widen_tables(path, decoded, nodes)
        weights = [each.encoded for each in decoded.initializers.values()]
        return decoded.encode_part("fitted", nodes, weights, decoded.inputs, decoded.outputs)


def fit_to_bfloat16(path: Path, model: bytes | None, sizes: Mapping[str, int]) -> bytes | None:
    """Rewrite a graph for OpenVINO's CPU device in bfloat16; ``model`` itself where there is nothing to rewrite.

    OpenVINO computes any graph so on CPUs that can. But it widens weights that the graph doesn't have in bfloat16 to
    float32, and keeps both those and the ones that it computes with. Gated linear units and upsampled convolutions are
    written as what takes less time. In int8 graphs attention is in bfloat16 too: OpenVINO rounds products of int8 to
    bfloat16 before the softmax, which makes pictogram's images 12 dB from float32's instead of 37 dB.

    Args:
        path: the ``.onnx`` file.
        model: an encoded graph that replaces the file's.
        sizes: those of its free dimensions, by their names.

    Raises PackageError if the graph is damaged.
    """
    with package_errors(path):
        graph = decode_model(memoryview(path.read_bytes() if model is None else model))
        order = tuple(graph.outputs)
        if model is None:  # whose weights file may be a link, as in the Hub's cache
            graph = decode_model(memoryview(read_stages(path, cut=False).stages[0].model))
        if find_weights(graph):
            graph = replace(graph, nodes=_split_layers(graph, sizes))
            nodes, opset = tuple(compute_in_bfloat16(graph, find_weights(graph))), BFLOAT16_OPSET
        else:
            nodes, opset = tuple(dequantize_scores(graph.nodes)), None
            if nodes == graph.nodes:
                return model
        tensors = [each.encoded for each in graph.initializers.values()]
        return graph.encode_part("bfloat16", nodes, tensors, graph.inputs, order, opset=opset)


def _split_layers(graph: Model, sizes: Mapping[str, int]) -> tuple[Node, ...]:
    """Write gated linear units and upsampled convolutions as layers that take less time, for ``sizes``."""
    nodes = tuple(split_linears(graph.nodes, graph.initializers))
    weights = {**graph.initializers, **_cast_weights(nodes, graph.initializers)}
    return tuple(split_upsampled_convs(nodes, find_upsamplings(graph, sizes), weights))


def _cast_weights(nodes: Iterable[Node], initializers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that are cast, by what they are cast to."""
    casts = {node.outputs[0]: initializers.get(node.inputs[0]) for node in nodes if node.op == "Cast"}
    return {name: each for name, each in casts.items() if each is not None}


def _stores_float16(model: Model) -> bool:
    return any(each.data_type == FLOAT16 for each in model.initializers.values())


def _attention_heads(model: Model) -> set[int]:
    """The numbers of heads of a graph's MultiHeadAttention nodes."""
    if model.opset < _MIN_OPSET:
        return set()
    return {int(node.attributes["num_heads"]) for node in model.nodes if node.op == "MultiHeadAttention"}


def _uneven_convs(model: Model) -> dict[str, int]:
    """The convolutions whose input channels the provider computes in threes: their outputs, and the zeros they lack."""
    cast = {node.outputs[0]: node.inputs[0] for node in model.nodes if node.op == "Cast"}
    found = dict[str, int]()
    for node in model.nodes:
        weight = model.initializers.get(cast.get(node.inputs[1], node.inputs[1])) if node.op == "Conv" else None
        channels = weight.shape[1] if weight is not None and len(weight.shape) == _CONV_RANK else 0
        if channels > _THREE and channels % _THREE == 0 and channels % _MULTIPLE != 0 and _is_dense(node):
            found[node.outputs[0]] = -channels % _MULTIPLE
    return found


def _is_dense(node: Node) -> bool:
    return node.attributes.get("group", 1) == 1


def _pad_channels(nodes: Iterable[Node], uneven: Mapping[str, int]) -> Iterator[Node]:
    """Yield the nodes with channels of zeros added to the input and the weight of these convolutions."""
    for node in nodes:
        output, zeros = node.outputs[0], uneven.get(node.outputs[0], 0)
        if not zeros:
            yield node
            continue
        sizes, names = f"{output}.zeros", [f"{output}.{each}" for each in ("input", "weight")]
        yield make_node("Constant", [], sizes, value_ints=[0] * 5 + [zeros, 0, 0], stage=node.stage)
        for name, x in zip(names, node.inputs, strict=False):
            yield make_node("Pad", [x, sizes], name, stage=node.stage)
        yield node.rewire([*names, *node.inputs[2:]], output)


def _widen_tables(path: Path, model: Model, nodes: Iterable[Node]) -> Iterator[Node]:
    """Yield the nodes with tables of fp16 cast to float32 before Gather looks them up."""
    stored = {name for name, each in model.initializers.items() if each.data_type == FLOAT16}
    for node in nodes:
        if node.op == "Cast" and node.attributes["to"] == FLOAT16:
            raise DeviceError(
                f"{path} computes in fp16, which this adapter does not; export the package with --precision fp32"
            )
        if node.op == "Gather" and node.inputs[0] in stored:
            table = f"{node.outputs[0]}.table"
            yield make_node("Cast", node.inputs[:1], table, stage=node.stage, to=FLOAT)
            yield node.rewire([table, *node.inputs[1:]], node.outputs[0])
        else:
            yield node
