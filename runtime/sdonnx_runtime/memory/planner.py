"""Plan how components run within a memory budget: predict peaks, choose strategies."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sdonnx_runtime.execution.strategy import VAE_TILES, ExecutionPlan, ExecutionStrategy
from sdonnx_runtime.memory import constants
from sdonnx_runtime.memory.estimates import Graph, StageEstimate, estimate_stages
from sdonnx_runtime.memory.openvino import ANY_SIZE, Compilation


@dataclass(frozen=True, kw_only=True)
class LoadedComponent:
    """A component as a request runs it."""

    component: str
    graphs: tuple[Graph, ...]
    """The graphs that are open at the same time."""
    tiled: Graph | None = None
    """The graph that runs on tiles instead, of a VAE."""
    pixels_per_latent: int = 1
    """Pixels of that graph's input per latent pixel, along a side."""
    tile_sides: tuple[int, ...] = VAE_TILES
    """Sides of its tiles to choose from."""
    other_sizes: tuple[Graph, ...] = ()
    """Its graphs with the other sizes of inputs that they run with: a device of fixed sizes opens them once more."""
    extra_bytes: int = 0
    """Bytes outside its models meanwhile, such as images."""

    def on_openvino(self, how: Compilation) -> "LoadedComponent":
        """The component where OpenVINO compiles it; graphs with merged weights are not kept."""

        def compiled(graph: Graph) -> Graph:
            return replace(graph, compiled=replace(how, kept=how.kept and not graph.adapted))

        graphs, others = (tuple(map(compiled, each)) for each in (self.graphs, self.other_sizes))
        tiled = None if self.tiled is None else compiled(self.tiled)
        return replace(self, graphs=graphs, other_sizes=others, tiled=tiled)


MemoryPhase = Sequence[LoadedComponent]
"""The components that are open at the same time."""


@dataclass(frozen=True, kw_only=True)
class ComponentPlan:
    """How a component runs, and what is predicted of that."""

    component: str
    strategy: ExecutionStrategy
    stages: int
    """Of its graphs together."""
    peak: int
    """The peak memory of the process meanwhile, in bytes."""
    macs: float
    """Multiply-accumulate operations of a run, those in int8 as the float32 ones that take their time."""
    overhead_seconds: float
    """Seconds of a run for opening stages and for fresh pages."""
    transient_bytes: int
    """Bytes of ``peak`` that are freed when the component has run."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the components of a request run, and what is predicted of that."""

    components: tuple[ComponentPlan, ...]
    minimum_budget: int
    """The least budget that there is a plan for, in bytes."""
    execution: ExecutionPlan
    """The strategies, and the settings of the process and the device that go with them."""

    @property
    def peak(self) -> int:
        """The peak memory of the process, in bytes."""
        return max(planned.peak for planned in self.components)


def make_plan(
    phases: Sequence[MemoryPhase], budget: float, base: int, arena_region: int | None = None,
    *, compiled: Compilation | None = None,
) -> Plan:  # fmt: skip
    """Make the fastest plan within a budget, or if there is none, the one with the least memory.

    Args:
        phases: in their order.
        budget: bytes for the whole process.
        base: bytes of it that are in use already, or reserved.
        arena_region: of the arena that the process has, in bytes; None lets the plan choose it.
        compiled: how OpenVINO compiles graphs; None plans for ONNX Runtime's CPU provider.

    Raises:
        UnsupportedGraph: a graph has operators or inputs that sdonnx does not export.
        PackageError: a graph is damaged.
    """
    components, minimum = list[ComponentPlan](), 0
    for phase in phases:
        options = _options(phase, arena_region) if compiled is None else _compiled_options(phase, compiled)
        least = min(options, key=_peak)  # the first, so the fastest of these
        runs = next((each for each in options if base + _peak(each) <= budget), least)
        minimum = max(minimum, base + _peak(least))
        _choose_resident_stages(runs, budget - base)
        components += [run.plan(base + _peak(runs)) for run in runs]
    arena = max((each.transient_bytes for each in components if not each.strategy.no_arena), default=0)
    region = int(constants.ARENA_REGION * arena) if arena_region is None and compiled is None else arena_region
    execution = ExecutionPlan(strategies={each.component: each.strategy for each in components}, arena_region=region)
    return Plan(components=tuple(components), minimum_budget=minimum, execution=execution)


