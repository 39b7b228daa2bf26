"""Calibration: the ranges of a model's activations along its own denoising trajectories."""

import hashlib
import json
import shutil
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from onnxscript.nn import Parameter
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.denoising.init_image import encode_image, example_images
from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.execution.components import Components, Runner
from sdonnx_runtime.execution.running.device_array import Tensor, all_numpy
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.generation import Models, generate_images, run_to_end
from sdonnx_runtime.images.preprocess import to_values
from sdonnx_runtime.packages.families import PackageKind
from sdonnx_runtime.packages.manifest import FORMAT, Source, write_manifest
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.packages.variant import PLAIN
from sdonnx_runtime.pipeline import Pipeline
from sdonnx_runtime.sampling.scheduler_config import SchedulerConfig, published_sampler

from sdonnx_export.checkpoint_model import Checkpoint, Report, Weight
from sdonnx_export.models.components import COMPONENTS, build
from sdonnx_export.operators.base import ConvSpec, Operators
from sdonnx_export.operators.precision import PrecisionLookup, PrecisionSpec
from sdonnx_export.operators.quantized import Range
from sdonnx_export.packaging.preview import smooth_color_images
from sdonnx_export.packaging.writer import make_manifest, write_components

ActivationRanges: TypeAlias = Mapping[str, Mapping[str, Range]]
"""The ranges of activations, by component, then by the names that `Int8Operators` uses."""

