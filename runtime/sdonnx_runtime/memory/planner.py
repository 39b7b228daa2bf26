"""A budget of memory made a plan: how each component is run, what that takes at most, and how long it takes."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path

from sdonnx_runtime.adapters.merging import module_of
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.execution.strategy import VAE_TILES, ExecutionStrategy
from sdonnx_runtime.execution.tiling import tile_offsets
from sdonnx_runtime.graphs.initializers import INT4
from sdonnx_runtime.graphs.partition import Stage, read_stages
from sdonnx_runtime.graphs.shape_inference import TensorInfo
from sdonnx_runtime.memory.footprint import Footprint, footprint
from sdonnx_runtime.packages.manifest import NORM_STATS

_VAE_IN_CODES, _WHOLE, _STAGED = 1.25, 1.45, 1.4
"""How many times the values of an int8 VAE, of any other graph, and of a stage, the arena takes: in pieces."""

_PINNED = 0.045
"""By how much more for each stage that stays open, for its weights lie in the arena among what comes and goes."""

_KERNEL, _MATRIX, _IN_4_BITS = 2.25, 3.25, 0.85
"""How many times a weight is there in float32 while an adapter changes it, and how many more of 4 bits."""

_OPENED, _WRITTEN, _IN_CODES = 0.8e9, 3e9, 2.2
"""Bytes of weights opened, and of fresh pages handed out, in a second; how many times faster products in 8 bits are."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A graph, and what it is given."""

    path: Path
    inputs: tuple[tuple[str, TensorInfo], ...]
    tile: int | None = None
    """The side of what is worked on at a time, in places of what it is given; None is all."""
    adapted: frozenset[str] = frozenset()
    """The modules that adapters change."""


@dataclass(frozen=True, kw_only=True)
class LoadedComponent:
    """A component as a request runs it."""

    component: str
    graphs: tuple[Graph, ...]
    """What is open at a time, if all of it is."""
    tiled: Graph | None = None
    """What works on tiles instead, of a VAE."""
    scale: int = 1
    """Sides of a latent cell in places of what that is given."""
    beside: int = 0
    """Bytes of what is made of it outside."""


MemoryPhase = Sequence[LoadedComponent]
"""What is open at one time."""


@dataclass(frozen=True, kw_only=True)
class ComponentPlan:
    """A way for a component, and what is predicted of it."""

    component: str
    way: ExecutionStrategy
    stages: int
    """How many it has."""
    peak: int
    """The most that the process will have taken meanwhile, in bytes."""
    work: float
    """Multiplications of a run, as if all were in float32."""
    extra: float
    """Seconds of a run for opening stages and for fresh pages."""
    moves: int
    """Bytes of the peak that are for what runs."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the components of a request are run, and what is predicted of that."""

    choices: tuple[ComponentPlan, ...]
    least: int
    """The smallest budget that there is a plan for, in bytes."""

    @property
    def peak(self) -> int:
        """The most memory that the process will have taken, in bytes."""
        return max(choice.peak for choice in self.choices)

    @property
    def ways(self) -> dict[str, ExecutionStrategy]:
        """By component."""
        return {choice.component: choice.way for choice in self.choices}

    @property
    def arena(self) -> int:
        """Bytes that the arena comes to."""
        return max((choice.moves for choice in self.choices if not choice.way.frugal), default=0)


def make_plan(phases: Sequence[MemoryPhase], budget: float, base: int) -> Plan:
    """The fastest plan that keeps to a budget, or, where none does, the one of least memory.

    Args:
        phases: what is open at a time, one after another.
        budget: bytes for the whole process.
        base: bytes of it that are taken already, or for something else.

    Raises:
        UnknownGraph: a graph has operators or inputs that packages of sdonnx don't have.
        PackageError: a graph is damaged.
    """
    choices, least = list[ComponentPlan](), 0
    for phase in phases:
        options = [[_Run(part, way) for part, way in zip(phase, ways, strict=True)] for ways in _ways(phase)]
        smallest = min(options, key=_peak)  # and of those the fastest
        runs = next((each for each in options if base + _peak(each) <= budget), smallest)
        least = max(least, base + _peak(smallest))
        _keep_stages(runs, budget - base)
        choices += [run.choice(base + _peak(runs)) for run in runs]
    return Plan(choices=tuple(choices), least=least)


