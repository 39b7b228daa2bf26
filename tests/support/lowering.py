"""Graphs made for a GPU, turned into graphs of ai.onnx and CPU operators in float32, which ONNX Runtime's CPU runs.

ONNX Runtime's own operators are written out by their documented formulas; with ``emulate``, every value that was
float16 is rounded to it, as a kernel that computes in float32 and stores float16 does. Values beyond 65504 become
infinite, as on the device.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from sdonnx_export.checkpoint_model import Checkpoint
from sdonnx_export.models.components import COMPONENTS, build
from sdonnx_export.packaging.writer import hash_files
from sdonnx_runtime.packages.manifest import read_manifest, write_manifest
from sdonnx_runtime.packages.variant import PLAIN

from support.kernels import CONTRIB, bind_types, type_name

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_TO_NCHW, _TO_NHWC = [0, 3, 1, 2], [0, 2, 3, 1]


def lowered(model: ir.Model, *, emulate: bool) -> ir.Model:
    """Return the float32 graph of a model, whose values are rounded to float16 where they were if ``emulate``."""
    return _Lowering(model, emulate=emulate).run()


def lowered_package(package: Path, checkpoint: Checkpoint, output: Path, *, target: str, emulate: bool = True) -> Path:
    """Write the package that ``checkpoint`` gives for a target in fp16, lowered, for the CPU.

    It is ``package``, the checkpoint's generic one, with each component's plain graph in place of all it has.
    """
    shutil.copytree(package, output, ignore=shutil.ignore_patterns("*.onnx*"))
    manifest, components = read_manifest(package), {}
    for name, component in manifest.components.items():
        path = output / component.graphs[PLAIN]
        model = build(name, checkpoint.parts[COMPONENTS[name].part], "fp16", target=target)
        ir.save(lowered(model, emulate=emulate), path, external_data=f"{path.name}_data")
        components[name] = replace(
            component, graphs={PLAIN: component.graphs[PLAIN]}, files=hash_files(output, name), precision="fp32"
        )
    write_manifest(output, replace(manifest, components=components))
    return output


class _Lowering:
    """The values and nodes of a new graph."""

    def __init__(self, model: ir.Model, *, emulate: bool) -> None:
        self._model, self._emulate = model, emulate
        self._values: dict[ir.Value | None, ir.Value | None] = {None: None}
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}

    def run(self) -> ir.Model:
        graph = self._model.graph
        inputs = [self._copy_input(value) for value in graph.inputs]
        for value in graph.initializers.values():
            self._values[value] = self._weight(str(value.name), value.const_value)
        types = {each: type_name(each) for each in (*graph.inputs, *graph.initializers.values())}
        for node in graph:
            bind_types(node, types, graph.opset_imports[""])
            results = self._lower(node)
            for old, new in zip(node.outputs, results, strict=True):
                self._values[old] = self._round(new) if self._emulate and types[old] == "float16" else new
        outputs = [self._name_output(value) for value in graph.outputs]
        made = ir.Graph(
            inputs,
            outputs,
            nodes=self._nodes,
            initializers=[each for each in self._initializers.values() if each.uses()],
            opset_imports=graph.opset_imports,
            name=graph.name,
        )
        return ir.Model(made, ir_version=self._model.ir_version)

    def op(self, op_type: str, *inputs: Any, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; an input that is a list of integers is a constant."""
        values = [self._constant(each) if isinstance(each, list) else each for each in inputs]
        node = ir.node(op_type, values, attributes, domain=domain, num_outputs=outputs)
        self._nodes.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def _lower(self, node: ir.Node) -> Sequence[ir.Value]:
        inputs = [self._values[each] for each in node.inputs]
        rule = _RULES.get((node.domain, node.op_type))
        if rule is not None:
            return [rule(self, node, *inputs)]
        if node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()) == _HALF:
            return [self.op("Cast", *inputs, to=_FLOAT)]
        copy = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs))
        self._nodes.append(copy)
        return copy.outputs

    def _copy_input(self, value: ir.Value) -> ir.Value:
        copy = ir.Value(name=value.name, type=value.type, shape=value.shape)
        self._values[value] = copy
        return copy

    def _weight(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """An initializer, of float16 as float32."""
        if tensor.dtype == _HALF:
            return self.initializer(name, lambda: tensor.numpy().astype(np.float32), tuple(tensor.shape.numpy()))
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self._initializers[name] = value
        return value

    def initializer(self, name: str, read: Callable[[], Any], shape: tuple[int, ...]) -> ir.Value:
        """A float32 initializer, read when it is saved."""
        if name not in self._initializers:
            dims = ir.Shape(shape)
            tensor = ir.LazyTensor(lambda: ir.tensor(read(), name=name), dtype=_FLOAT, shape=dims, name=name)
            self._initializers[name] = ir.Value(name=name, type=ir.TensorType(_FLOAT), shape=dims, const_value=tensor)
        return self._initializers[name]

    def _constant(self, numbers: list[int]) -> ir.Value:
        name = f"constant_{'_'.join(map(str, numbers))}"
        if name not in self._initializers:
            self._weight(name, ir.tensor(np.array(numbers, np.int64), name=name))
        return self._initializers[name]

    def _round(self, value: ir.Value) -> ir.Value:
        return self.op("Cast", self.op("Cast", value, to=_HALF), to=_FLOAT)

    def _name_output(self, old: ir.Value) -> ir.Value:
        new = self.op("Identity", self._values[old])
        new.name, new.type, new.shape = old.name, old.type, old.shape
        return new


def _nhwc_conv(lowering: _Lowering, node: ir.Node, x: ir.Value, weight: ir.Value, *bias: ir.Value | None) -> ir.Value:
    """Conv of (N, H, W, C); the weight is (O, kH, kW, I)."""
    kernel = node.inputs[1].const_value
    shape = tuple(kernel.shape.numpy())
    oihw = lowering.initializer(
        f"{weight.name}_oihw",
        lambda: np.ascontiguousarray(kernel.numpy().astype(np.float32).transpose(_TO_NCHW)),
        tuple(shape[axis] for axis in _TO_NCHW),
    )
    attributes = {name: value.value for name, value in node.attributes.items()}
    y = lowering.op("Conv", lowering.op("Transpose", x, perm=_TO_NCHW), oihw, *bias, **attributes)
    return lowering.op("Transpose", y, perm=_TO_NHWC)


def _group_norm(lowering: _Lowering, node: ir.Node, x: ir.Value, gamma: ir.Value, beta: ir.Value) -> ir.Value:
    """Group normalization, then with ``activation`` x * sigmoid(x)."""
    attributes = {name: value.value for name, value in node.attributes.items()}
    last, groups = attributes.get("channels_last", 1), attributes["groups"]
    x = lowering.op("Transpose", x, perm=_TO_NCHW) if last else x
    ones = lowering.initializer(f"ones_{groups}", lambda: np.ones(groups, np.float32), (groups,))
    zeros = lowering.initializer(f"zeros_{groups}", lambda: np.zeros(groups, np.float32), (groups,))
    grouped = lowering.op("Reshape", x, [0, groups, -1])
    normed = lowering.op("InstanceNormalization", grouped, ones, zeros, epsilon=attributes.get("epsilon", 1e-5))
    y = lowering.op("Reshape", normed, lowering.op("Shape", x))
    scale, shift = (lowering.op("Unsqueeze", each, [1, 2]) for each in (gamma, beta))
    y = lowering.op("Add", lowering.op("Mul", y, scale), shift)
    y = lowering.op("Mul", y, lowering.op("Sigmoid", y)) if attributes["activation"] else y
    return lowering.op("Transpose", y, perm=_TO_NHWC) if last else y


def _bias_split_gelu(lowering: _Lowering, _node: ir.Node, x: ir.Value, bias: ir.Value) -> ir.Value:
    """The left half of ``x + bias`` times the GELU of the right."""
    left, right = lowering.op("Split", lowering.op("Add", x, bias), axis=-1, num_outputs=2, outputs=2)
    return lowering.op("Mul", left, lowering.op("Gelu", right))


_RULES = {
    (CONTRIB, "NhwcConv"): _nhwc_conv,
    (CONTRIB, "GroupNorm"): _group_norm,
    (CONTRIB, "BiasSplitGelu"): _bias_split_gelu,
}
