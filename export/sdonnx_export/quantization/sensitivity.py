"""Which layers of a U-Net lose the most when they are stored or computed in fewer bits, and which it would pay to keep.

The float32 U-Net runs once, stage by stage, at a few timesteps of a real trajectory, and the edges between its stages
are kept. Then layers are narrowed group by group, in graphs of the same writer that `export` uses: only the stage that
a group is in runs anew, and those after it. Memory is that of the float32 U-Net and of one stage more.
"""

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import ExportError, RequestError
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.outputs.atomic import replacing
from sdonnx_runtime.request import given

from sdonnx_export.checkpoint_model import Part, Report
from sdonnx_export.checkpoints.open import open_source
from sdonnx_export.models.components import build, layers
from sdonnx_export.operators.base import Operators
from sdonnx_export.operators.int8 import Int8Operators
from sdonnx_export.operators.partition import cut
from sdonnx_export.operators.precision import MixedPrecision, Precision, precision_of
from sdonnx_export.operators.quantized import Range
from sdonnx_export.packaging.writer import GRAPH
from sdonnx_export.quantization.calibration import Calibration, calibrate, record_inputs

NARROW: tuple[Precision, ...] = ("int8", "int8-weights", "int4")
WIDE: Precision = "fp16"
"""What layers are kept in: half the bytes of float32, and no loss that could be measured beside the others'."""

_MOMENTS, _OUTPUT = 4, "out_sample"
_GROUP = re.compile(r".*?(resnets\.\d+|samplers\.\d+|transformer_blocks\.\d+\.\w+|proj_in|proj_out)(?=\.)|\w+")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers of one module, and what it does to the U-Net when they alone are narrow."""

    name: str
    """The module: a pattern for `MixedPrecision`."""
    error: float
    """Root mean square of the difference in the U-Net's output, relative to the output's own, over the timesteps."""
    saved: int
    """Bytes less than in float32."""
    kept: int
    """Bytes more than when they are narrow, if they are kept in WIDE."""
    cost: float = 0.0
    """Its share of all groups' squared errors, by its share of all that is saved: 1 is the average."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What `sensitivity` found."""

    source: str
    """The checkpoint's name."""
    precision: Precision
    timesteps: tuple[float, ...]
    error: float
    """As `Group.error`, of all groups at once."""
    groups: tuple[Group, ...]
    """The costliest first."""

    def mix(self, budget: int) -> MixedPrecision:
        """The precision, but for the costliest groups, in WIDE, that add no more than ``budget`` bytes together."""
        kept: dict[str, Precision] = {}
        for group in self.groups:
            if group.kept <= budget:
                kept[group.name] = WIDE
                budget -= group.kept
        return MixedPrecision(base=self.precision, patterns={"unet": kept})


def sensitivity(
    source: str,
    *,
    precision: Precision = "int8",
    vae: str | None = None,
    revision: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    report: Report = lambda _what, _done: None,
) -> Sensitivity:
    """Measures a checkpoint's U-Net.

    The float32 model is written to a temporary directory in the working directory meanwhile.

    Args:
        source: as `export` takes it.
        precision: int8, int8-weights or int4: what layers are narrowed to, but for those that a package of it leaves
            wider, or has in 8 bits instead of 4.
        vae: as `export` takes it.
        revision: as `export` takes it.
        defaults: as `export` takes them; the trajectory is of the size, the steps and the guidance in them.
        report: told of the progress.

    Raises:
        RequestError: the precision is none of these.
        SdonnxError: the source can't be read, honoured or run.
    """
    if precision not in NARROW:
        raise RequestError(f"precision is '{precision}'; choose {', '.join(NARROW)}")
    checkpoint = open_source(source, vae, revision, report)
    if "unet" not in checkpoint.parts:
        raise ExportError(f"{source} has no U-Net whose layers could be judged; give a whole checkpoint")
    calibration = given(Calibration.named("full" if precision == "int8" else "fast"))
    suits = {**checkpoint.defaults, **(defaults or {})}
    try:
        with tempfile.TemporaryDirectory(prefix=".sensitivity-", dir=Path.cwd(), ignore_cleanup_errors=True) as folder:
            work = Path(folder)
            seen = calibrate(checkpoint, precision, calibration, work, suits, report)
            moments = _moments(record_inputs("unet", work))
            weights = work / "package" / "unet" / GRAPH
            error, groups = measure(checkpoint.parts["unet"], precision, seen["unet"], moments, weights, report)
    except OSError as error:
        raise ExportError(
            f"{Path.cwd()} can't take the model meanwhile: {error.strerror or error}; run this in another directory"
        ) from None
    timesteps = tuple(float(moment["timestep"]) for moment in moments)
    return Sensitivity(
        source=checkpoint.source, precision=precision, timesteps=timesteps, error=error, groups=tuple(groups)
    )


