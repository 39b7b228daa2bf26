"""Arrays in the memory of a device."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.execution import ort


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceArray:
    """An output of a session that stayed in the device's memory; sessions on that device take it as an input.

    It has the shape and type of a numpy array, not its arithmetic: `numpy` copies it.
    """

    value: Any
    """ONNX Runtime's OrtValue."""
    session: Any
    """The session of ONNX Runtime that made it: on WebGPU its memory is the session's."""
    device: str
    """Where it is, a name as in `Session.device`."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def numpy(self) -> AnyArray:
        """Copy it from the device."""
        return ort.read_value(self.value)


Tensor: TypeAlias = AnyArray | DeviceArray
"""An input or output of a graph."""


class _AllNames:
    def __contains__(self, name: object) -> bool:
        return True


ALL_OUTPUTS: Container[str] = _AllNames()
"""The names of a graph's outputs, whatever they are."""


def as_numpy(value: Tensor) -> AnyArray:
    """A tensor as a numpy array, copied from the device if it is there."""
    return value.numpy() if isinstance(value, DeviceArray) else value


def all_numpy(values: Mapping[str, Tensor]) -> dict[str, AnyArray]:
    """Tensors by name, as numpy arrays."""
    return {name: as_numpy(value) for name, value in values.items()}


def last_entries(value: Tensor, count: int) -> Tensor:
    """The last batch entries of a tensor; itself, if it has no more."""
    return value if len(value) <= count else as_numpy(value)[-count:]


def freeze(array: AnyArray) -> AnyArray:
    """Make an array read-only, so that a session need not upload it again; returns it."""
    array.flags.writeable = False
    return array


def is_frozen(array: AnyArray) -> bool:
    """Whether an array is read-only, and all arrays that it is a view of."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        if owner.flags.writeable:
            return False
        owner = owner.base
    return True