def graph_outputs(graph: Graph) -> Mapping[str, TensorInfo]:
    """What a graph gives.

    Raises:
        UnknownGraph, PackageError: as `make_plan` does.
    """
    return _walked(graph, False)[-1].footprint.outputs


def _ways(phase: MemoryPhase) -> list[list[ExecutionStrategy]]:
    """The ways for what is open at a time, fastest first."""
    if all(part.tiled is not None for part in phase):
        tiled = [
            ExecutionStrategy(staged=True, frugal=frugal, tile=tile) for frugal in (False, True) for tile in VAE_TILES
        ]
        found = [ExecutionStrategy(), ExecutionStrategy(staged=True, frugal=True), *tiled]
    else:
        kinds = ((False, False), (True, False), (True, True))
        found = [
            ExecutionStrategy(rows=rows, staged=staged, frugal=frugal)
            for staged, frugal in kinds
            for rows in (False, True)
        ]
    return [[way] * len(phase) for way in found]


def _peak(runs: Sequence["_Run"]) -> int:
    """Bytes that what is open at one time takes at most."""
    return sum(run.stays for run in runs) + max(run.moves for run in runs)


def _keep_stages(runs: Sequence["_Run"], room: float) -> None:
    """Has as many stages stay open as there is room for, the largest first."""
    again = (run for run in runs if run.way.staged and run.cut and run.way.tile is None)
    staged = ((run, stage) for run in again for stage in run.stages)
    for run, stage in sorted(staged, key=lambda each: -each[1].footprint.weights):
        run.kept.add(stage)
        if _peak(runs) > room:
            run.kept.remove(stage)


@dataclass(frozen=True, eq=False)
class _Stage:
    """A stage among the others of its graph."""

    place: tuple[str, int]
    footprint: Footprint
    held: int
    """Bytes of values that are kept for it and those after it while it runs."""
    times: float = 1
    """How often it runs, for rows or tiles of the size that its footprint is of."""
    merged: int = 0
    """Bytes of the weights that adapters change, which are there beside what a session makes of them."""
    merging: int = 0
    """The most of bytes while they are changed, one after another in float32."""

    @property
    def opened(self) -> int:
        """What it takes while it is open."""
        return self.footprint.weights + self.merged

    @property
    def opening(self) -> int:
        """The most that it takes before."""
        return max(self.footprint.opening + 2 * self.merged, self.merging)


class _Run:
    """A part run in a way: what stays in memory while others of its phase run, and what is added while it does."""

    def __init__(self, part: LoadedComponent, way: ExecutionStrategy) -> None:
        self._part, graphs = part, part.graphs
        if way.tile is not None and part.tiled is not None:
            graphs = (replace(part.tiled, tile=way.tile * part.scale),)
        walks = [_walked(graph, way.staged, way.rows) for graph in graphs]
        self.cut = any(len(walk) > 1 for walk in walks)
        self.stages = [stage for walk in walks for stage in walk]
        self.way = replace(way, rows=any(stage.times > 1 for stage in self.stages) and way.tile is None and way.rows)
        self.kept = set[_Stage]()

    @property
    def stays(self) -> int:
        open_ = self.kept if self.way.staged else self.stages
        return sum(stage.opened for stage in open_) + self._part.beside

    @property
    def moves(self) -> int:
        found = [(stage, stage.footprint) for stage in self.stages]
        moving = [each for each in found if each[0] not in self.kept]
        if not self.way.staged:
            coded = self._part.tiled is not None and self.stages[0].footprint.mapped > 0
            times = _VAE_IN_CODES if coded else _WHOLE
            return int(max(s.held + each.spread + max(times * each.values, s.opening - s.opened) for s, each in found))
        if self.way.frugal:
            return max(
                s.held + (each.values if s in self.kept else max(s.opening, s.opened + each.values))
                for s, each in found
            )
        times = _STAGED + min(1.0, _PINNED * len(self.kept))
        arena = max(s.held + times * each.values + (0 if s in self.kept else each.packed) for s, each in found)
        outside = max((max(each.mapped, s.opening - each.packed) for s, each in moving), default=0)
        return int(arena + outside)

    def choice(self, peak: int) -> ComponentPlan:
        opened = sum(stage.footprint.weights for stage in self.stages if stage not in self.kept)
        extra = opened / _OPENED if self.way.staged and self.cut else 0.0
        if self.way.frugal:
            extra += sum(stage.times * stage.footprint.written for stage in self.stages) / _WRITTEN
        work = sum(
            each.times * each.footprint.work / (_IN_CODES if each.footprint.coded else 1) for each in self.stages
        )
        return ComponentPlan(
            component=self._part.component,
            way=replace(self.way, kept=frozenset(stage.place for stage in self.kept)),
            stages=len(self.stages),
            peak=peak,
            work=work,
            extra=extra,
            moves=self.moves,
        )