def _options(phase: MemoryPhase, arena_region: int | None) -> list[list["_PlannedRun"]]:
    """The ways to run a phase on ONNX Runtime's CPU provider, fastest first."""
    return [[_PlannedRun(loaded, strategy, arena_region) for loaded in phase] for strategy in _candidates(phase)]


def _compiled_options(phase: MemoryPhase, how: Compilation) -> list[list["_PlannedRun"]]:
    """The ways to run a phase on OpenVINO, fastest first: a graph in stages would be compiled at every step."""
    phase = [each.on_openvino(how) for each in phase]
    strategies = [ExecutionStrategy()]
    if any(loaded.other_sizes for loaded in phase):
        strategies.append(ExecutionStrategy(one_size=True))
    if all(loaded.tiled is not None for loaded in phase):
        tiles_alone = phase[0].graphs[0].margin is not None
        strategies = [] if tiles_alone else strategies
        strategies += [ExecutionStrategy(staged=not tiles_alone, tile=tile) for tile in phase[0].tile_sides]
    return [[_CompiledRun(loaded, strategy) for loaded in phase] for strategy in strategies]


def _candidates(phase: MemoryPhase) -> list[ExecutionStrategy]:
    """The strategies for the components of a phase, fastest first."""
    if phase[0].tiled is not None and phase[0].tiled.margin is not None:
        ways = ((False, False), (True, False), (True, True))
        return [
            ExecutionStrategy(staged=staged, no_arena=no_arena, tile=tile)
            for tile in phase[0].tile_sides
            for staged, no_arena in ways
        ]
    if all(loaded.tiled is not None for loaded in phase):
        whole = [ExecutionStrategy(), ExecutionStrategy(staged=True, no_arena=True)]
        return whole + [
            ExecutionStrategy(staged=True, no_arena=no_arena, tile=tile)
            for no_arena in (False, True)
            for tile in phase[0].tile_sides
        ]
    return [
        ExecutionStrategy(split_batch=split_batch, staged=staged, no_arena=no_arena)
        for staged, no_arena in ((False, False), (True, False), (True, True))
        for split_batch in (False, True)
    ]


def _peak(runs: Sequence["_PlannedRun"]) -> int:
    """The peak of components that are open at the same time, in bytes."""
    return sum(run.resident_bytes for run in runs) + max(run.transient_bytes for run in runs)


def _choose_resident_stages(runs: Sequence["_PlannedRun"], room: float) -> None:
    """Let as many stages stay open as there is room for, the largest first."""
    reopening = (run for run in runs if run.reopens and not run.runs_once)
    stages = ((run, stage) for run in reopening for stage in run.stages)
    for run, stage in sorted(stages, key=lambda each: -each[1].footprint.weights):
        run.resident.add(stage)
        if _peak(runs) > room:
            run.resident.remove(stage)


