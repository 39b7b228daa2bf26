"""Measure time and memory of a package: each component, a whole image, and the PSNR to a reference package."""

import math
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from PIL import Image
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.denoising.init_image import example_images
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.execution.ort import runtime_version
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.pipeline import Pipeline

from sdonnx.benchmark.cpu import cpu_name, instruction_set
from sdonnx.benchmark.worker import (
    ComponentFigures,
    ImageFigures,
    ImageRun,
    measure_component,
    measure_image,
    run_in_subprocess,
)

_MAX_RUNS = 10_000
"""The most images at once, and the most timed runs."""

PROMPT, SEED = "a red apple on a blue background", 1


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine and the versions that a report was measured with."""

    sdonnx: str
    """Version."""
    onnxruntime: str
    """Version."""
    python: str
    """Version."""
    system: str
    """Operating system, its release, the architecture."""
    cpu: str
    """The CPU's own name."""
    cpus: int | None
    """Logical CPUs."""
    instruction_set: str
    """As `cpu.instruction_set` returns it."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How much a package differs from another one of the same checkpoint."""

    reference: str
    """The other package's directory."""
    psnr: float
    """PSNR of the images with the same seed, dB; infinite if they are equal."""
    unet_psnr: tuple[float, ...]
    """PSNR of the U-Net's output on the reference's inputs, dB, for each step; the peak is the reference's range."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The figures that `bench` measured."""

    machine: Machine
    package: str
    """The package's directory."""
    model: str
    """The name of its checkpoint."""
    threads: int | None
    """CPU threads; None is the number of physical cores."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    batch: int
    """Images that each component runs on at once."""
    guidance_scale: float
    """Unless it is 1, the U-Net runs on two batch entries of text for each image."""
    components: tuple[ComponentFigures, ...]
    """In the order in which an image needs them; the VAE encoder last."""
    image: ImageFigures
    """For ``batch`` images, generated as `Pipeline.generate` does."""
    comparison: Comparison | None = None


def bench(
    package: Package,
    *,
    reference: Package | None = None,
    steps: int | None = None,
    width: int | None = None,
    height: int | None = None,
    batch: int = 1,
    repeat: int = 5,
    device: str = "auto",
    compute: str = "auto",
    threads: int | None = None,
    cache: bool = True,
    progress: Callable[[str, float], None] = lambda what, done: None,
) -> Report:
    """Measure a package: each component, and an image, in its own process.

    A script that calls this needs the guard ``if __name__ == "__main__":``, because processes are spawned.

    Args:
        package: the package to measure.
        reference: another package of the same checkpoint, to compare outputs with.
        steps: denoising steps of the image; None is the package's default.
        width: pixels; None is the package's default.
        height: pixels; None is the package's default.
        batch: images that each component runs on at once.
        repeat: timed runs of each component, after the first.
        device: auto, or the name of a device, as of `sdonnx.load`.
        compute: what the device computes in, as of `sdonnx.load`.
        threads: CPU threads; None is the number of physical cores.
        cache: keep compiled graphs on disk, as of `sdonnx.load`.
        progress: called with the current task, and the share that is done, 0 to 1.

    Raises:
        RequestError: an argument is out of its range, or the reference is another model's package.
        PackageError, DeviceError: as `Pipeline.generate`; DeviceError also if memory runs out.
    """
    for name, value in {"batch": batch, "repeat": repeat}.items():
        if not 1 <= value <= _MAX_RUNS:
            raise RequestError(f"{name} is {value}; give a whole number from 1 to {_MAX_RUNS}")
    options: dict[str, Any] = {"device": device, "compute": compute, "threads": threads, "cache": cache}
    pipe = Pipeline(package, **options)
    images = example_images(package.manifest, Image.linear_gradient("L").resize(package.manifest.defaults.sides))
    sides = {"width": width, "height": height}
    choices = {"seed": SEED, "num_images": batch, "num_inference_steps": steps}
    request = pipe.resolve(PROMPT, **choices, **sides, **images).request
    names = _component_names(package)
    tasks = len(names) + (1 if reference is None else 3)
    progress("generating an image", 0.0)
    run = run_in_subprocess("an image", measure_image, package, request, options)
    components: list[ComponentFigures] = []
    for name in names:
        progress(f"measuring {name}", (len(components) + 1) / tasks)
        feeds = _component_feeds(name, run, batch)
        figures, _ = run_in_subprocess(name, measure_component, package, name, feeds, repeat + 1, options)
        components.append(figures)
    comparison = None
    if reference is not None:
        progress("generating with the reference", (len(names) + 1) / tasks)
        expected = run_in_subprocess("the reference", measure_image, reference, request, options)
        progress("comparing", (len(names) + 2) / tasks)
        comparison = _compare(package, run, reference, expected, options)
    return Report(
        machine=_machine(),
        package=str(package.root),
        model=package.name,
        threads=threads,
        width=request.width,
        height=request.height,
        batch=batch,
        guidance_scale=request.guidance_scale,
        components=tuple(components),
        image=run.figures,
        comparison=comparison,
    )


def psnr(output: AnyArray, expected: AnyArray, peak: float) -> float:
    """Return the peak signal-to-noise ratio of arrays of one shape in dB; infinite if they are equal."""
    error = float(np.square(output.astype(np.float64) - expected).mean())
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def _component_names(package: Package) -> list[str]:
    names = [*(encoder.component for encoder in package.manifest.text_encoders), "unet", "vae_decoder", "vae_encoder"]
    return [name for name in names if name in package.manifest.components]


def _component_feeds(name: str, run: ImageRun, batch: int) -> list[Mapping[str, AnyArray]]:
    """Return the inputs that a component is measured on: those it had for the image, repeated to ``batch`` images."""
    if name == "vae_encoder":
        return [{"sample": run.pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1}]
    calls = [call.inputs for call in run.calls[name]]
    if name not in ("unet", "vae_decoder"):
        return calls
    return [{key: np.repeat(value, batch, axis=0) if value.ndim else value for key, value in calls[0].items()}]


def _compare(
    package: Package, run: ImageRun, reference: Package, expected: ImageRun, options: Mapping[str, Any]
) -> Comparison:
    first = (each.calls["unet"][0].inputs for each in (run, expected))
    ours, theirs = ({key: value.shape for key, value in inputs.items()} for inputs in first)
    if ours != theirs:
        raise RequestError(
            f"{reference.root} is another model than {package.root}: its U-Net has the inputs {theirs} instead of "
            f"{ours}; compare packages of the same checkpoint"
        )
    feeds = [call.inputs for call in expected.calls["unet"]]
    _, outputs = run_in_subprocess(
        "the comparison", measure_component, package, "unet", feeds, max(2, len(feeds)), options
    )
    pairs = [
        (next(iter(output.values())), next(iter(call.outputs.values())))
        for output, call in zip(outputs, expected.calls["unet"], strict=True)
    ]
    return Comparison(
        reference=str(reference.root),
        psnr=psnr(run.pixels, expected.pixels, 255),
        unet_psnr=tuple(psnr(ours, theirs, float(np.ptp(theirs))) for ours, theirs in pairs),
    )


def _machine() -> Machine:
    return Machine(
        sdonnx=version("sdonnx"),
        onnxruntime=runtime_version(),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        cpu=cpu_name(),
        cpus=os.cpu_count(),
        instruction_set=instruction_set(),
    )
