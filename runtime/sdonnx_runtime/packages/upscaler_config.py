"""What is to be known of an upscaler to run it in tiles, from the config.json of its component."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.packages.manifest import read_json

MAX_MARGIN = 40
"""The receptive field of SRVGGNetCompact is smaller. That of RRDBNet is larger, but what is farther away adds little:
`tests/runtime/test_upscaling.py` has the bound."""

_RANGES = {"scale": (1, 8), "multiple": (1, 4), "receptive_field": (1, 100_000)}


@dataclass(frozen=True, kw_only=True)
class UpscalerConfig:
    """An upscaler."""

    architecture: str
    """BasicSR's class."""
    scale: int
    """Pixels of the result per pixel of the image, along a side."""
    multiple: int
    """What the sides of its input are multiples of."""
    receptive_field: int
    """Pixels of the image to each side that a pixel of the result depends on."""

    @property
    def margin(self) -> int:
        """Pixels to each side that a tile has besides its part of the image, a multiple of ``multiple``."""
        return -(-min(self.receptive_field, MAX_MARGIN) // self.multiple) * self.multiple

    def passes(self, factor: float) -> int:
        """How often it runs to enlarge an image by a factor or more, once at least."""
        passes = 1
        while self.scale > 1 and self.scale**passes < factor:
            passes += 1
        return passes

    @classmethod
    def read(cls, root: Path) -> "UpscalerConfig":
        """Read that of the package in ``root``.

        Raises:
            PackageError: the file is missing or damaged, or has values out of range.
        """
        path = root / "upscaler" / "config.json"
        config = read_json(path)
        return cls(
            architecture=str(config.get("_class_name")),
            **{key: _integer(path, key, config.get(key), *limits) for key, limits in _RANGES.items()},
        )


def _integer(path: Path, key: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise PackageError(f"{path}: '{key}' is {value!r}; expected a whole number of {low} to {high}; export again")
    return value


def margins(config: UpscalerConfig, circular: str) -> tuple[int, int]:
    """How many pixels of the opposite border an image gets above and to the left, where it tiles along x, y or xy."""
    top, left = (config.margin if axis in circular else 0 for axis in "yx")
    return top, left


def padded_size(config: UpscalerConfig, size: tuple[int, int], circular: str = "") -> tuple[int, int]:
    """The height and width that the model is run on, for an image of (width, height)."""
    sides = (side + 2 * margin for side, margin in zip(size[::-1], margins(config, circular), strict=True))
    height, width = (-(-side // config.multiple) * config.multiple for side in sides)
    return height, width