class _PlannedRun:
    """A component with a strategy: what stays in memory while others of its phase run, and what its run adds."""

    def __init__(self, loaded: LoadedComponent, strategy: ExecutionStrategy, arena_region: int | None = None) -> None:
        self._loaded, self._arena_region, graphs = loaded, arena_region, loaded.graphs
        if strategy.tile is not None and loaded.tiled is not None:
            graphs = (replace(loaded.tiled, tile_size=strategy.tile * loaded.pixels_per_latent),)
        estimates = [estimate_stages(graph, strategy.staged, strategy.split_batch) for graph in graphs]
        self._tiles_alone = graphs[0].margin is not None
        self.runs_once = strategy.tile is not None and not self._tiles_alone
        self.reopens = strategy.staged and any(len(each) > 1 for each in estimates)
        self.stages = [stage for each in estimates for stage in each]
        splits = strategy.split_batch and strategy.tile is None and any(stage.runs > 1 for stage in self.stages)
        self.strategy = replace(strategy, split_batch=splits)
        self.resident = set[StageEstimate]()

    @property
    def resident_bytes(self) -> int:
        """Bytes that stay in memory while others run."""
        stages = self.resident if self.strategy.staged else self.stages
        return sum(stage.open_bytes for stage in stages) + self._loaded.extra_bytes

    @property
    def transient_bytes(self) -> int:
        """Bytes that a run adds at its peak."""
        if not self.strategy.staged:
            return self._with_region(self._whole_bytes())
        stages, reopened = self.stages, [s for s in self.stages if s not in self.resident]
        if self.strategy.no_arena:
            running = (s.live_bytes + s.footprint.activations + s.open_bytes * (s not in self.resident) for s in stages)
            return max([*running, *(s.live_bytes + s.opening_peak_bytes for s in reopened)])
        factor = constants.ARENA_STAGED + min(1.0, constants.ARENA_RESIDENT_STAGE * len(self.resident))
        prepacked = [s.footprint.prepacked * (s not in self.resident) for s in stages]
        running = (s.live_bytes + factor * s.footprint.activations + p for s, p in zip(stages, prepacked, strict=True))
        outside = (max(s.footprint.mmapped, s.opening_peak_bytes - s.footprint.prepacked) for s in reopened)
        return self._with_region(int(max(running) + max(outside, default=0)))

    def _whole_bytes(self) -> int:
        is_vae = self._loaded.tiled is not None
        factor = constants.ARENA_WHOLE
        if self._tiles_alone:
            factor = constants.ARENA_WHOLE_UPSCALER
        elif self.stages[0].footprint.mmapped > 0:
            factor = constants.ARENA_WHOLE_INT8_VAE if is_vae else constants.ARENA_WHOLE_INT8
        elif is_vae and self._loaded.graphs[0].circular:
            factor = constants.ARENA_WHOLE_CIRCULAR_VAE
        running = [max(factor * s.footprint.activations, s.opening_peak_bytes - s.open_bytes) for s in self.stages]
        return int(max(s.live_bytes + s.footprint.fragmentation + r for s, r in zip(self.stages, running, strict=True)))

    def _with_region(self, size: int) -> int:
        """The bytes of a run in the process's arena, whose region may be of another size than the run's."""
        if (region := self._arena_region) is None or self.strategy.no_arena:
            return size
        if region < size:
            return size + int(constants.ARENA_SMALL_REGIONS * size)
        return size + int(constants.ARENA_BOOKKEEPING * max(0, region - int(constants.ARENA_REGION * size)))

    def plan(self, peak: int) -> ComponentPlan:
        """Make the ComponentPlan; ``peak`` is of its phase."""
        opened = sum(stage.footprint.weights for stage in self.stages if stage not in self.resident)
        overhead = opened / constants.OPEN_BYTES_PER_SECOND if self.reopens else 0.0
        if self.strategy.no_arena:
            allocated = sum(stage.runs * stage.footprint.allocated for stage in self.stages)
            overhead += allocated / constants.ALLOCATE_BYTES_PER_SECOND
        speedups = {True: constants.INT8_SPEEDUP, False: 1}
        strategy = replace(self.strategy, resident_stages=frozenset(stage.key for stage in self.resident))
        return ComponentPlan(
            component=self._loaded.component,
            strategy=strategy,
            stages=len(self.stages),
            peak=peak,
            macs=sum(s.runs * s.footprint.macs / speedups[s.footprint.is_int8] for s in self.stages),
            overhead_seconds=overhead,
            transient_bytes=self.transient_bytes,
        )


class _CompiledRun(_PlannedRun):
    """A component on OpenVINO: a session keeps the buffers of its values, and is opened for each size of its inputs."""

    def __init__(self, loaded: LoadedComponent, strategy: ExecutionStrategy) -> None:
        super().__init__(loaded, strategy)
        others = () if strategy.one_size or strategy.tile is not None else loaded.other_sizes
        self._others = [stage for graph in others for stage in estimate_stages(graph, cut=False)]

    @property
    def resident_bytes(self) -> int:
        """As `_PlannedRun.resident_bytes`."""
        if self.strategy.staged:
            return self._loaded.extra_bytes
        stages = [*self.stages, *self._others]
        own = sum(each.open_bytes - each.footprint.shared + each.footprint.activations for each in stages)
        return own + max(each.footprint.shared for each in stages) + self._loaded.extra_bytes

    @property
    def transient_bytes(self) -> int:
        """As `_PlannedRun.transient_bytes`."""

        def buffers(stage: StageEstimate) -> int:  # which it has once it runs
            return int(stage.footprint.activations * (ANY_SIZE if self.strategy.staged else 1))

        if not self.strategy.staged:
            return max(s.live_bytes + max(0, s.opening_peak_bytes - s.open_bytes - buffers(s)) for s in self.stages)
        return max(s.live_bytes + max(s.opening_peak_bytes, s.open_bytes + buffers(s)) for s in self.stages)
