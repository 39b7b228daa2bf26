"""Predict the memory of a device that has its own, such as a GPU's: no such device is needed for it.

Weights are exact, activations follow from the shapes of live values; what lies outside both is an estimate.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.execution.devices.table import base_name
from sdonnx_runtime.graphs.onnx_proto import Node
from sdonnx_runtime.graphs.partition import Stage, read_stages
from sdonnx_runtime.graphs.shape_inference import TensorInfo, unsupported_graphs
from sdonnx_runtime.memory.estimates import one_tile
from sdonnx_runtime.memory.footprint import trace_buffers, weight_info
from sdonnx_runtime.memory.planner import LoadedComponent, MemoryPhase

OUTSIDE: Mapping[str, int] = {"cuda": 800_000_000, "directml": 500_000_000, "webgpu": 500_000_000}
"""Bytes beside weights and activations, by device: the driver's context, libraries, workspaces, gaps of the arena.

Estimates: CUDA's is the upper end of the 0.5 to 0.8 GB that are reported of processes with cuBLAS and cuDNN; for the
others nothing is known that could be cited.
"""

_CPU_ONLY = ("DynamicQuantizeLinear", "MatMulIntegerToFloat", "QLinearConv")
"""Operators of int8 arithmetic, for which no device but the CPU has a kernel."""

_INT64 = 7
"""TensorProto.DataType of sizes and ids' constants, which stay with the CPU."""


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """What a component takes of a device's memory, in bytes."""

    component: str
    disk: int
    """Of its graphs and weights on disk, of which a request opens one graph or two."""
    weights: int
    """Of all its graphs that a request opens, which share those that are stored as they are used."""
    activations: int
    """The peak of inputs and live values while it runs."""


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """The predicted memory of a request on a device, in bytes."""

    components: tuple[DeviceMemory, ...]
    outside: int
    """What `OUTSIDE` estimates, contained in both peaks."""
    resident_peak: int
    """Where all components stay loaded: each keeps the buffers of its activations."""
    single_peak: int
    """Where one is loaded after another; a U-Net and its controls are loaded together."""


def plan_device(phases: Sequence[MemoryPhase], device: str) -> DevicePlan:
    """Predict the memory of what a request opens on a device: cuda, directml or webgpu, with or without an index.

    Raises:
        RequestError: there is no such device with memory of its own, or a graph has operators that only the CPU has.
        UnsupportedGraph: a graph was not exported by sdonnx.
        PackageError: a graph is damaged.
    """
    name = base_name(device)
    if name not in OUTSIDE:
        raise RequestError(f"device '{device}' has no memory of its own that is known; choose {', '.join(OUTSIDE)}")
    outside = OUTSIDE[name]
    planned = [[_measure(loaded, device) for loaded in phase] for phase in phases]
    components = {each.component: each for phase in planned for each in phase}.values()
    singles = (sum(each.weights for each in phase) + max(each.activations for each in phase) for phase in planned)
    return DevicePlan(
        components=tuple(components),
        outside=outside,
        resident_peak=outside + sum(each.weights + each.activations for each in components),
        single_peak=outside + max(singles),
    )


def _measure(loaded: LoadedComponent, device: str) -> DeviceMemory:
    weights, peaks = dict[tuple[Path, int], int](), list[int]()
    for graph in loaded.graphs:
        graph = replace(graph, tile_size=loaded.tile_sides[0]) if graph.margin is not None else graph
        (stage,) = read_stages(graph.path, cut=False).stages
        _check_operators(loaded.component, stage, device)
        of_graph, activations = _trace(graph.path, stage, one_tile(graph)[0])
        weights |= of_graph
        peaks.append(activations)
    disk = sum(path.stat().st_size for path in loaded.graphs[0].path.parent.glob("*.onnx*"))
    return DeviceMemory(component=loaded.component, disk=disk, weights=sum(weights.values()), activations=max(peaks))


def _check_operators(component: str, stage: Stage, device: str) -> None:
    if any(node.op in _CPU_ONLY for node in stage.nodes):
        raise RequestError(
            f"the {component} computes in int8, for which {device} has no kernels; export the checkpoint with "
            f"--target {base_name(device)}"
        )


@unsupported_graphs()
def _trace(path: Path, stage: Stage, inputs: Mapping[str, TensorInfo]) -> tuple[dict[tuple[Path, int], int], int]:
    """The bytes of a graph's weights, by where they are in a file, and the peak of its activations.

    A weight that is cast when the graph at ``path`` is opened is that graph's own.
    """
    nodes, values = stage.nodes, {**inputs, **{name: weight_info(each) for name, each in stage.weights.items()}}
    casts = [node for node in nodes if node.op == "Cast" and node.inputs[0] in stage.weights]
    folded = {node.inputs[0]: node.outputs[0] for node in casts}  # when the graph is opened
    peak, _ = trace_buffers(nodes, values, stage.outputs, set(folded.values()), _no_workspace)
    weights = {
        (path if name in folded else each.file, each.offset): values[folded.get(name, name)].nbytes
        for name, each in stage.weights.items()
        if each.data_type != _INT64
    }
    return weights, peak + sum(each.nbytes for each in inputs.values())


def _no_workspace(_node: Node, _dying: Collection[str]) -> int:
    """Workspaces are a part of `OUTSIDE`: they depend on the kernels that a library chooses."""
    return 0
