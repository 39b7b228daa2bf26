"""Runs of a session on a device with memory of its own: inputs that don't change stay there, and outputs on request."""

import logging
from collections.abc import Collection, Container, Mapping
from typing import Any

import numpy as np

from sdonnx_runtime.execution import ort
from sdonnx_runtime.execution.running.device_array import DeviceArray, Tensor, is_frozen

logger = logging.getLogger(__name__)


class DeviceBinding:
    """The IO binding of a session, for all of its runs.

    ONNX Runtime copies an input to the device when it is bound. So an input is bound again only if it is another array
    than in the last run, or one that may have changed: an array counts as unchanged if it is read-only, which costs
    nothing to look at. Comparing or hashing would take longer than the copy.

    Args:
        session: ONNX Runtime's.
        device: a name as in `Session.device`.
        memory: ONNX Runtime's name and index of the device's memory.
    """

    def __init__(self, session: Any, device: str, memory: tuple[str, int]) -> None:
        self._binding, self._session = session.io_binding(), session  # in this order, in which they are freed
        self._device, self._memory = device, memory
        self._keeps: bool | None = None  # until the first run that keeps an output
        self._bound: dict[str, tuple[Tensor, tuple[int, ...]]] = {}

    def run(
        self, given: Mapping[str, Tensor], feeds: Mapping[str, Tensor], outputs: Mapping[str, np.dtype[Any]],
        keep: Container[str], options: Any,
    ) -> list[Tensor]:  # fmt: skip
        """Run the session; returns its outputs, of which those in ``keep`` stay on the device.

        ``feeds`` are the inputs as the graph wants them, ``given`` the arrays that they were made of, ``outputs`` the
        types of the outputs. Where ONNX Runtime can't leave an output in the device's memory, none stays there.
        """
        for name, value in feeds.items():
            self._bind_input(name, given[name], value)
        kept = [] if self._keeps is False else [name for name in outputs if name in keep]
        try:
            values = self._run(outputs, kept, options)
            if kept:
                self._keeps = True
            return values
        except Exception as error:
            if self._keeps or not kept or options.terminate:
                raise
            logger.warning("%s: outputs don't stay on the device: %s", self._device, ort.first_line(error))
            self._keeps = False
        return self._run(outputs, (), options)

    def _run(self, outputs: Mapping[str, np.dtype[Any]], kept: Collection[str], options: Any) -> list[Tensor]:
        try:
            for name in outputs:
                self._binding.bind_output(name, *(self._memory if name in kept else _HOST))
            self._session.run_with_iobinding(self._binding, options)
            values = ort.bound_outputs(self._binding)
        finally:
            self._binding.clear_binding_outputs()  # or the next run would write to them
        pairs = zip(outputs.items(), values, strict=True)
        return [self._kept(value, dtype) if name in kept else value.numpy() for (name, dtype), value in pairs]

    def _bind_input(self, name: str, given: Tensor, value: Tensor) -> None:
        bound, shape = self._bound.pop(name, (None, ()))
        if bound is not given or shape != value.shape:
            if isinstance(value, DeviceArray):
                self._binding.bind_ortvalue_input(name, value.value)
            else:
                self._binding.bind_cpu_input(name, np.asarray(value, order="C"))
        if isinstance(value, DeviceArray) or (not isinstance(given, DeviceArray) and is_frozen(given)):
            self._bound[name] = given, value.shape

    def _kept(self, value: Any, dtype: np.dtype[Any]) -> DeviceArray:
        shape = tuple(value.shape())
        return DeviceArray(value=value, session=self._session, device=self._device, shape=shape, dtype=dtype)


_HOST = ("cpu", 0)
"""ONNX Runtime's name and index of the memory that numpy arrays are in."""
