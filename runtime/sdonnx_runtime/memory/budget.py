"""The memory budget of a pipeline: what was asked for, and the plan that keeps it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf

from sdonnx_runtime.errors import DeviceError, RequestError
from sdonnx_runtime.execution.arena import PROCESS_MEMORY
from sdonnx_runtime.execution.devices.table import base_name
from sdonnx_runtime.execution.process_memory import available_memory, resident_memory, unmap_code
from sdonnx_runtime.execution.strategy import MIN_MEMORY, ExecutionPlan, ExecutionStrategy
from sdonnx_runtime.graphs.shape_inference import UnsupportedGraph
from sdonnx_runtime.memory.constants import FREE_SHARE, LASTING_BYTES, PROCESS_BYTES
from sdonnx_runtime.memory.openvino import LIBRARY_BYTES, Compilation, check_predictable
from sdonnx_runtime.memory.planner import MemoryPhase, Plan, make_plan

AUTO, MAX, MIN = "auto", "max", "min"
"""The free memory; all components kept loaded; the least that is possible."""

LESS_ON_CPU = "the CPU takes less memory"
"""Why ``auto`` leaves out openvino where the least memory is asked for."""

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
        held: int = 0, device: str = "cpu", compiled: Compilation | None = None, runs_on_cpu: bool = True,
    ) -> Plan | None:  # fmt: skip
        """Make the plan of a request; None if nothing needs restricting, or nothing can be predicted.

        Args:
            phases: returns those of the request.
            upper_bound: bytes that it certainly does not exceed.
            name: the package's.
            always: whether a plan is made if nothing needs restricting.
            held: the bytes of components that are loaded now.
            device: what runs it.
            compiled: how openvino compiles it; None plans for ONNX Runtime's CPU provider.
            runs_on_cpu: whether a refusal for openvino says in how much memory the CPU can do it.

        Raises:
            RequestError: the budget is too small, or the memory can't be predicted.
            DeviceError: too little memory is free.
        """
        plenty = self._is_plenty(upper_bound, held)
        if plenty and not always:
            PROCESS_MEMORY.next_region = int(upper_bound / 4)
            return None
        PROCESS_MEMORY.warm_up()
        unmap_code()
        idle = resident_memory() - held
        base = idle + PROCESS_BYTES - min(PROCESS_MEMORY.growth(idle), LASTING_BYTES)
        budget = inf if plenty else self._room()
        try:
            check_predictable(device)
            plan = self._make_plan(requested := phases(), budget, base, compiled)
        except UnsupportedGraph as error:
            if self.asked in (AUTO, MIN) and not always:
                return None
            raise _unpredictable(name, None if compiled is None else device, error) from None
        if plan.peak <= budget or self.asked == MIN:
            execution = replace(plan.execution, device_limit=self.device_limit, return_buffers=self.asked != MAX)
            return replace(plan, execution=execution)
        on_cpu = make_plan(requested, 0, base).minimum_budget if compiled is not None and runs_on_cpu else inf
        raise self._refusal(plan.minimum_budget, budget, "" if compiled is None else " on openvino", on_cpu)

    def _refusal(self, minimum: int, budget: float, where: str, on_cpu: float) -> RequestError | DeviceError:
        """The error for a budget that is too small; ``on_cpu`` is what the CPU can do it in, if that is less."""
        least, otherwise = _rounded_up(minimum), ""
        if on_cpu < minimum:
            otherwise = f", or use --device cpu, which can do it in {_rounded_up(on_cpu)}MB"
        if self.asked == AUTO:
            return DeviceError(
                f"this needs at least {least} MB of memory{where}; {budget / 1e6:.0f} MB are available; close other "
                f"programs, choose a smaller size, or try it with --memory {least}MB{otherwise}"
            )
        return RequestError(
            f"{self.asked} of memory is too little for this{where}; give {least}MB or more, or choose a smaller size"
            f"{otherwise}"
        )

    def execution(self, plan: Plan | None, upper_bound: float, held: int = 0, device: str = "cpu") -> ExecutionPlan:
        """How components run with a plan, or where `plan` made none; arguments are those of `plan`."""
        if plan is not None:
            return plan.execution
        return replace(self.unplanned(device), keep_loaded=self.keep_loaded and self._is_plenty(upper_bound, held))

    def unplanned(self, device: str = "cpu") -> ExecutionPlan:
        """How components run on a device without a plan."""
        default = MIN_MEMORY if self.asked == MIN else ExecutionStrategy()
        if base_name(device) == "openvino":
            default = replace(default, split_batch=False, staged=False, no_arena=False)
        avoided = {"openvino": LESS_ON_CPU} if self.asked == MIN and device == "auto" else {}
        returned = self.asked != MAX
        return ExecutionPlan(default=default, return_buffers=returned, device_limit=self.device_limit, avoided=avoided)

    def _make_plan(self, phases: Sequence[MemoryPhase], budget: float, base: int, compiled: Compilation | None) -> Plan:
        region = PROCESS_MEMORY.arena_region
        base += 0 if compiled is None else LIBRARY_BYTES
        plan = make_plan(phases, budget, base, region, compiled=compiled)
        if self.asked == MIN or not (self.asked == MAX or self.keep_loaded):
            return plan
        loaded = [loaded for phase in phases for loaded in phase]
        together = replace(
            make_plan([loaded], budget, base, region, compiled=compiled), minimum_budget=plan.minimum_budget
        )
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


def _rounded_up(size: float) -> int:
    """A budget to propose for a size in bytes, in 10**6 bytes."""
    return ceil(size / _STEP) * _STEP // 10**6


def _unpredictable(name: str, device: str | None, error: UnsupportedGraph) -> RequestError:
    """The error for a package whose memory is not known, on a device that compiles its graphs or on the CPU."""
    if device is not None:
        return RequestError(
            f"cannot estimate the memory of {name} on {device}: {error}; give auto, max or min, or use --device cpu"
        )
    return RequestError(
        f"cannot estimate the memory of {name} (not exported by sdonnx); export its checkpoint with "
        "'sdonnx export', or give auto, max or min"
    )
