"""The memory budget of a pipeline: what was asked for, and the plan that keeps it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf

from sdonnx_runtime.errors import DeviceError, RequestError
from sdonnx_runtime.execution.arena import PROCESS_MEMORY
from sdonnx_runtime.execution.process_memory import available_memory, resident_memory, unmap_code
from sdonnx_runtime.execution.strategy import MIN_MEMORY, ExecutionPlan, ExecutionStrategy
from sdonnx_runtime.graphs.shape_inference import UnsupportedGraph
from sdonnx_runtime.memory.constants import FREE_SHARE, PROCESS_BYTES
from sdonnx_runtime.memory.planner import MemoryPhase, Plan, make_plan

AUTO, MAX, MIN = "auto", "max", "min"
"""The free memory; all components kept loaded; the least that is possible."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmg]?i?)b?", re.IGNORECASE | re.ASCII)
_MAX_BYTES = 2**63
_STEP = 10**7  # bytes; a budget that an error proposes is rounded up to a multiple


@dataclass(frozen=True)
class Budget:
    """The memory that a pipeline may use.

    Args:
        asked: bytes, or a size such as 600MB or 2GiB; auto, max or min.
        keep_loaded: components stay loaded between generations where ``asked`` allows it; with max they always do.

    Raises:
        RequestError: it is none of these.
    """

    asked: str | int = AUTO
    keep_loaded: bool = False

    def __post_init__(self) -> None:
        """Check what was asked for."""
        if self.asked not in (AUTO, MAX, MIN):
            self._bytes()

    def plan(
        self, phases: Callable[[], Sequence[MemoryPhase]], upper_bound: float, name: str, *, always: bool = False,
        held: int = 0,
    ) -> Plan | None:  # fmt: skip
        """Make the plan of a request; None if nothing needs restricting, or nothing can be predicted.

        ``phases`` returns those of the request; ``upper_bound`` is bytes that it certainly does not exceed; ``name`` is
        the package's. ``always`` also returns a plan if nothing needs restricting. ``held`` are the bytes of components
        that are loaded now.

        Raises:
            RequestError: the budget is too small, or the package can't be planned for.
            DeviceError: too little memory is free.
        """
        plenty = self._is_plenty(upper_bound, held)
        if plenty and not always:
            PROCESS_MEMORY.next_region = int(upper_bound / 4)
            return None
        PROCESS_MEMORY.warm_up()
        unmap_code()
        base = resident_memory() - held + PROCESS_BYTES
        budget = inf if plenty else self._room()
        try:
            plan = self._make_plan(phases(), budget, base)
        except UnsupportedGraph:
            if self.asked in (AUTO, MIN) and not always:
                return None
            raise RequestError(
                f"cannot estimate the memory of {name} (not exported by sdonnx); export its checkpoint with "
                "'sdonnx export', or give auto, max or min"
            ) from None
        if plan.peak <= budget or self.asked == MIN:
            execution = replace(plan.execution, device_limit=self.device_limit, return_buffers=self.asked != MAX)
            return replace(plan, execution=execution)
        least = -(-plan.minimum_budget // _STEP) * _STEP / 1e6
        if self.asked == AUTO:
            raise DeviceError(
                f"this needs at least {least:.0f} MB of memory; {budget / 1e6:.0f} MB are available; close other "
                f"programs, choose a smaller size, or try it with --memory {least:.0f}MB"
            )
        raise RequestError(
            f"{self.asked} of memory is too little for this; give {least:.0f}MB or more, or choose a smaller size"
        )

    def execution(self, plan: Plan | None, upper_bound: float, held: int = 0) -> ExecutionPlan:
        """How components run with a plan, or where `plan` made none; arguments are those of `plan`."""
        if plan is not None:
            return plan.execution
        return replace(self.unplanned(), keep_loaded=self.keep_loaded and self._is_plenty(upper_bound, held))

    def unplanned(self) -> ExecutionPlan:
        """How components run without a plan."""
        default = MIN_MEMORY if self.asked == MIN else ExecutionStrategy()
        return ExecutionPlan(default=default, return_buffers=self.asked != MAX, device_limit=self.device_limit)

    def _make_plan(self, phases: Sequence[MemoryPhase], budget: float, base: int) -> Plan:
        region = PROCESS_MEMORY.arena_region
        plan = make_plan(phases, budget, base, region)
        if self.asked == MIN or not (self.asked == MAX or self.keep_loaded):
            return plan
        loaded = [loaded for phase in phases for loaded in phase]
        together = replace(make_plan([loaded], budget, base, region), minimum_budget=plan.minimum_budget)
        if self.asked == MAX:
            return together
        if together.peak > budget or any(each.strategy != ExecutionStrategy() for each in together.components):
            return plan
        return replace(together, execution=replace(together.execution, keep_loaded=True))

    def _is_plenty(self, upper_bound: float, held: int) -> bool:
        """Whether nothing needs restricting."""
        if self.asked != AUTO:
            return self.asked == MAX
        free = available_memory()
        return free is None or free + held > upper_bound

    def _room(self) -> float:
        """Bytes for the whole process."""
        if self.asked == AUTO:
            free = available_memory()
            return inf if free is None else int(resident_memory() + FREE_SHARE * free)
        return 0 if self.asked == MIN else self._bytes()

    @property
    def device_limit(self) -> int | None:
        """The limit for a device with memory of its own, in bytes; None is no limit."""
        return None if self.asked in (AUTO, MAX, MIN) else self._bytes()

    def _bytes(self) -> int:
        size = float(self.asked) if type(self.asked) is int and self.asked < _MAX_BYTES else 0.0
        if (match := _SIZE.fullmatch(str(self.asked).strip())) and not isinstance(self.asked, int):
            size = float(match["number"]) * _UNITS[match["unit"].lower()]
        if not 1 <= size < _MAX_BYTES:
            raise RequestError(f"memory is '{self.asked}'; give a size such as 600MB or 2GB, or auto, max or min")
        return int(size)
