"""Which layers of a U-Net add the most error when they are quantized, and which of them it pays to keep in fp16.

The float32 U-Net runs once, stage by stage, at a few timesteps of a real trajectory, and the edges between its stages
are kept. Then layers are quantized group by group, in graphs of the writer that `export` uses: only the stage of the
group and those after it run again. Memory is that of the float32 U-Net and of one stage more.
"""

import re
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
from sdonnx_runtime.outputs.atomic import write_file
from sdonnx_runtime.storage.staging import open_staging, remove_stale

from sdonnx_export.checkpoint_model import Part, Report
from sdonnx_export.checkpoints.open import open_source
from sdonnx_export.models.components import build, layer_shapes
from sdonnx_export.operators.base import Operators
from sdonnx_export.operators.int8 import Int8Operators
from sdonnx_export.operators.partition import cut
from sdonnx_export.operators.precision import MixedPrecision, Precision, make_precision_lookup
from sdonnx_export.operators.quantized import Range
from sdonnx_export.packaging.writer import GRAPH
from sdonnx_export.quantization.calibration import Calibration, calibrate, load_recorded_inputs

TARGETS: tuple[Precision, ...] = ("int8", "int8-weights", "int4")
"""The precisions that `sensitivity` tests."""

FALLBACK: Precision = "fp16"
"""The precision of layers that are not quantized: half the bytes of float32, and a negligible error."""

_NUM_STEPS, _OUTPUT = 4, "out_sample"
_GROUP = re.compile(r".*?(resnets\.\d+|samplers\.\d+|transformer_blocks\.\d+\.\w+|proj_in|proj_out)(?=\.)|\w+")


@dataclass(frozen=True, kw_only=True)
class Group:
    """The layers of one module, and what quantizing them alone does to the U-Net."""

    name: str
    """The module: a pattern for `MixedPrecision`."""
    error: float
    """Root mean square of the difference in the U-Net's output, relative to the output's own, over the timesteps."""
    saved: int
    """Bytes less than in float32."""
    extra_bytes: int
    """Bytes more in FALLBACK than quantized."""
    cost: float = 0.0
    """Its share of all groups' squared errors, divided by its share of all that is saved: 1 is the average."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The result of `sensitivity`."""

    source: str
    """The checkpoint's name."""
    precision: Precision
    timesteps: tuple[float, ...]
    error: float
    """As `Group.error`, of all groups at once."""
    groups: tuple[Group, ...]
    """By falling cost."""

    def mixed_precision(self, budget: int) -> MixedPrecision:
        """The precision, but with the costliest groups in FALLBACK that together add at most ``budget`` bytes."""
        fallback: dict[str, Precision] = {}
        for group in self.groups:
            if group.extra_bytes <= budget:
                fallback[group.name] = FALLBACK
                budget -= group.extra_bytes
        return MixedPrecision(base=self.precision, patterns={"unet": fallback})


def sensitivity(
    source: str,
    *,
    precision: Precision = "int8",
    vae: str | None = None,
    base: str | None = None,
    prediction_type: str | None = None,
    revision: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    report: Report = lambda _what, _done: None,
) -> Sensitivity:
    """Measure the error that quantizing each group of a U-Net's layers adds.

    The float32 model is written to a temporary directory in the working directory.

    Args:
        source: as `export` takes it.
        precision: one of TARGETS: what layers are quantized to, but for those that a package of it leaves in another
            precision.
        vae: as `export` takes it.
        base: as `export` takes it.
        prediction_type: as `export` takes it.
        revision: as `export` takes it.
        defaults: as `export` takes them; their size, steps and guidance are the trajectory's.
        report: progress callback.

    Raises:
        RequestError: the precision is not one of these.
        SdonnxError: the source can't be read, exported or run.
    """
    if precision not in TARGETS:
        raise RequestError(f"precision is '{precision}'; choose {', '.join(TARGETS)}")
    checkpoint = open_source(source, vae, revision, report, base=base, prediction_type=prediction_type)
    if "unet" not in checkpoint.parts:
        raise ExportError(f"{source} has no U-Net to measure; give a whole checkpoint")
    calibration = Calibration.parse("full" if precision == "int8" else "fast")
    assert calibration is not None  # noqa: S101 — for the type checker
    defaults = {**checkpoint.defaults, **(defaults or {})}
    try:
        remove_stale(Path.cwd())
        with open_staging(Path.cwd()) as work:
            ranges = calibrate(checkpoint, precision, calibration, work, defaults, report)["unet"]
            steps = _sample_steps(load_recorded_inputs("unet", work))
            weights = work / "package" / "unet" / GRAPH
            error, groups = measure(checkpoint.parts["unet"], precision, ranges, steps, weights, report)
    except OSError as error:
        raise ExportError(
            f"can't write the float32 model to {Path.cwd()}: {error.strerror or error}; run this in another directory"
        ) from None
    timesteps = tuple(float(step["timestep"]) for step in steps)
    return Sensitivity(
        source=checkpoint.source, precision=precision, timesteps=timesteps, error=error, groups=tuple(groups)
    )


