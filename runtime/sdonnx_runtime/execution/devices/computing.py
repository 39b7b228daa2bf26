"""What a device computes in: float32, or a type of 16 bits where it has instructions for one."""

from collections.abc import Iterable

from sdonnx_runtime.errors import DeviceError, RequestError
from sdonnx_runtime.execution.devices.adapters import choose_adapter
from sdonnx_runtime.execution.devices.table import DeviceName

COMPUTES = ("auto", "f32", "bf16", "f16")
"""What can be asked for."""

TYPES = ("f32", "f16", "bf16")
"""What can be computed in, from the finest to the coarsest."""

_CAPABILITIES = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}
"""OpenVINO's names of types in OPTIMIZATION_CAPABILITIES, which a device lists where it has instructions for them."""

_FASTEST_FIRST = {"CPU": ("bf16", "f32", "f16"), "GPU": ("f16", "f32", "bf16"), "NPU": ("f16", "bf16", "f32")}
"""By type of hardware; the first that it has is OpenVINO's own choice."""


def check_compute(compute: str) -> None:
    """Raise RequestError if there is no such arithmetic."""
    if compute not in COMPUTES:
        raise RequestError(f"compute is {compute!r}; choose {', '.join(COMPUTES)}")


def resolve_compute(device: str, compute: str = "auto", graph_compute: str = "f32") -> str:
    """What a device computes in: f32, bf16 or f16.

    Args:
        device: the name of a device, not auto.
        compute: what is asked for, one of COMPUTES.
        graph_compute: what the graph is written to compute in; only a device that `chooses_compute` uses another type.

    Raises:
        RequestError: there is no such arithmetic.
        DeviceError: the device does not compute so, or can't be used here.
    """
    check_compute(compute)
    offered = computes(device, graph_compute)
    if compute in ("auto", offered[0]):
        return offered[0]
    if compute not in offered:
        remedy = _remedy(device, compute, graph_compute)
        raise DeviceError(f"device '{device}' computes in {' or '.join(offered)}, not in {compute}; {remedy}")
    return compute


def computes(device: str, graph_compute: str) -> tuple[str, ...]:
    """What a device can compute in, as of `resolve_compute`; first what it does if nothing is asked for."""
    name = DeviceName.parse(device)
    if not name.device.chooses_compute:
        return (graph_compute,)
    adapter = choose_adapter(name).ep_device
    listed = "" if adapter is None else adapter.ep_metadata.get("OPTIMIZATION_CAPABILITIES", "")
    kind = "CPU" if adapter is None else adapter.device.type.name
    has = set(listed.split())
    return tuple(each for each in _FASTEST_FIRST[kind] if _CAPABILITIES[each] in has) or ("f32",)


def coarsest(computed: Iterable[str]) -> str:
    """The type of the fewest bits of mantissa; f32 of none."""
    return max(computed, key=TYPES.index, default=TYPES[0])


def _remedy(device: str, compute: str, graph_compute: str) -> str:
    name = DeviceName.parse(device)
    if name.device.chooses_compute:
        return f"use --compute {computes(device, graph_compute)[0]}"
    if compute == "f32":
        return f"use --compute {graph_compute}, or export the package with --precision fp32"
    return f"use --compute {graph_compute}" + (" or --device openvino" if graph_compute == "f32" else "")
