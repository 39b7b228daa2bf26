"""Choose what runs a request by the memory that it takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from sdonnx_runtime.errors import DeviceError, RequestError
from sdonnx_runtime.execution.devices.choosing import avoided_devices, describe_graph, first_choice
from sdonnx_runtime.execution.devices.computing import resolve_compute
from sdonnx_runtime.execution.devices.table import DEVICES, base_name
from sdonnx_runtime.execution.ort import is_installed, is_loaded
from sdonnx_runtime.memory.budget import AUTO, LESS_ON_CPU, MAX, MIN, Budget
from sdonnx_runtime.memory.openvino import Compilation
from sdonnx_runtime.memory.planner import MemoryPhase, Plan
from sdonnx_runtime.packages.package import Package

_COMPILER = "openvino"
"""The device that takes memory of the process in its own way."""

_COPIES = {"f32": 8, "bf16": 4, "f16": 4}
"""By what it computes in: a U-Net and its DeepCache graph, each for two sizes of inputs. Each session may have int8
weights in the type that it computes in, twice: as constants, and in the layouts of its kernels."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What was asked for to run a package."""

    packages: tuple[Package, ...]
    """The package, and those whose components it runs."""
    device: str
    """auto, or the name of a device."""
    compute: str
    """What it is to compute in, one of COMPUTES."""
    cache: bool
    """Whether compiled graphs are kept on disk."""

    def copies(self, budget: Budget) -> int:
        """How many times the memory of ONNX Runtime's CPU provider its weights take at most."""
        if budget.asked not in (AUTO, MAX) and self._may_take_openvino and not is_loaded(DEVICES[_COMPILER]):
            return max(_COPIES.values())
        compute = self._openvino_computes_in()
        return 1 if compute is None else _COPIES[compute]

    def plan(
        self, budget: Budget, phases: Callable[[], Sequence[MemoryPhase]], upper_bound: float, *, always: bool = False,
        held: int = 0,
    ) -> Plan | None:  # fmt: skip
        """Make the plan of a request, as `Budget.plan` does; where memory is short, ``auto`` leaves out openvino."""
        plan = partial(budget.plan, phases, upper_bound, self.packages[0].name, held=held)
        if not self._chooses:
            compute, device = self._openvino_computes_in(), _COMPILER if self.device == "auto" else self.device
            if compute is None:
                return plan(always=always)
            on_cpu = self._runs_on_cpu
            return plan(always=always, device=device, compiled=self._compilation(compute), runs_on_cpu=on_cpu)
        if not self._may_take_openvino:
            return plan(always=always)
        if budget.asked == MIN:
            return _without_openvino(plan(always=always), LESS_ON_CPU)
        try:
            if budget.asked not in (AUTO, MAX) and not is_loaded(DEVICES[_COMPILER]):
                least = "f32" if self.compute == "f32" else "bf16"
                plan(always=always, device=_COMPILER, compiled=self._compilation(least), runs_on_cpu=False)
            if (compute := self._openvino_computes_in()) is not None:
                how = self._compilation(compute)
                return plan(always=always, device=_COMPILER, compiled=how, runs_on_cpu=False)
        except (DeviceError, RequestError) as refused:
            return _without_openvino(plan(always=True), str(refused).partition(";")[0])
        return plan(always=always)

    def _compilation(self, compute: str) -> Compilation:
        return Compilation(compute=compute, kept=self.cache)

    @property
    def _chooses(self) -> bool:
        """Whether there is a choice between openvino, if it is here, and ONNX Runtime's CPU provider."""
        return self.device == "auto" and self._runs_on_cpu

    @property
    def _may_take_openvino(self) -> bool:
        """Whether there is that choice, as far as is known without loading openvino's plugin, which takes memory."""
        return self._chooses and is_installed(DEVICES[_COMPILER]) and _COMPILER not in avoided_devices(*self.packages)

    @property
    def _runs_on_cpu(self) -> bool:
        """Whether ONNX Runtime's CPU provider runs the packages, and computes so."""
        targets = {each.manifest.target for each in self.packages}
        return self.compute in ("auto", "f32") and targets <= {*DEVICES["cpu"].targets}

    def _openvino_computes_in(self) -> str | None:
        """What openvino computes in, if that is what runs the package, memory apart; else None."""
        if base_name(self.device) == _COMPILER:
            return resolve_compute(self.device, self.compute) if self.compute == "auto" else self.compute
        if self.device != "auto" or not is_installed(DEVICES[_COMPILER]):
            return None
        components = self.packages[0].manifest.components
        graph = describe_graph(self.packages[0], "unet" if "unet" in components else next(iter(components)))
        graph["avoided"] = avoided_devices(*self.packages)
        name, compute = first_choice("auto", compute=self.compute, **graph)
        return compute if name == _COMPILER else None


def _without_openvino(plan: Plan | None, reason: str) -> Plan | None:
    """A plan for the CPU that says why; None for graphs that can't be planned for, see `Budget.unplanned`."""
    return None if plan is None else replace(plan, execution=replace(plan.execution, avoided={_COMPILER: reason}))
