"""Choose what runs a request by the memory that it takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from sdonnx_runtime.errors import DeviceError, RequestError
from sdonnx_runtime.execution.devices.choosing import avoided_devices, describe_graph, first_choice
from sdonnx_runtime.execution.devices.computing import compute_of
from sdonnx_runtime.execution.devices.table import DEVICES, base_name
from sdonnx_runtime.execution.ort import is_installed
from sdonnx_runtime.memory.budget import LESS_ON_CPU, MIN, Budget
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

    @property
    def copies(self) -> int:
        """How many times the memory of ONNX Runtime's CPU provider its weights take at most."""
        compute = self._openvino_computes_in()
        return 1 if compute is None else _COPIES[compute]

    def plan(
        self, budget: Budget, phases: Callable[[], Sequence[MemoryPhase]], upper_bound: float, *, always: bool = False,
        held: int = 0,
    ) -> Plan | None:  # fmt: skip
        """Make the plan of a request, as `Budget.plan` does; where memory is short, ``auto`` leaves out openvino."""
        plan = partial(budget.plan, phases, upper_bound, self.packages[0].name, held=held)
        compute = self._openvino_computes_in()
        if compute is None:
            return plan(always=always)
        plan_openvino = partial(plan, always=always, compiled=Compilation(compute=compute, kept=self.cache))
        if self.device != "auto" or not self._runs_on_cpu:
            device = _COMPILER if self.device == "auto" else self.device
            return plan_openvino(device=device, runs_on_cpu=self._runs_on_cpu)
        if budget.asked == MIN:
            return _without_openvino(plan(always=always), LESS_ON_CPU)
        try:
            return plan_openvino(device=_COMPILER)
        except (DeviceError, RequestError) as refused:
            return _without_openvino(plan(always=True), str(refused).partition(";")[0])

    @property
    def _runs_on_cpu(self) -> bool:
        """Whether ONNX Runtime's CPU provider runs the packages, and computes so."""
        targets = {each.manifest.target for each in self.packages}
        return self.compute in ("auto", "f32") and targets <= {*DEVICES["cpu"].targets}

    def _openvino_computes_in(self) -> str | None:
        """What openvino computes in, if that is what runs the package, memory apart; else None."""
        if base_name(self.device) == _COMPILER:
            return compute_of(self.device, self.compute) if self.compute == "auto" else self.compute
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