_PROMPTS = Path(__file__).parents[1] / "data" / "calibration_prompts.txt"
_STEPS = 8
_GRIDS, _PIXELS = (4, 16, 64), 256
"""Colors on each side of the random images for a VAE, from low to high frequency; and their width and height."""
_UPSCALED_GRIDS, _UPSCALED_PIXELS = (4, 16), 64
"""Those for an upscaler: pure noise has wider ranges than photographs, and costs 6 dB."""
_TAP, _INPUT = "range:", "input:"
_MARK = "calibration.json"
"""What the directory of `calibrate` was made for; the file is made first and deleted last."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a model is calibrated on."""

    prompts: tuple[str, ...]
    """Each is denoised once, at the package's own size, guidance and sampler."""
    steps: int = _STEPS
    """Of each trajectory; a few more or less, so that timesteps differ."""

    @classmethod
    def parse(cls, name: str) -> "Calibration | None":
        """Parse ``full``, ``fast``, or the name of a file with one prompt per line; ``none`` is None.

        Raises:
            ExportError: there is no such file, or no prompt in it.
        """
        if name == "none":
            return None
        path = _PROMPTS if name in ("full", "fast") else Path(name)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError):
            raise ExportError(
                f"the calibration '{name}' can't be read; give full, fast, none, or a text file of prompts"
            ) from None
        prompts = tuple(line.strip() for line in lines if line.strip())
        if not prompts:
            raise ExportError(f"{name} has no prompts to calibrate on; give one to a line")
        return cls(prompts=prompts[:1] if name == "fast" else prompts)

    def steps_per_prompt(self) -> list[int]:
        """Steps of each trajectory."""
        offsets = [(-1) ** number * ((number + 1) // 2 % 5) for number in range(len(self.prompts))]
        return [max(self.steps + offset, 2) for offset in offsets]


class TappedOperators(Operators):
    """`Operators` in float32 whose graph also outputs the minimum and maximum of activations that need ranges.

    For target generic those are what int8 Convs will read and return: see `Int8Operators`; for openvino what all int8
    layers will read, queries and keys: see `OpenVinoOperators`.
    """

    def __init__(
        self,
        graph: ir.Graph,
        weights: Mapping[str, Weight],
        find_precision: PrecisionLookup,
        target: str = "generic",
    ) -> None:
        super().__init__(graph, weights, lambda _name: "fp32")
        self._find_target_precision = find_precision
        self._all_inputs = target == "openvino"
        self._layers: dict[ir.Value, str] = {}

    def linear(self, x: ir.Value, weight: Parameter, bias: Parameter | None) -> ir.Value:
        """``x @ weight + bias``."""
        name = str(weight.name)
        if self._all_inputs and self._find_target_precision(name) == "int8":
            self._tap(name, x)
        y = super().linear(x, weight, bias)
        self._layers[y] = name
        return y

    def attention(self, q: ir.Value, k: ir.Value, v: ir.Value, heads: int, *, upcast: bool = False) -> ir.Value:
        """Scaled dot-product attention over (N, S, heads * d)."""
        if self._all_inputs and self._find_target_precision(self._layers[q]) == "int8":
            for each in (q, k):
                self._tap(f"{self._layers[each]}.output", each)
        return super().attention(q, k, v, heads, upcast=upcast)

    def conv(self, x: ir.Value, spec: ConvSpec) -> ir.Value:
        """2-D convolution; the tap at its output is before the bias is added."""
        is_int8 = self._find_target_precision(spec.name) == "int8"
        if is_int8 and (self._all_inputs or not spec.is_pointwise):
            self._tap(spec.name, x)
        if not is_int8 or self._all_inputs or spec.is_pointwise:
            return super().conv(x, spec)
        y = self.Conv(self._conv_input(x, spec), spec.weight, **spec.attributes)
        self._tap(f"{spec.name}.output", y)
        return y if spec.bias is None else self.Add(y, self.Unsqueeze(spec.bias, [1, 2]))

    def _tap(self, name: str, x: ir.Value) -> None:
        ends = [self.Reshape(reduce(x, keepdims=0), [1]) for reduce in (self.ReduceMin, self.ReduceMax)]
        self.builder.add_output(self.Concat(*ends, axis=0), f"{_TAP}{name}")


def calibrate(
    checkpoint: Checkpoint,
    precision: PrecisionSpec,
    calibration: Calibration,
    work: Path,
    defaults: Mapping[str, Any],
    report: Report,
    target: str = "generic",
) -> ActivationRanges:
    """Measure the ranges of a checkpoint's activations.

    Args:
        checkpoint: of which a package with taps is written to ``work`` first.
        precision: of the package that the ranges are for.
        calibration: what is denoised.
        work: a directory, made if absent; it keeps the results of all runs, and runs that it has are not repeated.
        defaults: fields of `Defaults`.
        report: progress callback.
        target: of the package that the ranges are for, one of INT8_OPERATORS.

    Raises:
        SdonnxError: a component can't be run.
    """
    parts = [FORMAT, target, repr(precision), asdict(calibration), dict(defaults), _fingerprint(checkpoint)]
    stamp, mark = json.dumps(parts, sort_keys=True), work / _MARK
    if not mark.is_file() or mark.read_text(encoding="utf-8") != stamp:
        delete_work(work)
        if work.is_dir() and any(work.iterdir()):
            raise ExportError(f"{work} is in the way of the calibration, and not sdonnx' own; move it")
        work.mkdir(exist_ok=True)
        mark.touch()
        _write_tapped(checkpoint, precision, work / "package", defaults, report, target)
        mark.write_text(stamp, encoding="utf-8")
    package = Package.open(work / "package")
    recorder = _RangeRecorder(work / "runs", sum(calibration.steps_per_prompt()), report)
    run = Runner(Components(package, recorder.open_model, keep_loaded=False))
    if package.kind is PackageKind.VAE:
        _run_vae_on_color_images(run, package)
    elif package.kind is PackageKind.UPSCALER:
        _run_upscaler_on_color_images(run)
    else:
        _denoise_prompts(run, package, calibration)
    return recorder.ranges()


def delete_work(work: Path) -> None:
    """Delete the directory of `calibrate`, but none of that name that lacks its mark, which goes last."""
    if (work / _MARK).is_file():
        for folder in work.iterdir():
            shutil.rmtree(folder, ignore_errors=True)
        (work / _MARK).unlink()
    with suppress(OSError):
        work.rmdir()


def _denoise_prompts(run: Runner, package: Package, calibration: Calibration) -> None:
    """Run a model once per prompt; one that requires images gets the image before, first one of random colors."""
    pipeline, scheduler = Pipeline(package, device="cpu"), SchedulerConfig.from_dict(package.manifest.scheduler)
    image = smooth_color_images(package.manifest.defaults.size)[0]
    sampler = package.manifest.defaults.sampler or published_sampler(scheduler) or "euler"
    steps = calibration.steps_per_prompt()
    for number, (prompt, count) in enumerate(zip(calibration.prompts, steps, strict=True)):
        images = example_images(package.manifest, image)
        resolved = pipeline.resolve(prompt, num_inference_steps=count, seed=number, sampler=sampler, **images)
        models = Models(run=run, package=package, scheduler=scheduler)
        (image,) = run_to_end(generate_images(models, resolved)).images
        run("vae_encoder", {"sample": to_values(image)})
        run.components.unload("vae_encoder")


def _run_vae_on_color_images(run: Runner, package: Package) -> None:
    """Run a VAE on random images from low to high frequency."""
    for grid in _GRIDS:
        for image in smooth_color_images(_PIXELS, grid)[:2]:
            moments = encode_image(run, image)
            run("vae_decoder", {"latent_sample": moments[:, : package.manifest.latents.channels]})


def _run_upscaler_on_color_images(run: Runner) -> None:
    """Run an upscaler on random images of low and middle frequency."""
    for grid in _UPSCALED_GRIDS:
        for image in smooth_color_images(_UPSCALED_PIXELS, grid)[:2]:
            run("upscaler", {"image": to_values(image) / 2 + 0.5})


def load_recorded_inputs(component: str, work: Path) -> list[dict[str, AnyArray]]:
    """Load the inputs of each of a component's runs from the directory of `calibrate`, in the order of running."""
    runs = []
    for path in sorted((work / "runs").glob(f"{component}-*.npz")):
        with np.load(path) as saved:
            runs.append({key.removeprefix(_INPUT): saved[key] for key in saved.files if key.startswith(_INPUT)})
    return runs


def _write_tapped(
    checkpoint: Checkpoint, precision: PrecisionSpec, directory: Path, defaults: Mapping[str, Any], report: Report,
    target: str,
) -> None:  # fmt: skip
    def make(name: str) -> dict[str, ir.Model]:
        return {
            PLAIN: build(
                name, checkpoint.parts[COMPONENTS[name].part], precision, partial(TappedOperators, target=target)
            )
        }

    directory.mkdir(parents=True)
    files = write_components(directory, checkpoint, make, lambda what, done: report(f"for calibration: {what}", done))
    manifest = make_manifest(directory, files, "fp32", Source(name=checkpoint.source, exporter="calibration"))
    write_manifest(directory, replace(manifest, defaults=replace(manifest.defaults, **defaults)))


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Hash its keys, shapes and one-dimensional weights: enough to tell one fine-tuned model from another."""
    digest = hashlib.sha256()
    for name, part in sorted(checkpoint.parts.items()):
        for key, weight in sorted(part.weights.items()):
            digest.update(f"{name} {key} {weight.shape}".encode())
            if len(weight.shape) == 1:
                digest.update(np.ascontiguousarray(weight.read()).tobytes())
    return digest.hexdigest()


class _RangeRecorder:
    """Saves inputs, outputs and taps of each run of its models; a run that is saved already is not repeated."""

    def __init__(self, work: Path, total: int, report: Report) -> None:
        self._work, self._total, self._report = work, total, report
        self._done: dict[str, int] = {}
        work.mkdir(parents=True, exist_ok=True)

    def open_model(self, path: Path, *_: object, **__: object) -> Any:
        """Open a component's graph for `Components`."""
        return _RecordedModel(path, self)

    def run(
        self, name: str, feeds: Mapping[str, AnyArray], run: Callable[[Mapping[str, AnyArray]], dict[str, AnyArray]]
    ) -> dict[str, AnyArray]:
        """Return the outputs of a component's next run, without the taps; ``run`` makes them if they are not saved."""
        number = self._done.get(name, 0)
        self._done[name] = number + 1
        path = self._work / f"{name}-{number:03}.npz"
        if not path.exists():
            values = run(feeds) | {f"{_INPUT}{key}": value for key, value in feeds.items()}
            partial = path.with_suffix(".partial")
            with partial.open("wb") as stream:
                np.savez(stream, allow_pickle=False, **values)
            partial.replace(path)
        if name == "unet":
            self._report("calibrating", min((number + 1) / self._total, 1.0))
        with np.load(path) as saved:
            return {key: saved[key] for key in saved.files if not key.startswith((_TAP, _INPUT))}

    def ranges(self) -> ActivationRanges:
        """From the minimum to the maximum: clipping was measured, and costs more than coarser steps do."""
        taps_by_component: dict[str, dict[str, list[AnyArray]]] = {}
        for path in sorted(self._work.glob("*.npz")):
            taps = taps_by_component.setdefault(path.stem.rsplit("-", 1)[0], {})
            with np.load(path) as saved:
                for key in saved.files:
                    if key.startswith(_TAP):
                        taps.setdefault(key.removeprefix(_TAP), []).append(saved[key])
        return {
            name: {tap: Range.from_min_max(float(np.min(ends)), float(np.max(ends))) for tap, ends in taps.items()}
            for name, taps in taps_by_component.items()
        }


class _RecordedModel:
    """A component's graph; its session is opened by the first run that is not saved."""

    device, compute = "cpu", "f32"

    def __init__(self, path: Path, recorder: _RangeRecorder) -> None:
        self._path, self._recorder = path, recorder
        self._session: Session | None = None

    def run(self, feeds: Mapping[str, Tensor], keep: Container[str] = ()) -> dict[str, AnyArray]:
        """As `Session.run`, without the taps; all outputs are numpy arrays."""
        return self._recorder.run(self._path.parent.name, all_numpy(feeds), self._run)

    def is_open_for(self, feeds: Mapping[str, Tensor]) -> bool:
        """True: a run that is saved opens nothing."""
        return True

    def open_for(self, feeds: Mapping[str, Tensor]) -> None:
        """Open nothing."""

    def cancel(self) -> None:
        """As `Session.cancel`."""
        if self._session is not None:
            self._session.cancel()

    def _run(self, feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        self._session = self._session or Session(self._path, device="cpu")
        return self._session.run(feeds)