def measure(
    part: Part,
    precision: Precision,
    ranges: Mapping[str, Range],
    moments: Sequence[Mapping[str, AnyArray]],
    weights: Path,
    report: Report = lambda _what, _done: None,
) -> tuple[float, list[Group]]:
    """What `Sensitivity` has of a U-Net: the error of all groups at once, and the groups.

    Args:
        part: its config and weights.
        precision: as `sensitivity` takes it.
        ranges: as `Int8Operators` takes them.
        moments: inputs of the U-Net.
        weights: its graph in float32, to whose weights others can point, in a directory that can be written to.
        report: told of the progress.
    """
    members = _members(part, precision)
    stored = {name: value.const_value for name, value in ir.load(weights).graph.initializers.items()}
    operators = partial(Int8Operators, ranges=ranges) if precision == "int8" else Operators

    def stages(names: Iterable[str]) -> list[ir.Model]:
        """The U-Net with these groups narrow."""
        narrow: dict[str, Precision] = {layer: each for name in names for layer, each in members[name].items()}
        model = build("unet", part, MixedPrecision(base="fp32", patterns={"unet": narrow}), operators)
        for name, value in model.graph.initializers.items():
            if name in part.weights:
                value.const_value = stored[name]
        return cut(model)

    wide = stages([])
    chain = _Chain(wide, moments, weights.with_name("stage.onnx"))
    found: list[Group] = []
    try:
        for names in _rounds(members, wide):
            pieces = stages(names.values())
            for index, name in names.items():
                report("measuring", len(found) / len(members))
                session = chain.open(pieces[index])
                saved = _bytes(wide[index]) - _bytes(pieces[index])
                halves = 2 * sum(int(np.prod(part.weights[layer].shape)) for layer in members[name])
                error = chain.error({index: lambda session=session: session})
                found.append(Group(name=name, error=error, saved=saved, kept=saved - halves))
        report("measuring all at once", 1.0)
        narrow = enumerate(stages(members))
        error = chain.error({index: partial(chain.open, piece) for index, piece in narrow})
    finally:
        chain.close()
    return error, _ranked(found)


def write_mixed_precision(path: Path, found: Sensitivity, budget: int) -> MixedPrecision:
    """Writes `Sensitivity.mix` as a file for ``export --precision mixed:FILE``, and returns it.

    Raises:
        SdonnxError: it can't be written.
    """
    mix = found.mix(budget)
    kept = [group for group in found.groups if group.name in mix.patterns["unet"]]
    lines = [
        f"# {found.source}: alone in {found.precision}, these cost the U-Net's output the error beside them.",
        f'base = "{mix.base}"',
        "",
        "[unet]",
        *(f'"{group.name}" = "{WIDE}"  # {group.error:.2%}; {group.kept / 1e6:.2f} MB more' for group in kept),
    ]
    with replacing(path) as stream:
        stream.write(("\n".join(lines) + "\n").encode())
    return mix


class _Chain:
    """The float32 U-Net as sessions of its stages, with what crosses from one to another at a few moments."""

    def __init__(self, stages: Sequence[ir.Model], moments: Sequence[Mapping[str, AnyArray]], path: Path) -> None:
        self._path = path
        self._sessions = [self.open(stage) for stage in stages]
        self._moments: list[dict[str, AnyArray]] = []
        for moment in moments:
            values = dict(moment)
            for session in self._sessions:
                values.update(session.run(values))
            self._moments.append(values)

    def open(self, stage: ir.Model) -> Session:
        """A session of a stage, whose own file is needed no longer than that."""
        ir.save(stage, self._path)
        return Session(self._path, device="cpu")

    def error(self, changed: Mapping[int, Callable[[], Session]]) -> float:
        """As `Group.error`, with these stages, by their place in the chain, instead of its own."""
        squares = []
        for values in self._moments:
            found = dict(values)
            for index in range(min(changed), len(self._sessions)):
                session = changed[index]() if index in changed else self._sessions[index]
                found.update(session.run(found))
            wanted = values[_OUTPUT].astype(np.float64)
            squares.append(np.square(found[_OUTPUT] - wanted).sum() / np.square(wanted).sum())
        return float(np.sqrt(np.mean(squares)))

    def close(self) -> None:
        """Lets go of the sessions."""
        self._sessions.clear()


def _members(part: Part, precision: Precision) -> dict[str, dict[str, Precision]]:
    """The layers of each group, and what a package of the precision has them in; without those in float32."""
    find = precision_of(precision, "unet")
    members: dict[str, dict[str, Precision]] = {}
    for layer in layers("unet", part.config):
        group = _GROUP.match(layer)
        if group is not None and find(layer) != "fp32":
            members.setdefault(group.group(), {})[layer] = find(layer)
    return members


def _rounds(members: Mapping[str, Iterable[str]], stages: Sequence[ir.Model]) -> Iterator[dict[int, str]]:
    """Groups of different stages, by their stage's place, so that one graph has a group of each narrow."""
    queues: dict[int, list[str]] = {}
    for index, stage in enumerate(stages):
        here = [name for name, layers in members.items() if any(layer in stage.graph.initializers for layer in layers)]
        if here:
            queues[index] = here
    while queues:
        yield {index: names[0] for index, names in queues.items()}
        queues = {index: names[1:] for index, names in queues.items() if names[1:]}


def _bytes(stage: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in stage.graph.initializers.values() if value.const_value is not None)


def _ranked(groups: Sequence[Group]) -> list[Group]:
    squares = sum(group.error**2 for group in groups) or 1.0
    saved = sum(group.saved for group in groups)
    costs = [group.error**2 / squares / (max(group.saved, 1) / saved) for group in groups]
    rated = [replace(group, cost=cost) for group, cost in zip(groups, costs, strict=True)]
    return sorted(rated, key=lambda group: group.cost, reverse=True)


def _moments(calls: Sequence[Mapping[str, AnyArray]]) -> list[Mapping[str, AnyArray]]:
    """A few, evenly, of the first of several trajectories; time runs backwards in each."""
    times = [float(call["timestep"]) for call in calls]
    end = next((index for index in range(1, len(times)) if times[index] > times[index - 1]), len(times))
    return [calls[index] for index in np.unique(np.linspace(0, end - 1, _MOMENTS).astype(int))]