def measure(
    part: Part,
    precision: Precision,
    ranges: Mapping[str, Range],
    steps: Sequence[Mapping[str, AnyArray]],
    weights: Path,
    report: Report = lambda _what, _done: None,
) -> tuple[float, list[Group]]:
    """Measure a U-Net: the error of all groups at once, and the groups.

    Args:
        part: its config and weights.
        precision: as `sensitivity` takes it.
        ranges: as `Int8Operators` takes them.
        steps: inputs of the U-Net, one mapping for each step.
        weights: its graph in float32, whose weights other graphs can use, in a writable directory.
        report: progress callback.
    """
    members = _group_layers(part, precision)
    stored = {name: value.const_value for name, value in ir.load(weights).graph.initializers.items()}
    operators = partial(Int8Operators, ranges=ranges) if precision == "int8" else Operators

    def build_stages(names: Iterable[str]) -> list[ir.Model]:
        """The U-Net with these groups quantized."""
        quantized: dict[str, Precision] = {layer: each for name in names for layer, each in members[name].items()}
        model = build("unet", part, MixedPrecision(base="fp32", patterns={"unet": quantized}), operators)
        for name, value in model.graph.initializers.items():
            if name in part.weights:
                value.const_value = stored[name]
        return cut(model)

    reference = build_stages([])
    unet = _StagedUNet(reference, steps, weights.with_name("stage.onnx"))
    groups: list[Group] = []
    try:
        for names in _groups_per_run(members, reference):
            stages = build_stages(names.values())
            for index, name in names.items():
                report("measuring", len(groups) / len(members))
                session = unet.open(stages[index])
                saved = _count_bytes(reference[index]) - _count_bytes(stages[index])
                fp16 = 2 * sum(int(np.prod(part.weights[layer].shape)) for layer in members[name])
                error = unet.error({index: lambda session=session: session})
                groups.append(Group(name=name, error=error, saved=saved, extra_bytes=saved - fp16))
        report("measuring all at once", 1.0)
        error = unet.error({index: partial(unet.open, stage) for index, stage in enumerate(build_stages(members))})
    finally:
        unet.close()
    return error, _rank(groups)


def write_mixed_precision(path: Path, measured: Sensitivity, budget: int) -> MixedPrecision:
    """Write `Sensitivity.mixed_precision` to a file for ``export --precision mixed:FILE``, and return it.

    Raises:
        SdonnxError: it can't be written.
    """
    mix = measured.mixed_precision(budget)
    fallback = [group for group in measured.groups if group.name in mix.patterns["unet"]]
    lines = [
        f"# {measured.source}: the error in the U-Net's output if one group alone is {measured.precision}.",
        f'base = "{mix.base}"',
        "",
        "[unet]",
        *(
            f'"{each.name}" = "{FALLBACK}"  # {each.error:.2%}; {each.extra_bytes / 1e6:.2f} MB more'
            for each in fallback
        ),
    ]
    text = "\n".join(lines) + "\n"
    write_file(path, lambda stream: stream.write(text.encode()))
    return mix


class _StagedUNet:
    """The float32 U-Net as sessions of its stages, with the edges between them at a few steps."""

    def __init__(self, stages: Sequence[ir.Model], steps: Sequence[Mapping[str, AnyArray]], path: Path) -> None:
        self._path = path
        self._sessions = [self.open(stage) for stage in stages]
        self._steps: list[dict[str, AnyArray]] = []
        for step in steps:
            values = dict(step)
            for session in self._sessions:
                values.update(session.run(values))
            self._steps.append(values)

    def open(self, stage: ir.Model) -> Session:
        """Open a session of a stage; its file may be overwritten afterwards."""
        ir.save(stage, self._path)
        return Session(self._path, device="cpu")

    def error(self, changed: Mapping[int, Callable[[], Session]]) -> float:
        """As `Group.error`, with the stages of these indices replaced."""
        squares = []
        for values in self._steps:
            outputs = dict(values)
            for index in range(min(changed), len(self._sessions)):
                session = changed[index]() if index in changed else self._sessions[index]
                outputs.update(session.run(outputs))
            wanted = values[_OUTPUT].astype(np.float64)
            squares.append(np.square(outputs[_OUTPUT] - wanted).sum() / np.square(wanted).sum())
        return float(np.sqrt(np.mean(squares)))

    def close(self) -> None:
        """Close the sessions."""
        self._sessions.clear()


def _group_layers(part: Part, precision: Precision) -> dict[str, dict[str, Precision]]:
    """The layers of each group with their precision in a package of ``precision``, without those in float32."""
    find = make_precision_lookup(precision, "unet")
    members: dict[str, dict[str, Precision]] = {}
    for layer in layer_shapes("unet", part.config):
        group = _GROUP.match(layer)
        if group is not None and find(layer) != "fp32":
            members.setdefault(group.group(), {})[layer] = find(layer)
    return members


def _groups_per_run(members: Mapping[str, Iterable[str]], stages: Sequence[ir.Model]) -> Iterator[dict[int, str]]:
    """Yield groups of different stages by the stage's index, so that one graph has a group of each quantized."""
    queues: dict[int, list[str]] = {}
    for index, stage in enumerate(stages):
        here = [name for name, layers in members.items() if any(layer in stage.graph.initializers for layer in layers)]
        if here:
            queues[index] = here
    while queues:
        yield {index: names[0] for index, names in queues.items()}
        queues = {index: names[1:] for index, names in queues.items() if names[1:]}


def _count_bytes(stage: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in stage.graph.initializers.values() if value.const_value is not None)


def _rank(groups: Sequence[Group]) -> list[Group]:
    squares = sum(group.error**2 for group in groups) or 1.0
    saved = sum(group.saved for group in groups)
    costs = [group.error**2 / squares / (max(group.saved, 1) / saved) for group in groups]
    rated = [replace(group, cost=cost) for group, cost in zip(groups, costs, strict=True)]
    return sorted(rated, key=lambda group: group.cost, reverse=True)


def _sample_steps(calls: Sequence[Mapping[str, AnyArray]]) -> list[Mapping[str, AnyArray]]:
    """Choose a few evenly spaced steps of the first trajectory; timesteps fall within each."""
    times = [float(call["timestep"]) for call in calls]
    end = next((index for index in range(1, len(times)) if times[index] > times[index - 1]), len(times))
    return [calls[index] for index in np.unique(np.linspace(0, end - 1, _NUM_STEPS).astype(int))]
