"""Weights in the memory of a device, for the sessions of all graphs of a component."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.execution import ort
from sdonnx_runtime.graphs.initializers import FLOAT, FLOAT16, Initializer, TensorData
from sdonnx_runtime.graphs.onnx_proto import single_node_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """The memory of a device."""

    name: tuple[str, int]
    """ONNX Runtime's name and index of it."""
    start: Callable[[bytes], Any]
    """Opens a session of an encoded graph on the device."""
    ep_device: Any = None
    """The OrtEpDevice of a plugin; None for a provider that ONNX Runtime was built with."""
    packs_kernels: bool = False
    """As in `Device`: such kernels are not shared, because that would add a copy that no session reads for long."""


_LEAST = 1 << 16
"""Bytes of the smallest weight that is shared; the others are hardly any memory."""


class SharedWeights:
    """The weights of a component on a device: uploaded by the first of its sessions, used in place by all.

    Sessions keep it, so that the weights are freed with the last of them. Without it each graph of a component (plain,
    controlled, caching, …) has all weights of its own. On the CPU that is no different with it: the file is mapped into
    memory once for all sessions, and what each has besides is prepacked by ONNX Runtime, which Python can't share.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, Path, int], tuple[Any, Any]] = {}  # freed before what allocated them
        self._uploaders: dict[int, Any] = {}
        self._works = True

    def add_to(
        self, settings: Any, memory: DeviceMemory, initializers: Mapping[str, Initializer],
        replaced: Mapping[str, TensorData],
    ) -> None:  # fmt: skip
        """Add the weights of a graph to the options of its session; uploads those that no graph had before.

        ``replaced`` are the values that replace those of ``initializers``. Adds none, if ONNX Runtime can't share
        memory of this device.
        """
        try:
            for name, each in initializers.items():
                if not self._works or not _is_shared(each, memory):
                    continue
                key = name, each.file, each.offset
                if key not in self._values:
                    values = replaced[name].data if name in replaced else each.map()
                    self._values[key] = self._upload(np.asarray(values, order="C"), each.data_type, memory)
                settings.add_initializer(name, self._values[key][1])
        except Exception as error:
            self._works = False
            logger.info("%s: each session has weights of its own: %s", memory.name[0], ort.first_line(error))

    def _upload(self, values: AnyArray, data_type: int, memory: DeviceMemory) -> tuple[Any, Any]:
        """Copy a weight to the device; returns what owns its memory, and what sessions take."""
        if data_type not in self._uploaders:
            model = single_node_model("Identity", 1, data_type=data_type, any_shape=True)
            self._uploaders[data_type] = memory.start(model)
        session = self._uploaders[data_type]
        if memory.ep_device is not None:
            owner = ort.upload(values, memory.ep_device)
        else:  # in the arena of the device's sessions; what OrtValue allocates by itself is in another
            binding = session.io_binding()
            binding.bind_cpu_input("x", values)
            binding.bind_output("y", *memory.name)
            session.run_with_iobinding(binding)
            owner = ort.bound_outputs(binding)[0]
        return owner, ort.borrowed(owner, values.dtype, memory.name, session)


def _is_shared(weight: Initializer, memory: DeviceMemory) -> bool:
    if not weight.external or weight.length < _LEAST or weight.data_type not in (FLOAT, FLOAT16):
        return False
    return not memory.packs_kernels or len(weight.shape) != _KERNEL_RANK


_KERNEL_RANK = 4
