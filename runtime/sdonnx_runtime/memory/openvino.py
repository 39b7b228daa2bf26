"""Estimate the memory that OpenVINO's CPU device takes of the process: it compiles a graph for fixed sizes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod

from sdonnx_runtime.execution.devices.adapters import choose_adapter
from sdonnx_runtime.execution.devices.table import DeviceName
from sdonnx_runtime.execution.ort import hardware_kind
from sdonnx_runtime.execution.process_memory import can_unmap
from sdonnx_runtime.graphs.initializers import FLOAT, FLOAT16
from sdonnx_runtime.graphs.onnx_proto import Node
from sdonnx_runtime.graphs.partition import Stage
from sdonnx_runtime.graphs.shape_inference import TensorInfo, UnsupportedGraph
from sdonnx_runtime.memory.footprint import Footprint, footprint, trace_buffers, weight_info

# Measured with onnxruntime-ep-openvino 1.8.1 and ONNX Runtime 1.32.0 on x86-64 Linux with AVX-512 and avx512_bf16,
# 2 cores, in November 2026: pictogram, and random weights in the size of Stable Diffusion 1.5.
# `tests/runtime/memory/test_openvino_memory.py` holds that predictions are within 15 % of peaks.
LIBRARY_BYTES = 75_000_000
"""Its libraries: what is resident of their code, and their data."""
NODE_BYTES = 70_000
"""A session's bytes for each node of a graph: machine code that is made for it, and its description."""
COMPUTE_BYTES: Mapping[str, int] = {"f32": 4, "bf16": 2, "f16": 2}
"""Bytes of an element: of a value; of a weight that a kernel reads, in the graph and packed for the kernel."""
MAPPED_BYTES = 100_000_000
"""What is resident of the weights that are mapped while a graph is opened: they leave memory all the time."""
ANY_SIZE = 1.75
"""How many times the buffers of a graph that is compiled for all sizes take those of one for fixed sizes."""

_PACKING = ("Conv", "MatMul")
"""Operators whose kernels read weights in a layout of their own."""
_WIDENING = ("Cast", "DequantizeLinear")
_FLOATS = (FLOAT, FLOAT16)
_SPLIT = ("QLinearConv", "MatMulIntegerToFloat")
"""Operators that it leaves to ONNX Runtime, in pieces of a graph that the estimate does not know."""


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """How OpenVINO compiles graphs."""

    compute: str
    """What they compute in: f32, bf16 or f16."""
    kept: bool = True
    """Whether a compiled graph is kept on disk, and opened from there: its constants then leave memory."""


def check_predictable(device: str) -> None:
    """Raise UnsupportedGraph for a device of OpenVINO's that is not its CPU device: how much they take is not known."""
    name = DeviceName.parse(device)
    kind = hardware_kind(choose_adapter(name).ep_device) if isinstance(name.adapter, int) else name.adapter
    if name.base == "openvino" and kind not in (None, "cpu"):
        raise UnsupportedGraph("only OpenVINO's CPU device has been measured")


def compiled_footprint(stage: Stage, inputs: Mapping[str, TensorInfo], how: Compilation) -> Footprint:
    """Estimate the footprint of a stage that OpenVINO compiles; raises as `footprint` does.

    The buffers of its values are a part of ``activations``, though they stay for as long as it is open.
    """
    if any(node.op in _SPLIT for node in stage.nodes):
        raise UnsupportedGraph("it computes in int8 by operators that OpenVINO does not take")
    sources = {node.outputs[0]: node.inputs[0] for node in stage.nodes if node.op in _WIDENING}
    taken = _weight_bytes(stage, sources, how.compute)
    own = taken.packed + NODE_BYTES * len(stage.nodes)
    mapped = taken.mapped if can_unmap() else 0
    constants = taken.constants - mapped  # what stays of them
    values = {**inputs, **{name: weight_info(each) for name, each in stage.weights.items()}}
    folded = {name for name, source in sources.items() if source in stage.weights}
    peak, _ = trace_buffers(stage.nodes, values, stage.outputs, folded, _no_workspace)
    return replace(
        footprint(stage, inputs),
        weights=own if how.kept else constants + own,
        opening=constants + min(mapped, MAPPED_BYTES) + taken.read + own,
        shared=0 if how.kept or can_unmap() else taken.mapped,
        prepacked=0,
        mmapped=0,
        fragmentation=0,
        activations=peak * COMPUTE_BYTES[how.compute] // COMPUTE_BYTES["f32"],
    )


@dataclass(frozen=True, kw_only=True)
class _WeightBytes:
    """Bytes of a graph's weights: as its constants, packed for kernels, mapped from their file, read to be folded."""

    constants: int
    packed: int
    mapped: int
    read: int


def _weight_bytes(stage: Stage, sources: Mapping[str, str], compute: str) -> _WeightBytes:
    """What the weights take; ``sources`` has what is cast or dequantized, by the outputs."""
    size, widest = COMPUTE_BYTES[compute], COMPUTE_BYTES["f32"]
    packing = {sources.get(name, name) for node in stage.nodes if node.op in _PACKING for name in node.inputs}
    widened = _widened(stage, sources)
    constants = packed = mapped = read = 0
    for name, weight in stage.weights.items():
        count, is_float = prod(weight.shape), weight.data_type in _FLOATS
        constant = size * count if is_float and name in packing else widest * count
        constant = constant if is_float or name in widened else weight.length
        constants += constant
        packed += (size * count if is_float or name in widened else weight.length) if name in packing else 0
        is_cast = is_float and name in packing and compute == "bf16"  # to a file, see `graphs.bfloat16_weights`
        as_stored = is_cast or (weight.data_type != FLOAT16 and constant == weight.length)
        mapped += constant if as_stored else 0
        read += weight.length if weight.data_type == FLOAT and not as_stored else 0
    return _WeightBytes(constants=constants, packed=packed, mapped=mapped, read=read)


def _widened(stage: Stage, sources: Mapping[str, str]) -> set[str]:
    """The dequantized weights of convolutions whose inputs are not: they become float32 in the graph."""
    quantized = {name for name, source in sources.items() if source not in stage.weights}
    convs = (node.inputs[:2] for node in stage.nodes if node.op == "Conv")
    kernels = {sources[kernel] for x, kernel in convs if kernel in sources and x not in quantized}
    return {name for name in kernels & stage.weights.keys() if stage.weights[name].data_type not in _FLOATS}


def _no_workspace(_node: Node, _dying: Collection[str]) -> int:
    """Its kernels work in registers and caches."""
    return 0
