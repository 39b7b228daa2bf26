"""OpenVINO's options for a session."""

import json
from collections.abc import Mapping
from typing import Any

from sdonnx_runtime.execution.devices.adapters import Choice
from sdonnx_runtime.execution.devices.table import DeviceName


def openvino_device(name: DeviceName, choice: Choice) -> str:
    """OpenVINO's own name of a device: CPU, GPU, NPU, or GPU.1 for the second of several."""
    if choice.ep_device is not None:
        return str(choice.ep_device.ep_metadata["ov_device"])
    return str(name.adapter or name.device.default_kind).upper()


EXACT: Mapping[str, Mapping[str, int]] = {"CPU": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}}
"""By device: without it, the inputs of MatMul with weights in int8 or int4 would be rounded to int8."""


def openvino_options(
    device: str, *, compute: str = "auto", threads: int | None = None, built_in: bool = False
) -> dict[str, str]:
    """Make the provider options for a device of OpenVINO; what is not asked for stays OpenVINO's choice.

    Args:
        device: OpenVINO's name of it.
        compute: auto, f32, bf16 or f16.
        threads: CPU threads, of its CPU device alone.
        built_in: for the provider that ``onnxruntime-openvino`` was built with, which takes the device as an option.
    """
    config: dict[str, Any] = {**EXACT.get(device, {})}
    if compute != "auto":
        config["INFERENCE_PRECISION_HINT"] = compute
    if threads is not None and device == "CPU":
        config["INFERENCE_NUM_THREADS"] = threads
    options = {"device_type": device} if built_in else {}
    by_device = dict.fromkeys((device, device.partition(".")[0]), config)  # of several GPUs, under either name
    return {**options, "load_config": json.dumps(by_device)} if config else options
