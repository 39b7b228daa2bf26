"""Hires fix: its upscaler, and what its second pass starts from."""

from collections.abc import Sequence
from itertools import count

from PIL import Image

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.denoising.decoding import decode
from sdonnx_runtime.denoising.init_image import InitImage, InitLatents, encode_image, resize_latents
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.execution.components import Runner
from sdonnx_runtime.images.preprocess import UPSCALERS, resize
from sdonnx_runtime.packages.families import PackageKind
from sdonnx_runtime.packages.manifest import Latents, Manifest
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.packages.upscaler_config import UpscalerConfig
from sdonnx_runtime.resolved import Pass
from sdonnx_runtime.upscaling import COMPONENT, count_tiles, upscale_rgb


def check_upscaler(upscaler: Package) -> None:
    """Check that a package enlarges images, and has a name of its own; raises PackageError."""
    if upscaler.kind is not PackageKind.UPSCALER:
        raise PackageError(f"{upscaler.root} is {upscaler.title}, not an upscaler; give the package of one")
    UpscalerConfig.read(upscaler.root)
    if upscaler.name in UPSCALERS:
        raise PackageError(
            f"{upscaler.root} is named {upscaler.name}, as an upscaler of sdonnx is; export it as another"
        )


def upscale_latents(latents: Array, second: Pass, space: Latents, circular: str) -> list[InitLatents]:
    """Resize the latents (N, C, h, w) of the first pass to those of the second."""
    height, width = second.latent_shape(space)[2:]
    return [InitLatents(latents=resize_latents(each[None], height, width, circular)) for each in latents]


def upscale_images(
    run: Runner, manifest: Manifest, latents: Array, second: Pass, upscaler: Package | None, circular: str
) -> list[InitImage]:
    """Decode the latents (N, C, h, w) of the first pass, upscale the images, and encode them for the second.

    The upscaler's package enlarges them by its factor, as often as it takes; Lanczos' filter resizes to the size of the
    second pass. Along the axes ``circular``, x, y or xy, images go on at the opposite border.
    """
    images = decode(run, manifest, latents)
    run.components.unload("vae_decoder")
    size = second.width, second.height
    if upscaler is not None:
        larger = _upscale(run, upscaler, images, size, circular)
        run.components.unload(COMPONENT)
    else:
        larger = [resize(image, size, Image.Resampling.LANCZOS, circular) for image in images]
    encoded = [InitImage(space=manifest.latents, moments=encode_image(run, image), image=image) for image in larger]
    run.components.unload("vae_encoder")
    return encoded


def _upscale(
    run: Runner, package: Package, images: Sequence[Image.Image], size: tuple[int, int], circular: str
) -> list[Image.Image]:
    """Run an upscaler until the images, which are alike, cover the size, and resize them to it."""
    config, (width, height) = UpscalerConfig.read(package.root), images[0].size
    passes = range(config.passes(max(size[0] / width, size[1] / height)))
    sizes = [(width * config.scale**done, height * config.scale**done) for done in passes]
    counts = [count_tiles(run, config, each, circular=circular) for each in sizes]
    tiles, total = count(1), len(images) * sum(counts)

    def report(*_: int) -> None:
        if run.on_upscaling is not None:
            run.on_upscaling(next(tiles), total)

    enlarged = list[Image.Image]()
    for each in images:
        larger = each
        for _ in passes:
            larger = upscale_rgb(run, config, larger, circular=circular, on_tile=report)
        enlarged.append(resize(larger, size, Image.Resampling.LANCZOS, circular))
    return enlarged
