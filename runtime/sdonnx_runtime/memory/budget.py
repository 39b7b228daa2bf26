"""How much memory a pipeline may take: what was asked for, what there is, and what is said where it is too little."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf

from sdonnx_runtime.errors import DeviceError, RequestError
from sdonnx_runtime.execution.arena import share_arena, warm_up
from sdonnx_runtime.execution.process_memory import available_memory, resident_memory
from sdonnx_runtime.graphs.shape_inference import UnsupportedGraph
from sdonnx_runtime.memory.planner import MemoryPhase, Plan, make_plan

AUTO, MAX, MIN = "auto", "max", "min"
"""What is free; everything kept loaded; as little as there is a way to."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmg]?i?)b?", re.IGNORECASE)

_AHEAD = 20 << 20
"""What tokenizers, and all that is small, will take."""

_SHARE = 0.9
"""Of what is free."""

_STEP = 10**7
"""Bytes that a budget that is proposed is rounded up to."""


@dataclass(frozen=True)
class Budget:
    """Memory that a pipeline may take.

    Args:
        asked: bytes, or a size such as 600MB or 2GiB; auto, max or min.

    Raises:
        RequestError: it is none of these.
    """

    asked: str | int = AUTO

    def __post_init__(self) -> None:
        """Checks what was asked for."""
        if self.asked not in (AUTO, MAX, MIN):
            self._bytes()

    def plan(
        self, phases: Callable[[], Sequence[MemoryPhase]], enough: float, name: str, *, whole: bool = False
    ) -> Plan | None:
        """The plan for what a request has open; none where all of it may be open and whole, or nothing is known.

        Args:
            phases: gives that.
            enough: bytes that are certainly no less than it takes as a whole.
            name: the package's.
            whole: gives the plan in that case too.

        Raises:
            RequestError: the budget is too small, or what another program exported is to keep to one.
            DeviceError: what is free is too little.
        """
        free = available_memory() if self.asked == AUTO else None
        plenty = self.asked == MAX or (self.asked == AUTO and (free is None or free > enough))
        if plenty and not whole:
            share_arena(enough / 4)
            return None
        warm_up()
        base = resident_memory() + _AHEAD
        budget = inf if plenty else self._room(free)
        try:
            found = self._made(phases(), budget, base)
        except UnsupportedGraph:
            if self.asked in (AUTO, MIN) and not whole:
                return None
            raise RequestError(
                f"what {name} takes of memory can't be told, for its graphs are of another program; export its "
                "checkpoint with 'sdonnx export', or give auto, max or min"
            ) from None
        if found.peak <= budget or self.asked == MIN:
            share_arena(1.5 * found.arena)  # or what came to lie in pieces would need another, larger region
            return found
        least = -(-found.least // _STEP) * _STEP / 1e6
        if self.asked == AUTO:
            raise DeviceError(
                f"{budget / 1e6:.0f} MB of memory are there, and this takes {least:.0f} MB at least; close other "
                f"programs, choose a smaller size, or try it with --memory {least:.0f}MB"
            )
        raise RequestError(
            f"{self.asked} of memory is too little for this; give {least:.0f}MB or more, or choose a smaller size"
        )

    def _made(self, phases: Sequence[MemoryPhase], budget: float, base: int) -> Plan:
        alone = make_plan(phases, budget, base)
        if self.asked != MAX:
            return alone
        together = [part for phase in phases for part in phase]
        return replace(make_plan([together], budget, base), least=alone.least)

    def _room(self, free: int | None) -> int:
        """Bytes for the whole process."""
        return int(resident_memory() + _SHARE * free) if free is not None else 0 if self.asked == MIN else self._bytes()

    def bytes_of_device(self) -> int | None:
        """The limit for a device with memory of its own, in bytes; None without one."""
        return None if self.asked in (AUTO, MAX, MIN) else self._bytes()

    def _bytes(self) -> int:
        if isinstance(self.asked, int) and self.asked > 0:
            return self.asked
        match = _SIZE.fullmatch(str(self.asked).strip())
        if match is None or float(match["number"]) <= 0 or isinstance(self.asked, int):
            raise RequestError(f"memory is '{self.asked}'; give a size such as 600MB or 2GB, or auto, max or min")
        return int(float(match["number"]) * _UNITS[match["unit"].lower()])
