"""What is done with images that a safety checker flags."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.execution.components import Runner
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.result import Safety
from sdonnx_runtime.safety.checkers import SAFETY_CHECKER, Checker, find_checker

logger = logging.getLogger(__name__)

SAFETY_MODES = ("off", "mark", "blur", "refuse")

SAFETY_PREFIX = "safety/"
"""The prefix of a checker among the components of a pipeline."""

_BLUR = 1 / 12
"""The blur's standard deviation, as a share of the image's longer side."""


@dataclass(frozen=True, kw_only=True)
class CheckedImages:
    """Images and their latents, after the check."""

    images: tuple[Image.Image, ...]
    """As `Result.images`."""
    latents: Array
    """As `Result.latents`."""
    safety: tuple[Safety, ...] = ()
    """As `Result.safety`."""
    compute: str = "f32"
    """As `Result.compute`."""


@dataclass(frozen=True, kw_only=True)
class SafetyPolicy:
    """A checker, and what is done with the images that it flags."""

    mode: str
    """mark, blur or refuse."""
    checker: Checker

    @property
    def hides_images(self) -> bool:
        """Whether nobody is to see a flagged image, nor one that is not checked yet."""
        return self.mode != "mark"

    def check(self, run: Runner, images: Sequence[Image.Image], latents: Array) -> CheckedImages:
        """Check images one after another; raises as `Runner` does.

        Flagged images are blurred, or black where they are refused; then their latents are zeros.
        """
        run.components.unload("vae_decoder")
        safety = tuple(self._check(run, image) for image in images)
        hidden = np.array([each.flagged and self.hides_images for each in safety])
        shown = tuple(_hide(image, each) for image, each in zip(images, safety, strict=True))
        kept = np.where(hidden[:, None, None, None], np.float32(0), latents) if hidden.any() else latents
        return CheckedImages(images=shown, latents=kept, safety=safety, compute=run.compute)

    def _check(self, run: Runner, image: Image.Image) -> Safety:
        outputs = run(f"{SAFETY_PREFIX}{SAFETY_CHECKER}", {self.checker.input: self.checker.prepare(image)})
        score, flagged = self.checker.judge(outputs)
        return Safety(checker=self.checker.name, score=score, flagged=flagged, mode=self.mode)


def make_policy(package: Package, mode: str) -> SafetyPolicy | None:
    """Return the policy of a mode with the package's checker; None for off.

    Raises:
        RequestError: the mode is unknown, or there is no checker.
    """
    if mode not in SAFETY_MODES:
        raise RequestError(f"safety is {mode!r}; choose {', '.join(SAFETY_MODES)}")
    if mode == "off":
        return None
    checker = find_checker(package)
    logger.info("images are checked by %s; flagged ones: %s", checker.name, mode)
    return SafetyPolicy(mode=mode, checker=checker)


def check_images(
    policy: SafetyPolicy | None, run: Runner, images: tuple[Image.Image, ...], latents: Array
) -> CheckedImages:
    """Check images where there is a policy."""
    if policy is not None:
        return policy.check(run, images, latents)
    return CheckedImages(images=images, latents=latents, compute=run.compute)


def log_flagged(safety: Sequence[Safety]) -> None:
    """Log which images are flagged, of all that were asked for."""
    for number, each in enumerate(safety, 1):
        if each.flagged:
            logger.warning("image %d of %d %s", number, len(safety), each)


def _hide(image: Image.Image, safety: Safety) -> Image.Image:
    """Return what is shown of an image."""
    if safety.is_refused:
        return Image.new(image.mode, image.size)
    if safety.flagged and safety.mode == "blur":
        return image.filter(ImageFilter.GaussianBlur(max(image.size) * _BLUR))
    return image
