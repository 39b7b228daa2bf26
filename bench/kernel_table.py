"""Make tests/data/kernels.json: which operators and types each execution provider of ONNX Runtime has kernels for.

    python bench/kernel_table.py ONNXRUNTIME_1.21 ONNXRUNTIME_NEWEST

Each argument is a checkout or an unpacked source archive of github.com/microsoft/onnxruntime, whose
docs/OperatorKernels.md is generated from the registered kernels of CPU, CUDA and DirectML. WebGPU is not in it:
the plugin onnxruntime-ep-webgpu reports its own kernels, with ONNX Runtime 1.32 or newer and a GPU or a software Vulkan
(with Debian's chromium, LD_LIBRARY_PATH=/usr/lib/chromium and
VK_ICD_FILENAMES=/usr/lib/chromium/vk_swiftshader_icd.json). The table keeps the operators, opsets and types that
sdonnx' graphs have.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

import onnx

TABLE = Path(__file__).parents[1] / "tests/data/kernels.json"
OPSETS = (20, 21)
"""Those of the exported graphs; 21 where weights are of 4 bits."""
CONTRIB = "com.microsoft"
OPERATORS = {
    "": (
        *("Add", "ArgMax", "AveragePool", "Cast", "Concat", "Conv", "Cos", "DepthToSpace", "DequantizeLinear", "Div"),
        *("DynamicQuantizeLinear", "Equal", "Expand", "Gather", "GatherND", "Gelu", "Identity"),
        *("InstanceNormalization", "LayerNormalization", "LeakyRelu", "MatMul", "Mul", "PRelu", "QuantizeLinear"),
        *("ReduceMean", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize", "Shape", "Sigmoid", "Sin"),
        *("Slice", "Softmax", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Tile", "Transpose"),
        *("Unsqueeze", "Where"),
    ),
    CONTRIB: (
        *("BiasSplitGelu", "Gelu", "GroupNorm", "MatMulIntegerToFloat", "MultiHeadAttention", "NhwcConv"),
        *("QLinearConv", "QuickGelu"),
    ),
}
TYPES = ("float", "float16", "int4", "int8", "uint8", "int32", "int64", "bool")

Kernel: TypeAlias = tuple[str, str, str, tuple[int, int | None], dict[str, Sequence[str]]]
"""Provider, domain, operator, first and last version, and types by the name of their parameter."""
Table: TypeAlias = dict[str, dict[str, dict[str, list[str]]]]
"""Kernels as ``versions parameter=types ...``, by provider, release and operator."""


def main(checkouts: Sequence[str]) -> None:
    """Write the table of some releases, and print what is in it."""
    if not checkouts:
        raise SystemExit(__doc__)
    sources: dict[str, str] = {}
    kernels: Table = {}
    for directory in map(Path, checkouts):
        release, text = read_release(directory)
        sources[release] = describe(directory)
        add(kernels, release, parse(text))
    plugin = f"onnxruntime-ep-webgpu {version('onnxruntime-ep-webgpu')}"
    sources[plugin] = f"get_registered_ep_kernel_defs of ONNX Runtime {version('onnxruntime')}"
    add(kernels, plugin, ask_plugin())
    table = {"sources": sources, "opsets": OPSETS, "parameters": contrib_parameters(), "kernels": kernels}
    TABLE.write_text(to_json(table) + "\n", encoding="utf-8")
    for provider, releases in kernels.items():
        print(provider, {release: sum(map(len, found.values())) for release, found in releases.items()})


def read_release(directory: Path) -> tuple[str, str]:
    """Return the version of a source tree, and its table of kernels."""
    release = (directory / "VERSION_NUMBER").read_text(encoding="utf-8").strip()
    return release, (directory / "docs/OperatorKernels.md").read_text(encoding="utf-8")


def describe(directory: Path) -> str:
    """Where the table of a source tree comes from."""
    document = "microsoft/onnxruntime docs/OperatorKernels.md"
    if not (directory / ".git").exists():
        return f"{document}, source archive {directory.resolve().name}"
    command = ["git", "-C", str(directory), "log", "-1", "--format=commit %h of %cs"]
    return f"{document}, {subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()}"


def parse(text: str) -> Iterator[Kernel]:
    """Read docs/OperatorKernels.md; a row without a name is another version of the operator above it."""
    provider = domain = name = ""
    for line in text.splitlines():
        if header := re.match(r"## Operators implemented by (\w+)", line):
            provider, domain = header[1], ""
        elif header := re.match(r"\|\*\*Operator Domain:\*\* \*([\w.]+)\*", line):
            domain = "" if header[1] == "ai.onnx" else header[1]
        elif provider and line.startswith("|") and line.count("|") >= 5:
            cells = line[1:-1].split("|")
            name = cells[0] or name
            if not re.match(r"\[?\d", cells[2]):
                continue
            types = {
                parameter: re.findall(r"tensor\((\w+)\)", listed)
                for parameter, listed in re.findall(r"\*\*(\w+)\*\* = ([^*]*)", cells[3])
            }
            yield provider, domain, name, parse_versions(cells[2]), types


def parse_versions(text: str) -> tuple[int, int | None]:
    """Read ``13+``, ``12`` or ``[7, 12]``."""
    numbers = [int(each) for each in re.findall(r"\d+", text)]
    return numbers[0], None if text.endswith("+") else numbers[-1]


def ask_plugin() -> Iterator[Kernel]:
    """The kernels of the WebGPU plugin."""
    os.environ["ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"] = "1"
    import onnxruntime
    import onnxruntime_ep_webgpu as plugin
    from onnxruntime.capi import onnxruntime_pybind11_state as binding

    provider = plugin.get_ep_name()
    onnxruntime.register_execution_provider_library(provider, plugin.get_library_path())
    for kernel in binding.get_registered_ep_kernel_defs(provider):
        first, last = kernel.version_range
        types = {
            parameter: re.findall(r"tensor\((\w+)\)", " ".join(listed))
            for parameter, listed in kernel.type_constraints.items()
        }
        yield provider, kernel.domain, kernel.op_name, (first, None if last == 2**31 - 1 else last), types


def add(kernels: Table, release: str, found: Iterable[Kernel]) -> None:
    """Add a release's kernels of the operators, opsets and types that sdonnx' graphs have."""
    for provider, domain, name, (first, last), types in found:
        known = name in OPERATORS.get(domain, ())
        if not known or not any(matches(domain, name, first, last, opset) for opset in OPSETS):
            continue
        operators = kernels.setdefault(provider, {}).setdefault(release, {})
        versions = f"{first}+" if last is None else f"{first}-{last}"
        kept = (f"{each}={','.join(kind for kind in TYPES if kind in types[each])}" for each in sorted(types))
        operators.setdefault(f"{domain}.{name}".lstrip("."), []).append(" ".join((versions, *kept)))


def matches(domain: str, name: str, first: int, last: int | None, opset: int) -> bool:
    """Whether ONNX Runtime takes a kernel for a node: one without a last version is for its own version alone."""
    since = 1 if domain else onnx.defs.get_schema(name, opset).since_version
    return first == since or (last is not None and first < since <= last)


def contrib_parameters() -> dict[str, dict[str, str]]:
    """The types' parameters of the inputs and outputs of ONNX Runtime's own operators, as its schemas name them."""
    from onnxruntime.capi import onnxruntime_pybind11_state as binding

    return {
        f"{schema.domain}.{schema.name}": {
            "inputs": " ".join(each.typeStr for each in schema.inputs),
            "outputs": " ".join(each.typeStr for each in schema.outputs),
        }
        for schema in sorted(binding.get_all_operator_schema(), key=lambda each: each.name)
        if schema.name in OPERATORS.get(schema.domain, ()) and schema.domain == CONTRIB
    }


def to_json(table: Mapping[str, object]) -> str:
    """JSON with an operator to a line."""
    text = json.dumps(table, indent=1)
    return re.sub(r"\n {5,}|\n {2,}(?=[\]])", "", text).replace('","', '", "')


if __name__ == "__main__":
    main(sys.argv[1:])