def _walked(graph: Graph, cut: bool, rows: bool = False) -> tuple[_Stage, ...]:
    try:
        return _walk(graph, cut, rows, graph.path.stat().st_mtime_ns)
    except OSError as error:
        raise PackageError(f"{graph.path} can't be read ({error.strerror}); run 'sdonnx export' again") from None


@lru_cache(maxsize=64)
def _walk(graph: Graph, cut: bool, rows: bool, _changed: int) -> tuple[_Stage, ...]:
    staged, values, found = read_stages(graph.path, cut=cut), dict(graph.inputs), list[_Stage]()
    count = max((values[name].shape[0] for name in staged.leading), default=1) if rows and staged.rows_are_apart else 1
    if count > 1:
        values |= {name: replace(values[name], shape=(1, *values[name].shape[1:])) for name in staged.leading}
    last = {name: index for index, stage in enumerate(staged.stages) for name in stage.inputs}
    last |= dict.fromkeys(staged.outputs, len(staged.stages))
    alive = set(values)
    for index, stage in enumerate(staged.stages):
        held = count * sum(values[name].nbytes for name in alive)
        given, times = {name: values[name] for name in stage.inputs}, float(count)
        if graph.tile is not None and (NORM_STATS in given or len(staged.stages) == 1):
            taken, times = _in_tiles(stage, given, graph.tile)
        else:
            taken = footprint(stage, given)
        held += (count - 1) * sum(value.nbytes for value in taken.outputs.values())  # of the rows before
        merged, merging = _adapted(stage, graph.adapted)
        found.append(_Stage((graph.path.name, index), taken, held, times, merged, merging))
        values |= taken.outputs
        alive = {name for name in {*alive, *stage.outputs} if last.get(name, -1) > index}
    return tuple(found)


def _adapted(stage: Stage, modules: frozenset[str]) -> tuple[int, int]:
    """Bytes of the weights that are changed, and the most while they are."""
    stored, widest = Counter[str](), Counter[str]()
    for name, weight in stage.weights.items():
        module = module_of(name)
        if module is not None and module in modules:
            times = (_KERNEL if len(weight.shape) == 4 else _MATRIX) + _IN_4_BITS * (weight.data_type == INT4)
            stored[module] += weight.length
            widest[module] += int(4 * prod(weight.shape) * times)
    merged = most = 0
    for module, size in widest.items():
        most = max(most, merged + size)
        merged += stored[module]
    return merged, most


def _in_tiles(stage: Stage, given: Mapping[str, TensorInfo], side: int) -> tuple[Footprint, float]:
    """What a stage takes for a tile of its picture and gives for all of them, and how often it runs."""
    ((name, picture),) = [(name, value) for name, value in given.items() if len(value.shape) == 4]
    whole, normed = picture.shape[2:], NORM_STATS in given
    part = tuple(min(size, side) for size in whole)
    taken = footprint(stage, {**given, name: replace(picture, shape=(*picture.shape[:2], *part))})
    outputs = {
        name: replace(value, shape=(*value.shape[:2], *_scaled(value.shape[2:], whole, part)))
        for name, value in taken.outputs.items()
        if len(value.shape) == 4
    }
    drawn = prod(sum(min(side, size - at) for at in tile_offsets(size, side, normed=normed)) for size in whole)
    measured = 2 * prod(whole) if normed and part != whole else 0
    return replace(taken, outputs={**taken.outputs, **outputs}), (drawn + measured) / prod(part)


def _scaled(sizes: Sequence[int], whole: Sequence[int], part: Sequence[int]) -> Iterator[int]:
    return (size * all_ // some for size, all_, some in zip(sizes, whole, part, strict=True))
