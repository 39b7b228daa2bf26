"""Sessions of one graph for devices that compile it for fixed sizes."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace

from sdonnx_runtime.execution.devices.opening import Opened, Opening, open_session
from sdonnx_runtime.execution.devices.table import DeviceName
from sdonnx_runtime.execution.process_memory import MAPPINGS
from sdonnx_runtime.execution.running.device_array import Tensor

KEPT = 2
"""Sessions that stay open: guidance on some steps alone alternates between two sizes. Each has the weights anew."""


class SizedSessions:
    """Sessions of one graph, each for fixed sizes of its inputs; they are opened when a run has these sizes.

    Args:
        opening: what is opened.
        shapes: the shapes of the graph's inputs; an axis of a free size has its symbolic name.
        kept: sessions that stay open.
        any_size: lets one session run all sizes, where they change from run to run.
    """

    def __init__(
        self, opening: Opening, shapes: Mapping[str, tuple[int | str | None, ...]], kept: int = KEPT,
        *, any_size: bool = False,
    ) -> None:  # fmt: skip
        self._opening, self._shapes, self._kept = opening, shapes, kept
        self._fixes_sizes = not any_size
        self._open = OrderedDict[tuple[tuple[str, int], ...], Opened]()

    def open_for_any_size(self) -> Opened:
        """Open the graph for all sizes, once; raises as `open_session` does."""
        return open_session(self._opening)

    def find(self, feeds: Mapping[str, Tensor]) -> Opened:
        """The session for the sizes of ``feeds``; raises as `open_session` does."""
        sizes = self._sizes(feeds)
        key = tuple(sorted(sizes.items()))
        if key not in self._open:
            while len(self._open) >= self._kept:
                with MAPPINGS:
                    self._open.popitem(last=False)
            opened = open_session(self._opening, sizes)
            if self._fixes_sizes and not DeviceName.parse(opened.device).device.fixed_sizes:  # what auto came to
                with MAPPINGS:
                    self._open.clear()
                self._fixes_sizes, key = False, ()
            self._open[key] = opened
            self._opening = replace(self._opening, device=opened.device)
        self._open.move_to_end(key)
        return self._open[key]

    def is_open(self, feeds: Mapping[str, Tensor]) -> bool:
        """Whether a session for the sizes of ``feeds`` is open."""
        return tuple(sorted(self._sizes(feeds).items())) in self._open

    def _sizes(self, feeds: Mapping[str, Tensor]) -> dict[str, int]:
        actual = {name: feeds[name].shape for name in self._shapes}
        return free_sizes(self._shapes, actual) if self._fixes_sizes else {}


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
