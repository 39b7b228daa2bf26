"""OpenVINO's options for a session."""

import json
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from sdonnx_runtime.execution.devices.adapters import Choice
from sdonnx_runtime.execution.devices.table import DeviceName
from sdonnx_runtime.graphs.initializers import DTYPES, FLOAT, FLOAT16
from sdonnx_runtime.graphs.onnx_proto import Tensor, decode_model, package_errors


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


_MOST_COPIED = 1 / 16
"""The share of a graph's weights that may be copied where nearly all are mapped: biases, norms and scales."""
_CONV_RANK = 4


def maps_weights(path: Path, model: bytes | None, compute: str) -> bool:
    """Whether the CPU device maps nearly all weights of a graph from their file, so that they can leave memory.

    It copies those that it computes with in another type than that of the file, and dequantized weights of
    convolutions whose inputs are not quantized.

    Args:
        path: the ``.onnx`` file.
        model: an encoded graph that replaces the file's.
        compute: f32, bf16 or f16.

    Raises PackageError if the graph is damaged.
    """
    with package_errors(path):
        encoded = path.read_bytes() if model is None else model
        is_quantized = b"QuantizeLinear" in encoded  # DequantizeLinear has another letter
        sizes = Counter[bool]()
        for each in decode_model(memoryview(encoded), nodes=False).initializers.values():
            width = 1 if each.data_type not in DTYPES else np.dtype(DTYPES[each.data_type]).itemsize
            sizes[_is_copied(each, compute, is_quantized=is_quantized)] += prod(each.shape) * width
    return sizes[True] <= _MOST_COPIED * sizes.total()


def _is_copied(tensor: Tensor, compute: str, *, is_quantized: bool) -> bool:
    if tensor.data_type in (FLOAT, FLOAT16):
        return tensor.data_type == FLOAT16 or compute != "f32"
    return tensor.data_type in DTYPES and len(tensor.shape) == _CONV_RANK and not is_quantized
