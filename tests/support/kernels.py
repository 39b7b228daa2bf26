"""Which nodes of a graph an execution provider of ONNX Runtime has kernels for, without the provider.

Two tables: data/kernels.json (operators, versions and types; see bench/kernel_table.py) and `_RULES`, what kernels ask
for beyond them, read in ONNX Runtime's source.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import chain, repeat
from pathlib import Path

import onnx
import onnx_ir as ir

TABLE = json.loads(Path(__file__).parents[1].joinpath("data/kernels.json").read_text(encoding="utf-8"))
CPU, CUDA, DIRECTML, WEBGPU = (
    "CPUExecutionProvider",
    "CUDAExecutionProvider",
    "DmlExecutionProvider",
    "WebGpuExecutionProvider",
)
OLDEST, NEWEST = ({name: list(releases)[index] for name, releases in TABLE["kernels"].items()} for index in (0, -1))
"""The releases of each provider in the table."""
CONTRIB = "com.microsoft"
_SMALL = 64
"""Elements of a constant that a node may read on the CPU."""
_CUDA_SPLIT_GELU = (2560, 5120, 6144, 10240, 12288)

Types = dict[ir.Value, str]


@dataclass(kw_only=True)
class Assignment:
    """Where a session of one provider, with the CPU's behind it, puts a graph's nodes."""

    missing: list[str] = field(default_factory=list)
    """Nodes that compute and have no kernel there."""
    on_cpu: list[str] = field(default_factory=list)
    """Nodes that have no kernel there, and compute with token ids or sizes alone."""
    of_sizes: list[str] = field(default_factory=list)
    """Nodes that have one and compute with those alone: ONNX Runtime prefers the CPU for most of them."""
    broken: list[str] = field(default_factory=list)
    """Nodes that have a kernel there which refuses them."""


def assign(model: ir.Model, provider: str, release: str | None = None) -> Assignment:
    """Assign a graph's nodes to a provider of a release, the newest in the table unless given."""
    operators = TABLE["kernels"][provider][release or NEWEST[provider]]
    found, (types, nodes) = Assignment(), _bind(model)
    for node, bound, since, from_integers in nodes:
        shown = f"{_key(node)} ({', '.join(types[each] for each in node.inputs if each is not None)})"
        shown += f" in '{node.metadata_props.get('stage', '')}'"
        if not any(_takes(kernel, bound, since) for kernel in operators.get(_key(node), ())):
            (found.on_cpu if from_integers else found.missing).append(shown)
        elif from_integers:
            found.of_sizes.append(shown)
        found.broken += [f"{shown}: {why}" for rule in _RULES.get(provider, ()) if (why := rule(node, types))]
    return found


@lru_cache(maxsize=1)
def _bind(model: ir.Model) -> tuple[Types, list[tuple[ir.Node, Mapping[str, str], int, bool]]]:
    """The types of a graph's values; its nodes with the types of their parameters, their operator's version, and
    whether they compute with token ids and sizes alone.
    """
    opset, integers, nodes = model.graph.opset_imports[""], set[ir.Value](), []
    types = {value: type_name(value) for value in chain(model.graph.inputs, model.graph.initializers.values())}
    integers.update(value for value in model.graph.inputs if types[value] in ("int64", "int32", "bool"))
    for node in model.graph:
        from_integers = node.op_type == "Shape" or _reads_integers(node, integers)
        if from_integers:
            integers.update(node.outputs)
        nodes.append((node, bind_types(node, types, opset), _since(node, opset), from_integers))
    return types, nodes


def bind_types(node: ir.Node, types: Types, opset: int) -> Mapping[str, str]:
    """Bind the parameters of a node's schema to types, and add those of its outputs; a conflict is a ValueError."""
    inputs, outputs, constants = _signature(_key(node), opset)
    bound: dict[str, str] = {}
    for (name, parameter), value in zip(inputs, node.inputs, strict=False):
        if value is None:
            continue
        for key in {name, parameter}:
            if bound.setdefault(key, types[value]) != types[value]:
                raise ValueError(f"{_key(node)}: {key} is {bound[key]} and, in '{value.name}', {types[value]}")
    bound |= {key: kind for key, kind in constants.items() if key not in bound}
    if node.op_type == "Cast":
        bound["T2"] = _NAMES[ir.DataType(node.attributes["to"].as_int())]
    for (_, parameter), value in zip(outputs, node.outputs, strict=False):
        types[value] = bound.get(parameter, parameter.removeprefix("tensor(").removesuffix(")"))
    return bound


