"""Sessions of one graph for devices that compile it for fixed sizes."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace

from sdonnx_runtime.execution.devices.opening import Opened, Opening, open_session
from sdonnx_runtime.execution.running.device_array import Tensor

_KEPT = 2
"""Sessions that stay open: guidance on some steps alone alternates between two sizes. Each has the weights anew."""


class SizedSessions:
    """Sessions of one graph, each for fixed sizes of its inputs; they are opened when a run has these sizes.

    Args:
        opening: what is opened.
        shapes: the shapes of the graph's inputs; an axis of a free size has its symbolic name.
    """

    def __init__(self, opening: Opening, shapes: Mapping[str, tuple[int | str | None, ...]]) -> None:
        self._opening, self._shapes = opening, shapes
        self._open = OrderedDict[tuple[tuple[str, int], ...], Opened]()

    def find(self, feeds: Mapping[str, Tensor]) -> Opened:
        """The session for the sizes of ``feeds``; raises as `open_session` does."""
        sizes = free_sizes(self._shapes, {name: feeds[name].shape for name in self._shapes})
        key = tuple(sorted(sizes.items()))
        if key not in self._open:
            while len(self._open) >= _KEPT:
                self._open.popitem(last=False)
            self._open[key] = open_session(self._opening, sizes)
            self._opening = replace(self._opening, device=self._open[key].device)
        self._open.move_to_end(key)
        return self._open[key]


def free_sizes(
    shapes: Mapping[str, tuple[int | str | None, ...]], actual: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """The sizes of the free dimensions of a graph's inputs by their names; without those that inputs disagree on."""
    sizes: dict[str, set[int]] = {}
    for name, shape in shapes.items():
        for axis, size in zip(shape, actual[name], strict=False):
            if isinstance(axis, str):
                sizes.setdefault(axis, set()).add(size)
    return {axis: found.pop() for axis, found in sizes.items() if axis and len(found) == 1}
