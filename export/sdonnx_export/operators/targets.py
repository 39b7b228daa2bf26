"""Targets: the operators that the graphs of each are written in."""

from collections.abc import Callable, Mapping, Set
from functools import partial

from sdonnx_runtime.errors import ExportError

from sdonnx_export.operators.base import Operators
from sdonnx_export.operators.cuda import CudaOperators
from sdonnx_export.operators.directml import DirectMlOperators
from sdonnx_export.operators.int8 import Int8Operators
from sdonnx_export.operators.openvino import OpenVinoOperators
from sdonnx_export.operators.precision import Precision
from sdonnx_export.operators.stored import FLOAT, FLOAT16
from sdonnx_export.operators.webgpu import WebGpuOperators

OPERATORS: Mapping[str, type[Operators]] = {
    "generic": Operators,
    "cuda": CudaOperators,
    "directml": DirectMlOperators,
    "openvino": OpenVinoOperators,
    "webgpu": WebGpuOperators,
}
"""By target, a name of TARGETS."""

INT8_OPERATORS: Mapping[str, Callable[..., Operators]] = {"generic": Int8Operators, "openvino": OpenVinoOperators}
"""By target, those of graphs with int8 layers, which take ranges of activations; other targets have no such layers."""

_FLOATING: tuple[Precision, ...] = ("fp32", "fp16")


def find_operators(target: str, precisions: Set[Precision]) -> Callable[..., Operators]:
    """Return what makes the operators of a target for layers of these precisions.

    Raises:
        ExportError: the target does not support one of them.
    """
    if target in INT8_OPERATORS:
        return OPERATORS[target]
    other = next((each for each in precisions if each not in _FLOATING), None)
    if other is not None:
        raise ExportError(
            f"precision '{other}' is made for the CPU, and target '{target}' supports fp16 and fp32; "
            f"choose one of these, or use --target {' or '.join(INT8_OPERATORS)}"
        )
    return partial(OPERATORS[target], dtype=FLOAT16 if "fp16" in precisions else FLOAT)
