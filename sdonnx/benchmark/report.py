"""What a package costs on this machine, each component, each step and a picture, and how far it is from another one."""

import math
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
from PIL import Image
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.denoising.init_image import example_images
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.execution.cpu import cpu_name, instruction_set
from sdonnx_runtime.execution.ort import runtime_version
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.pipeline import Pipeline
from sdonnx_runtime.request import given

from sdonnx.benchmark.worker import (
    ComponentFigures,
    ImageFigures,
    ImageRun,
    measure_component,
    measure_image,
    run_in_subprocess,
)

PROMPT, SEED = "a red apple on a blue background", 1


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it was measured, for whoever reads the figures elsewhere."""

    sdonnx: str
    """Version."""
    onnxruntime: str
    """Version."""
    python: str
    """Version."""
    system: str
    """Operating system, its release, the architecture."""
    cpu: str
    """What the CPU calls itself."""
    cpus: int | None
    """Logical CPUs."""
    instruction_set: str
    """As `sdonnx_runtime.execution.cpu.instruction_set` has it."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far a package is from another one of the same checkpoint."""

    reference: str
    """Its directory."""
    psnr: float
    """Of the pictures with the same seed, dB; infinite where they are equal."""
    unet_psnr: tuple[float, ...]
    """Of what the U-Net gives for the inputs of each run of the reference's, dB.

    The peak is the range of what the reference gave."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `bench` found."""

    machine: Machine
    package: str
    """Its directory."""
    model: str
    """The checkpoint that it was made of."""
    threads: int | None
    """CPU threads; None is one for each physical core."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    batch: int
    """Pictures that a component works on at once."""
    guidance_scale: float
    """Where it is not 1, the U-Net has two rows of text for each picture."""
    components: tuple[ComponentFigures, ...]
    """In the order in which a picture needs them; the VAE's encoder last."""
    picture: ImageFigures
    """As many pictures as ``batch``, made as `Pipeline.generate` makes them."""
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
    threads: int | None = None,
    progress: Callable[[str, float], None] = lambda what, done: None,
) -> Report:
    """Measures a package, each component and a picture in a process of its own.

    A script that calls this needs the guard ``if __name__ == "__main__":``, as all do that start processes.

    Args:
        package: what is measured.
        reference: another package of the same checkpoint, to compare outputs with.
        steps: denoising steps of the picture; None is what the package suggests.
        width: pixels; None is what the package suggests.
        height: pixels; None is what the package suggests.
        batch: pictures that each component works on at once.
        repeat: runs of each component after the first.
        device: auto, cuda, directml or cpu.
        threads: CPU threads; None is one for each physical core.
        progress: told what is measured now, and how much is done, 0 to 1.

    Raises:
        RequestError: an argument is out of its range, or the reference is of another model.
        PackageError, DeviceError: as `Pipeline.generate` does; DeviceError too where memory runs out.
    """
    for name, value in {"batch": batch, "repeat": repeat}.items():
        if value < 1:
            raise RequestError(f"{name} is {value}; give a whole number of at least 1")
    pipe = Pipeline(package, device=device, threads=threads)
    size = package.manifest.defaults.size
    pictures = example_images(package.manifest, Image.linear_gradient("L").resize((size, size)))
    sides = {"width": width, "height": height}
    request = pipe.check(PROMPT, seed=SEED, num_images=batch, num_inference_steps=steps, **sides, **pictures)
    names = _component_names(package)
    stages = len(names) + (1 if reference is None else 3)
    progress("making a picture", 0.0)
    picture = run_in_subprocess("a picture", measure_image, package, request, device, threads)
    figures: list[ComponentFigures] = []
    for name in names:
        progress(f"measuring {name}", (len(figures) + 1) / stages)
        feeds = _feeds(name, picture, batch)
        found, _ = run_in_subprocess(name, measure_component, package, name, feeds, repeat + 1, device, threads)
        figures.append(found)
    comparison = None
    if reference is not None:
        progress("making the reference's", (len(names) + 1) / stages)
        wanted = run_in_subprocess("the reference", measure_image, reference, request, device, threads)
        progress("comparing", (len(names) + 2) / stages)
        comparison = _compared(package, picture, reference, wanted, device, threads)
    return Report(
        machine=_machine(),
        package=str(package.root),
        model=package.name,
        threads=threads,
        width=given(request.width),
        height=given(request.height),
        batch=batch,
        guidance_scale=given(request.guidance_scale),
        components=tuple(figures),
        picture=picture.figures,
        comparison=comparison,
    )


def psnr(found: AnyArray, wanted: AnyArray, peak: float) -> float:
    """Peak signal-to-noise ratio in dB of arrays of one shape; infinite where they are equal."""
    error = float(np.square(found.astype(np.float64) - wanted).mean())
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def _component_names(package: Package) -> list[str]:
    names = [*(encoder.component for encoder in package.manifest.text_encoders), "unet", "vae_decoder", "vae_encoder"]
    return [name for name in names if name in package.manifest.components]


def _feeds(name: str, picture: ImageRun, batch: int) -> list[Mapping[str, AnyArray]]:
    """What a component was run on for the picture, for ``batch`` pictures at once; in turns, where there is more."""
    if name == "vae_encoder":
        return [{"sample": picture.pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1}]
    calls = [call.inputs for call in picture.calls[name]]
    if name not in ("unet", "vae_decoder"):
        return calls
    return [{key: np.repeat(value, batch, axis=0) if value.ndim else value for key, value in calls[0].items()}]


def _compared(
    package: Package, made: ImageRun, reference: Package, wanted: ImageRun, device: str, threads: int | None
) -> Comparison:
    first = (each.calls["unet"][0].inputs for each in (made, wanted))
    ours, theirs = ({key: value.shape for key, value in inputs.items()} for inputs in first)
    if ours != theirs:
        raise RequestError(
            f"{reference.root} is of another model than {package.root}: its U-Net takes {theirs} instead of {ours}; "
            "compare packages of one checkpoint"
        )
    feeds = [call.inputs for call in wanted.calls["unet"]]
    _, outputs = run_in_subprocess(
        "the comparison", measure_component, package, "unet", feeds, max(2, len(feeds)), device, threads
    )
    expected = [next(iter(call.outputs.values())) for call in wanted.calls["unet"]]
    found = [next(iter(output.values())) for output in outputs]
    return Comparison(
        reference=str(reference.root),
        psnr=psnr(made.pixels, wanted.pixels, 255),
        unet_psnr=tuple(psnr(one, other, float(np.ptp(other))) for one, other in zip(found, expected, strict=True)),
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
