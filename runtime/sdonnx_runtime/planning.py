"""A budget of memory made a plan: how each component is run, what that takes at most, and how long it takes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path

from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.footprint import Footprint, footprint
from sdonnx_runtime.shapes import Value
from sdonnx_runtime.stages import read_stages
from sdonnx_runtime.tiles import tiles_of

_VAE_IN_CODES, _WHOLE, _STAGED = 1.25, 1.45, 1.5
"""How many times the values of an int8 VAE, of any other graph, and of a stage, the arena takes: in pieces."""

_PINNED = 0.045
"""By how much more for each stage that stays open, for its weights lie in the arena among what comes and goes."""

_OPENED, _WRITTEN, _IN_CODES = 0.8e9, 3e9, 2.2
"""Bytes of weights opened, and of fresh pages handed out, in a second; how many times faster products in 8 bits are."""

TILES = (64, 48, 32, 24)
"""Latent cells of the sides of the tiles that a VAE may work on."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a component is run."""

    staged: bool = False
    """A stage at a time, instead of all of it."""
    kept: frozenset[tuple[str, int]] = frozenset()
    """The stages that stay open, by their graph's file and their place in it."""
    frugal: bool = False
    """Letting go of every buffer at once."""
    tile: int | None = None
    """Latent cells of the sides of what it works on at a time; None is all."""