@cache
def _signature(key: str, opset: int) -> tuple[Sequence[tuple[str, str]], Sequence[tuple[str, str]], Mapping[str, str]]:
    """Names and type parameters of an operator's inputs and outputs, and the parameters that have one type alone."""
    if key in TABLE["parameters"]:
        row = TABLE["parameters"][key]
        return *([(each, each) for each in row[side].split()] for side in ("inputs", "outputs")), {}
    schema = onnx.defs.get_schema(key, opset)
    inputs = [(each.name, each.type_str) for each in schema.inputs]
    if schema.inputs and schema.inputs[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic:
        inputs += repeat(inputs[-1], 99)
    outputs = [(each.name, each.type_str) for each in schema.outputs]
    if schema.outputs[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic:
        outputs += repeat(outputs[-1], 99)
    only = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
    return inputs, outputs, {key: kinds[0][7:-1] for key, kinds in only.items() if len(kinds) == 1}


@cache
def _parsed(kernel: str) -> tuple[int, int | None, Mapping[str, frozenset[str]]]:
    versions, *types = kernel.split()
    first, _, last = versions.rstrip("+").partition("-")
    until = None if versions.endswith("+") else int(last or first)
    return int(first), until, {key: frozenset(kinds.split(",")) for key, kinds in (each.split("=") for each in types)}


def _takes(kernel: str, bound: Mapping[str, str], since: int) -> bool:
    """Whether a kernel takes a node; one without a last version is for its own version alone."""
    first, last, types = _parsed(kernel)
    in_range = first == since or (last is not None and first < since <= last)
    return in_range and all(bound[key] in kinds for key, kinds in types.items() if key in bound)


def _since(node: ir.Node, opset: int) -> int:
    return 1 if node.domain else _schema_version(node.op_type, opset)


@cache
def _schema_version(op_type: str, opset: int) -> int:
    return onnx.defs.get_schema(op_type, opset).since_version


def _reads_integers(node: ir.Node, integers: set[ir.Value]) -> bool:
    """Whether a node computes with token ids, sizes and small constants alone."""
    values = [each for each in node.inputs if each is not None]
    constants = [each for each in values if each.const_value is not None]
    return len(constants) < len(values) and all(
        each in integers or (each in constants and each.const_value.size <= _SMALL) for each in values
    )


def _key(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}".lstrip(".")


def type_name(value: ir.Value) -> str:
    """The element type of an input or initializer, in the table's words."""
    dtype = value.dtype if value.const_value is None else value.const_value.dtype
    return _NAMES[ir.DataType(dtype)]


_NAMES = {
    ir.DataType.FLOAT: "float",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.INT4: "int4",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8",
    ir.DataType.INT32: "int32",
    ir.DataType.INT64: "int64",
    ir.DataType.BOOL: "bool",
}


def casts_of_weights(model: ir.Model) -> list[str]:
    """The casts of matrices and kernels, of which a graph made for a device has none: they are stored as it uses them.

    The vectors of a norm over tiles are cast when a session loads.
    """
    return [
        str(node.inputs[0].name)
        for node in model.graph
        if node.op_type == "Cast" and (weight := node.inputs[0].const_value) is not None and len(weight.shape) > 1
    ]


def _last(value: ir.Value | None) -> int:
    """The size of a value's last axis."""
    size = value.shape[-1] if value is not None and value.shape is not None else None
    if not isinstance(size, int):
        raise TypeError(f"'{value and value.name}' has no known last axis")
    return size


def _attribute(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _cuda_group_norm(node: ir.Node, types: Types) -> str | None:
    """contrib_ops/cuda/diffusion/group_norm.cc and group_norm_impl.cu."""
    if node.op_type != "GroupNorm":
        return None
    groups, channels = node.attributes["groups"].as_int(), _last(node.inputs[1])
    if _attribute(node, "channels_last", 1) != 1:
        return "only the layout (N, H, W, C)"
    if {types[each] for each in node.inputs[1:3]} != {"float"}:
        return "gamma and beta are float32"
    if channels % groups or channels // groups % 2 or channels // groups > 512:
        return f"{channels} channels in {groups} groups: an even number of at most 512 in each"
    return None


def _cuda_bias_split_gelu(node: ir.Node, _types: Types) -> str | None:
    """contrib_ops/cuda/diffusion/bias_split_gelu.cc."""
    wrong = node.op_type == "BiasSplitGelu" and _last(node.inputs[1]) not in _CUDA_SPLIT_GELU
    return f"a width of {_last(node.inputs[1])}, not one of {_CUDA_SPLIT_GELU}" if wrong else None


def _cuda_nhwc_conv(node: ir.Node, _types: Types) -> str | None:
    """NhwcConvNeedFallbackToCPU in core/providers/cuda/cuda_execution_provider.cc."""
    if node.op_type != "NhwcConv":
        return None
    weight = node.inputs[1]
    return None if weight is not None and weight.const_value is not None else "the weight is not a constant"


def _unpacked(node: ir.Node, _types: Types) -> str | None:
    """Packed queries, keys and values have kernels on CUDA and DirectML alone."""
    wrong = node.op_type == "MultiHeadAttention" and None in (_input(node, 1), _input(node, 2))
    return "queries, keys and values are packed" if wrong else None


def _directml_attention(node: ir.Node, _types: Types) -> str | None:
    """DmlOperatorMultiHeadAttention.cpp."""
    if node.op_type != "MultiHeadAttention":
        return None
    if _attribute(node, "unidirectional", 0):
        return "unidirectional is ignored"
    bias, heads = _input(node, 5), node.attributes["num_heads"].as_int()
    axes = None if bias is None else _axes(bias)
    if axes is not None and (len(axes) != 4 or axes[0] == 1 or axes[1] != heads):
        return f"the attention bias {axes} is not (batch, {heads} heads, S, T)"
    return None


def _axes(value: ir.Value) -> list[int | None]:
    """The sizes of a value's axes, of what `Expand` makes by the sizes it is given; None where a size is dynamic."""
    node = value.producer()
    if node is None or node.op_type != "Expand":
        return [] if value.shape is None else [axis if isinstance(axis, int) else None for axis in value.shape]
    concat = node.inputs[1] and node.inputs[1].producer()
    parts = node.inputs[1:] if concat is None else concat.inputs
    return [
        size
        for part in parts
        if part is not None
        for size in ([None] if part.const_value is None else part.const_value.numpy().tolist())
    ]


def _directml_opset(node: ir.Node, _types: Types) -> str | None:
    """DirectML 1.15.2 is documented up to opset 20."""
    graph = node.graph
    assert graph is not None
    opset = graph.opset_imports[""]
    return f"opset {opset} is above 20" if node is graph[0] and opset > 20 else None


def _webgpu_attention(node: ir.Node, types: Types) -> str | None:
    """contrib_ops/webgpu/bert/flash_attention.cc: 128 bytes of workgroup storage for each float32 of a head."""
    if node.op_type != "MultiHeadAttention":
        return None
    size = _last(node.inputs[0]) // node.attributes["num_heads"].as_int()
    limit = 256 if types[node.inputs[0]] == "float" else 512
    return f"heads of {size}: at most {limit} fit" if size > limit else None


_RULES: Mapping[str, Sequence[Callable[[ir.Node, Types], str | None]]] = {
    CUDA: (_cuda_group_norm, _cuda_bias_split_gelu, _cuda_nhwc_conv),
    DIRECTML: (_directml_attention, _directml_opset),
    WEBGPU: (_unpacked, _webgpu_attention),
    CPU: (_unpacked,),
}
