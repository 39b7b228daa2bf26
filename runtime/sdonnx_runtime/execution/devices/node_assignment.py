"""Which nodes of a graph a device runs, and which are left to the CPU."""

import logging
import mmap
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from sdonnx_runtime.errors import DeviceError
from sdonnx_runtime.execution.devices.table import DEVICES, DeviceName
from sdonnx_runtime.graphs.onnx_proto import Model, decode_model, package_errors
from sdonnx_runtime.graphs.shape_nodes import shape_nodes

logger = logging.getLogger(__name__)

RECORD = "session.record_ep_graph_assignment_info"
"""ONNX Runtime's option to record it, from 1.24 on."""

_MULTIPLYING = (
    "Attention", "Conv", "ConvInteger", "DynamicQuantizeMatMul", "FusedConv", "FusedMatMul", "Gemm", "MatMul",
    "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "MultiHeadAttention", "NhwcConv", "QGemm", "QLinearConv",
    "QLinearMatMul",
)  # fmt: skip
"""The operators whose arithmetic is nearly all of a graph's, fused and quantized ones included."""

_MAX_SHARE = 0.5
"""The share of these that a device may leave to the CPU: with more of them it is slower than the CPU alone."""


_ADDED = "Gather"
"""What ONNX Runtime adds where it changes a layout: it permutes a shape."""


@dataclass(frozen=True, kw_only=True)
class NodeAssignment:
    """Which nodes of a graph a device runs."""

    on_device: Mapping[str, int]
    """The number of nodes by operator that the device runs."""
    on_cpu: Mapping[str, int]
    """Those that compute and are left to the CPU."""
    shape_nodes: int
    """Nodes that compute shapes, in integers; they are left to the CPU by design."""

    @classmethod
    def read(cls, session: Any, name: DeviceName, path: Path, model: bytes | None) -> "NodeAssignment | None":
        """Read it from a session that was opened with RECORD; None if ONNX Runtime is too old to say."""
        if not hasattr(session, "get_provider_graph_assignment_info"):
            return None
        parts = [
            (each.ep_name, node) for each in session.get_provider_graph_assignment_info() for node in each.get_nodes()
        ]
        on_device = Counter(str(node.op_type) for provider, node in parts if provider == name.device.provider)
        left = [node for provider, node in parts if provider != name.device.provider]
        graph = _decode(path, model) if left else None
        integers = set[tuple[str, str]]() if graph is None else shape_nodes(graph)
        written = set[str]() if graph is None else {node.name for node in graph.nodes}
        integers |= {(node.name, _ADDED) for node in left if node.name not in written}
        computing = Counter(str(node.op_type) for node in left if (node.name, node.op_type) not in integers)
        return cls(on_device=on_device, on_cpu=computing, shape_nodes=len(left) - computing.total())

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> "NodeAssignment | None":
        """What is kept with a compiled graph; None if it isn't there, or not as this version writes it."""
        try:
            return cls(**info["assignment"])
        except (KeyError, TypeError):
            return None

    @property
    def share_on_cpu(self) -> float:
        """The share of the nodes with nearly all of the arithmetic that is left to the CPU."""
        left, run = (sum(each.get(op, 0) for op in _MULTIPLYING) for each in (self.on_cpu, self.on_device))
        return left / max(left + run, 1)

    def describe(self, device: str) -> str:
        """Say it in a line: "1,102 nodes on webgpu, 41 integer shape nodes on the CPU"."""
        text = f"{sum(self.on_device.values()):,} nodes on {device}"
        if self.shape_nodes:
            text += f", {self.shape_nodes:,} integer shape nodes on the CPU"
        return f"{text}; {self.describe_cpu()}" if self.on_cpu else text

    def describe_cpu(self) -> str:
        """Name the nodes that compute on the CPU: "3 compute nodes on the CPU: 2 Gelu, 1 ArgMax"."""
        total, counts = sum(self.on_cpu.values()), Counter(self.on_cpu).most_common()
        nodes = "node" if total == 1 else "nodes"
        return f"{total:,} compute {nodes} on the CPU: {', '.join(f'{count:,} {op}' for op, count in counts)}"


def check_operators(name: DeviceName, path: Path, model: bytes | None) -> None:
    """Raise DeviceError for a graph with operators that a device is known to lack, before it is compiled for long."""
    if not name.device.lacks:
        return
    if model is None:
        with package_errors(path):
            found = path.stat()
        counts = _count_in_file(path, name.device.lacks, (found.st_size, found.st_mtime_ns))
    else:
        counts = _count_operators(path, memoryview(model), name.device.lacks)
    if counts:
        said = ", ".join(f"{count:,} {op}" for op, count in counts.items())
        raise DeviceError(f"{path.parent.name} has {said}, which device '{name}' does not run; {_remedy(name)}")


@lru_cache(maxsize=64)
def _count_in_file(path: Path, operators: frozenset[str], _version: tuple[int, int]) -> Mapping[str, int]:
    """The numbers of a file's nodes of some operators; the weights in it, if it has any, are not read."""
    with package_errors(path), path.open("rb") as file:
        return _count_operators(path, memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), operators)


def _count_operators(path: Path, encoded: memoryview, operators: Collection[str]) -> Mapping[str, int]:
    names = "|".join(operators).encode()
    if len(encoded) < _WITHOUT_WEIGHTS and re.search(names, encoded) is None:  # far faster than to decode it
        return {}
    with package_errors(path):
        return Counter(node.op for node in decode_model(encoded).nodes if node.op in operators)


_WITHOUT_WEIGHTS = 1 << 25
"""Bytes of a graph that has its weights in another file, if it has many."""


def _remedy(name: DeviceName) -> str:
    target = name.device.targets[0]
    if name.device.lacks:
        export = f"--target {target}"
    else:
        export = "--precision fp16" if target == "generic" else f"--target {target} or --precision fp16"
    return f"this graph is made for the CPU: use --device cpu, or export the checkpoint with {export}"


def check_assignment(assignment: NodeAssignment, name: DeviceName, path: Path) -> None:
    """Warn of nodes that a device leaves to the CPU.

    Raises DeviceError if these are most of the graph's arithmetic, as they are of int8 graphs on a GPU: each would be
    copied to the CPU and back, which takes longer than to run all of it there.
    """
    if not assignment.on_cpu:
        return
    said = f"{path.parent.name} on device '{name}': {assignment.describe_cpu()}"
    if assignment.share_on_cpu > _MAX_SHARE:
        raise DeviceError(f"{said}; {_remedy(name)}")
    _warn_once(f"{said}; this is slower than a graph that {DEVICES[name.base].title} runs as a whole")


@cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)  # stages are opened again in each step


def _decode(path: Path, model: bytes | None) -> Model:
    with package_errors(path):
        return decode_model(memoryview(path.read_bytes() if model is None else model))