SMALLEST = Way(staged=True, frugal=True, tile=TILES[-1])
"""What takes the least memory, and the most time."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A graph, and what it is given."""

    path: Path
    inputs: tuple[tuple[str, Value], ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A component as a request runs it."""

    component: str
    graphs: tuple[Graph, ...]
    """What is open at a time, if all of it is."""
    cells: int | None = None
    """Places of its input for each latent cell, of a VAE, which can work on tiles."""
    beside: int = 0
    """Bytes of what is made of it outside."""
    merged: int = 0
    """Bytes of the weights that adapters change."""


Phase = Sequence[Part]
"""What is open at one time."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A way for a component, and what is predicted of it."""

    component: str
    way: Way
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

    choices: tuple[Choice, ...]
    least: int
    """The smallest budget that there is a plan for, in bytes."""

    @property
    def peak(self) -> int:
        """The most memory that the process will have taken, in bytes."""
        return max(choice.peak for choice in self.choices)

    @property
    def ways(self) -> dict[str, Way]:
        """By component."""
        return {choice.component: choice.way for choice in self.choices}

    @property
    def arena(self) -> int:
        """Bytes that the arena comes to."""
        return max((choice.moves for choice in self.choices if not choice.way.frugal), default=0)


def make_plan(phases: Sequence[Phase], budget: float, base: int) -> Plan:
    """The fastest plan that keeps to a budget, or, where none does, the one of least memory.

    Args:
        phases: what is open at a time, one after another.
        budget: bytes for the whole process.
        base: bytes of it that are taken already, or for something else.

    Raises:
        KeyError: a graph has operators or inputs that packages of sdonnx don't have.
        PackageError: a graph is damaged.
    """
    choices, least = list[Choice](), 0
    for phase in phases:
        options = [[_Run(part, way) for part, way in zip(phase, ways, strict=True)] for ways in _ways(phase)]
        runs = next((each for each in options if base + _peak(each) <= budget), options[-1])
        least = max(least, base + _peak(options[-1]))
        _keep_stages(runs, budget - base)
        choices += [run.choice(base + _peak(runs)) for run in runs]
    return Plan(choices=tuple(choices), least=least)


def outputs_of(graph: Graph) -> Mapping[str, Value]:
    """What a graph gives.

    Raises:
        KeyError, PackageError: as `make_plan` does.
    """
    return _walked(graph, False)[-1].footprint.outputs


def _ways(phase: Phase) -> Iterator[list[Way]]:
    """The ways for what is open at a time, fastest first."""
    tiled = all(part.cells is not None for part in phase)
    yield [Way() for _ in phase]
    if not tiled:
        yield [Way(staged=True) for _ in phase]
    yield [Way(staged=True, frugal=True) for _ in phase]
    if tiled:
        yield from ([Way(tile=tile) for _ in phase] for tile in TILES)
        yield [SMALLEST for _ in phase]


def _peak(runs: Sequence["_Run"]) -> int:
    """Bytes that what is open at one time takes at most."""
    return sum(run.stays for run in runs) + max(run.moves for run in runs)


def _keep_stages(runs: Sequence["_Run"], room: float) -> None:
    """Has as many stages stay open as there is room for, the largest first."""
    staged = ((run, stage) for run in runs if run.way.staged and run.cut for stage in run.stages)
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


class _Run:
    """A part run in a way: what stays in memory while others of its phase run, and what is added while it does."""

    def __init__(self, part: Part, way: Way) -> None:
        self.way, self._part = way, part
        self._tiles = 1.0
        graphs = part.graphs
        if way.tile is not None and part.cells is not None:
            ((name, value),) = graphs[0].inputs
            side = way.tile * part.cells
            if max(value.shape[2:]) > side:
                covered = prod(sum(min(side, size - at) for at in tiles_of(size, side)) for size in value.shape[2:])
                self._tiles = covered / side**2
            shape = (*value.shape[:2], *(min(size, side) for size in value.shape[2:]))
            graphs = (replace(graphs[0], inputs=((name, replace(value, shape=shape)),)),)
        walks = [_walked(graph, way.staged) for graph in graphs]
        self.cut = any(len(walk) > 1 for walk in walks)
        self.stages = [stage for walk in walks for stage in walk]
        self.kept = set[_Stage]()

    @property
    def stays(self) -> int:
        open_, part = self.kept if self.way.staged else self.stages, self._part
        merged = (
            part.merged if not self.way.staged else min(part.merged, 2 * max(s.footprint.weights for s in self.stages))
        )
        return sum(stage.footprint.weights for stage in open_) + part.beside + merged

    @property
    def moves(self) -> int:
        found = [(stage, stage.footprint) for stage in self.stages]
        moving = [each for each in found if each[0] not in self.kept]
        if not self.way.staged:
            coded = self._part.cells is not None and self.stages[0].footprint.mapped > 0
            times = _VAE_IN_CODES if coded else _WHOLE
            return int(
                max(s.held + each.spread + max(times * each.values, each.opening - each.weights) for s, each in found)
            )
        if self.way.frugal:
            return max(
                s.held + (each.values if s in self.kept else max(each.opening, each.weights + each.values))
                for s, each in found
            )
        times = _STAGED + min(1.0, _PINNED * len(self.kept))
        arena = max(s.held + times * each.values + (0 if s in self.kept else each.packed) for s, each in found)
        outside = max((max(each.mapped, each.opening - each.packed) for _, each in moving), default=0)
        return int(arena + outside)

    def choice(self, peak: int) -> Choice:
        opened = sum(stage.footprint.weights for stage in self.stages if stage not in self.kept)
        extra = opened / _OPENED if self.way.staged and self.cut else 0.0
        if self.way.frugal:
            extra += self._tiles * sum(stage.footprint.written for stage in self.stages) / _WRITTEN
        work = sum(each.footprint.work / (_IN_CODES if each.footprint.coded else 1) for each in self.stages)
        return Choice(
            component=self._part.component,
            way=replace(self.way, kept=frozenset(stage.place for stage in self.kept)),
            stages=len(self.stages),
            peak=peak,
            work=self._tiles * work,
            extra=extra,
            moves=self.moves,
        )


def _walked(graph: Graph, cut: bool) -> tuple[_Stage, ...]:
    try:
        return _walk(graph, cut, graph.path.stat().st_mtime_ns)
    except OSError as error:
        raise PackageError(f"{graph.path} can't be read ({error.strerror}); run 'sdonnx export' again") from None


@lru_cache(maxsize=64)
def _walk(graph: Graph, cut: bool, _changed: int) -> tuple[_Stage, ...]:
    staged = read_stages(graph.path, cut=cut)
    values, found = dict(graph.inputs), list[_Stage]()
    last = {name: index for index, stage in enumerate(staged.stages) for name in stage.inputs}
    last |= dict.fromkeys(staged.outputs, len(staged.stages))
    alive = set(values)
    for index, stage in enumerate(staged.stages):
        held = sum(values[name].nbytes for name in alive)
        found.append(_Stage((graph.path.name, index), footprint(stage, values), held))
        values |= found[-1].footprint.outputs
        alive = {name for name in {*alive, *stage.outputs} if last.get(name, -1) > index}
    return tuple(found)
