"""Calibration: what a model's activations are along denoising trajectories of its own."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from onnxscript.nn import Parameter
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.denoising.init_image import encode_image, example_images
from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.execution.components import Components, Runner
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.generation import Generation
from sdonnx_runtime.images.preprocess import to_values
from sdonnx_runtime.packages.manifest import Source, write_manifest
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.pipeline import Pipeline
from sdonnx_runtime.sampling.scheduler_config import SchedulerConfig

from sdonnx_export.checkpoint_model import Checkpoint, Report, Weight
from sdonnx_export.models.components import COMPONENTS, build
from sdonnx_export.operators.base import Operators, sizes
from sdonnx_export.operators.precision import PrecisionOf, PrecisionSpec
from sdonnx_export.operators.quantized import Range
from sdonnx_export.packaging.preview import smooth_color_images
from sdonnx_export.packaging.writer import manifest_of, write_components

ActivationRanges: TypeAlias = Mapping[str, Mapping[str, Range]]
"""The ranges of activations: by component, then by the names that `Int8Operators` has."""

_PROMPTS = Path(__file__).parents[1] / "data" / "calibration_prompts.txt"
_STEPS = 8
_GRAINS, _PIXELS = (4, 16, 64), 256
_TAP, _GIVEN = "range:", "given:"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a model is observed on."""

    prompts: tuple[str, ...]
    """Each is denoised once, at the package's own size, guidance and sampler."""
    steps: int = _STEPS
    """Of each trajectory; a few more or less, so that timesteps differ."""

    @classmethod
    def named(cls, name: str) -> "Calibration | None":
        """``full``, ``fast``, or a file of prompts, one to a line; ``none`` is None.

        Raises:
            ExportError: there is no such file, or no prompt in it.
        """
        if name == "none":
            return None
        path = _PROMPTS if name in ("full", "fast") else Path(name)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise ExportError(
                f"the calibration '{name}' can't be read; give full, fast, none, or a text file of prompts"
            ) from None
        prompts = tuple(line.strip() for line in lines if line.strip())
        if not prompts:
            raise ExportError(f"{name} has no prompts to calibrate on; give one to a line")
        return cls(prompts=prompts[:1] if name == "fast" else prompts)

    def runs(self) -> list[int]:
        """Steps of each trajectory."""
        offsets = [(-1) ** number * ((number + 1) // 2 % 5) for number in range(len(self.prompts))]
        return [max(self.steps + offset, 2) for offset in offsets]


class TappedOperators(Operators):
    """`Operators` in float32 that also give, as outputs of the graph, least and greatest of what kernels read and give.

    Nothing else of an int8 graph has a range of its own: see `Int8Operators`.
    """

    def __init__(self, graph: ir.Graph, weights: Mapping[str, Weight], precision_of: PrecisionOf) -> None:
        super().__init__(graph, weights, lambda _name: "fp32")
        self._wanted = precision_of

    def conv(
        self,
        x: ir.Value,
        weight: Parameter,
        bias: Parameter | None,
        *,
        stride: int = 1,
        pads: Sequence[int],
        enlarged: bool = False,
        like: ir.Value | None = None,
    ) -> ir.Value:
        """2-D convolution; what it gives is tapped before the bias is added."""
        name = str(weight.name)
        if sizes(weight)[2] == 1 or self._wanted(name) != "int8":
            return super().conv(x, weight, bias, stride=stride, pads=pads, enlarged=enlarged, like=like)
        self._tap(name, x)
        x = self.upsample(x, like) if enlarged else x
        y = self.Conv(x, weight, strides=[stride, stride], pads=list(pads))
        self._tap(f"{name}.output", y)
        return y if bias is None else self.Add(y, self.Unsqueeze(bias, [1, 2]))

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
) -> ActivationRanges:
    """What a checkpoint's activations are.

    Args:
        checkpoint: of which a package with taps is written to ``work`` first.
        precision: of the package that it is for.
        calibration: what is denoised.
        work: a directory, made if absent; what is seen is kept there, and there already is not made again.
        defaults: fields of `Defaults`.
        report: told of the progress.

    Raises:
        SdonnxError: a component can't be run.
    """
    stamp = json.dumps([repr(precision), asdict(calibration), dict(defaults), _fingerprint(checkpoint)], sort_keys=True)
    mark = work / "calibration.json"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != stamp:
        shutil.rmtree(work, ignore_errors=True)
        _write_tapped(checkpoint, precision, work / "package", defaults, report)
        mark.write_text(stamp, encoding="utf-8")
    package = Package.open(work / "package")
    components = Components(package, lambda path, *_: Session(path, device="cpu"), keep_loaded=False)
    runs = calibration.runs()
    observer = _Observer(components, work / "seen", sum(runs), report)
    if package.is_vae_alone:
        _show_pictures(observer, package)
        return observer.seen()
    pipeline, scheduler = Pipeline(package, device="cpu"), SchedulerConfig.from_dict(package.manifest.scheduler)
    (picture,) = smooth_color_images(package.manifest.defaults.size)[:1]  # for models that are given one
    for number, (prompt, count) in enumerate(zip(calibration.prompts, runs, strict=True)):
        pictures = example_images(package.manifest, picture)
        request = pipeline.check(prompt, num_inference_steps=count, seed=number, **pictures)
        generation = Generation(package, observer, scheduler, request)
        for _ in generation.steps():
            pass
        if generation.result is not None:
            (picture,) = generation.result.images
            observer("vae_encoder", {"sample": to_values(picture)})
            observer.components.release("vae_encoder")
    return observer.seen()


def _show_pictures(observer: Runner, package: Package) -> None:
    """Has a VAE alone encode and decode random colours, from smooth to grainy."""
    for places in _GRAINS:
        for picture in smooth_color_images(_PIXELS, places)[:2]:
            moments = encode_image(observer, picture)
            observer("vae_decoder", {"latent_sample": moments[:, : package.manifest.latents.channels]})


def record_inputs(component: str, work: Path) -> list[dict[str, AnyArray]]:
    """The inputs of each of a component's runs that `calibrate` kept in ``work``, in their order."""
    found = []
    for path in sorted((work / "seen").glob(f"{component}-*.npz")):
        with np.load(path) as saved:
            found.append({key.removeprefix(_GIVEN): saved[key] for key in saved.files if key.startswith(_GIVEN)})
    return found


def _write_tapped(
    checkpoint: Checkpoint, precision: PrecisionSpec, directory: Path, defaults: Mapping[str, Any], report: Report
) -> None:
    def make(name: str) -> dict[str, ir.Model]:
        return {"plain": build(name, checkpoint.parts[COMPONENTS[name].part], precision, TappedOperators)}

    directory.mkdir(parents=True)
    files = write_components(directory, checkpoint, make, lambda what, done: report(f"for calibration: {what}", done))
    manifest = manifest_of(directory, files, "fp32", Source(name=checkpoint.source, exporter="calibration"))
    write_manifest(directory, replace(manifest, defaults=replace(manifest.defaults, **defaults)))


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Of its names, and of the values of what is small: enough to tell one fine-tuned model from another."""
    digest = hashlib.sha256()
    for name, part in sorted(checkpoint.parts.items()):
        for key, weight in sorted(part.weights.items()):
            digest.update(f"{name} {key} {weight.shape}".encode())
            if len(weight.shape) == 1:
                digest.update(np.ascontiguousarray(weight.read()).tobytes())
    return digest.hexdigest()


class _Observer(Runner):
    """Runs components and keeps what their taps give; what it has seen before is read instead of run."""

    def __init__(self, components: Components, work: Path, total: int, report: Report) -> None:
        super().__init__(components)
        self._work, self._total, self._report = work, total, report
        self._done: dict[str, int] = {}
        work.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, feeds: Mapping[str, AnyArray], variant: str = "plain") -> dict[str, AnyArray]:
        """As `Runner`, without the taps."""
        number = self._done.get(name, 0)
        self._done[name] = number + 1
        path = self._work / f"{name}-{number:03}.npz"
        if not path.exists():
            values = super().__call__(name, feeds, variant) | {f"{_GIVEN}{key}": value for key, value in feeds.items()}
            partial = path.with_suffix(".partial")
            with partial.open("wb") as stream:
                np.savez(stream, allow_pickle=False, **values)
            partial.replace(path)
        if name == "unet":
            self._report("calibrating", min((number + 1) / self._total, 1.0))
        with np.load(path) as saved:
            return {key: saved[key] for key in saved.files if not key.startswith((_TAP, _GIVEN))}

    def seen(self) -> ActivationRanges:
        """From the least to the greatest: clipping was measured, and costs more than coarser steps do."""
        found: dict[str, dict[str, list[AnyArray]]] = {}
        for path in sorted(self._work.glob("*.npz")):
            taps = found.setdefault(path.stem.rsplit("-", 1)[0], {})
            with np.load(path) as saved:
                for key in saved.files:
                    if key.startswith(_TAP):
                        taps.setdefault(key.removeprefix(_TAP), []).append(saved[key])
        return {
            name: {tap: Range.spanning(float(np.min(ends)), float(np.max(ends))) for tap, ends in taps.items()}
            for name, taps in found.items()
        }
