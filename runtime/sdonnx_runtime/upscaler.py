"""The upscaler: what `sdonnx.load_upscaler` returns."""

from functools import partial
from math import prod

from PIL.Image import Image, Resampling

from sdonnx_runtime.errors import PackageError, RequestError
from sdonnx_runtime.execution.components import Components, OpenModel, Runner, check_device
from sdonnx_runtime.execution.cpu import check_threads
from sdonnx_runtime.execution.staged_model import open_model
from sdonnx_runtime.execution.strategy import UPSCALER_TILES
from sdonnx_runtime.images.preprocess import check_image, split_alpha
from sdonnx_runtime.memory.budget import AUTO, MAX, Budget
from sdonnx_runtime.memory.placement import Placement
from sdonnx_runtime.memory.planner import Plan
from sdonnx_runtime.memory.workload import upscaler_phase
from sdonnx_runtime.packages.families import PackageKind
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.packages.upscaler_config import UpscalerConfig
from sdonnx_runtime.upscaling import OnTile, check_result_size, count_tiles, upscale_rgb

MAX_SCALE = 16
"""The maximum factor of `Upscaler.upscale`."""

_COMPONENT = "upscaler"
_TILE_PIXEL, _PIXEL = 8192, 16
"""Bytes per pixel of a tile's result and of the image's, more than the widest upscaler needs."""


class Upscaler:
    """Enlarges images with an upscaler's package.

    Args:
        package: the package.
        device: auto, or a device's name: cuda, directml, webgpu, openvino or cpu, with an adapter's number: cuda:1.
        compute: what the device computes in: auto (its own choice), f32, bf16 or f16, see `computing.resolve_compute`.
        threads: CPU threads, at most the CPUs that this process may use; None is the number of physical cores.
        cache: keep the graphs that openvino compiles on disk, see `compiled_graphs.CompiledGraphs`.
        memory: the process's limit, as of `Pipeline`: the size of tiles is planned to it. "max" keeps the model loaded
            between images.
        open_model: opens a graph, as `execution.staged_model.open_model`.

    Raises:
        RequestError: ``device``, ``compute``, ``threads`` or ``memory`` is not valid.
        PackageError: the package is of another kind.
        DeviceError: the package is made for another device, or the device does not compute so.
    """

    def __init__(
        self,
        package: Package,
        *,
        device: str = "auto",
        compute: str = "auto",
        threads: int | None = None,
        cache: bool = True,
        memory: str | int = AUTO,
        open_model: OpenModel = open_model,
    ) -> None:
        if package.kind is not PackageKind.UPSCALER:
            raise PackageError(f"{package.root} is {package.title}, not an upscaler; give the package of one")
        check_threads(threads)
        check_device(device, package, compute=compute)
        self.package = package
        self._config, self._budget = UpscalerConfig.read(package.root), Budget(memory)
        self._placement = Placement(packages=(package,), device=device, compute=compute, cache=cache)
        self._components = Components(
            package,
            partial(open_model, device=device, compute=compute, threads=threads, cache=cache),
            keep_loaded=memory == MAX,
            unplanned=self._budget.unplanned(device),
        )
        self._run: Runner | None = None
        self.compute = "f32"
        """What the last image was computed in: f32, bf16 or f16."""

    @property
    def scale(self) -> int:
        """The model's own factor, 1 to 8; a model of 1 restores images."""
        return self._config.scale

    def upscale(self, image: Image, *, scale: float | None = None, on_tile: OnTile | None = None) -> Image:
        """Upscale an image, in tiles whose seams can't be seen.

        Args:
            image: of any mode; its transparency is resized with Lanczos' filter, its colors become sRGB.
            scale: up to MAX_SCALE; None is the model's own. The model runs as often as it takes, once at least, and
                the result is resized with Lanczos' filter.
            on_tile: is called after each tile with the number of those that are done, and of all; what it raises stops
                the upscaling.

        Returns:
            RGB, or RGBA where the image has transparency.

        Raises:
            RequestError: the image or the scale is not valid, or the memory limit is too low.
            PackageError: the package is damaged.
            DeviceError: the device is absent or failed, or too little memory is free.
            SdonnxError: `cancel` was called.
        """
        check_image("image", image)
        sizes, target = self._sizes(image.size, scale)
        plan = self.plan(image.size, scale=scale)
        colors, alpha = split_alpha(image)
        with self._components.exclusive(plan=None if plan is None else plan.execution):
            self._run = Runner(self._components)
            try:
                colors = self._run_passes(self._run, colors, sizes, on_tile)
            finally:
                self.compute, self._run = self._run.compute, None
        colors = colors if colors.size == target else colors.resize(target, Resampling.LANCZOS)
        if alpha is not None:
            colors.putalpha(alpha.resize(target, Resampling.LANCZOS))
        return colors

    def plan(
        self,
        size: tuple[int, int],
        *,
        scale: float | None = None,
        always: bool = False,
        memory: str | int | None = None,
    ) -> Plan | None:
        """Plan the memory of upscaling an image of (width, height).

        Returns None if nothing needs restricting, unless ``always`` is set. ``memory`` is a limit instead of the
        upscaler's.

        Raises:
            RequestError: the scale is not valid, or the memory limit is too low.
            DeviceError: too little memory is free.
            PackageError: the package is damaged.
        """
        (*_, (width, height)), _ = self._sizes(size, scale)
        files = (file for part in self.package.manifest.components.values() for file in part.files.values())
        sides = (min(side, UPSCALER_TILES[0]) * self.scale for side in (width, height))
        budget = self._budget if memory is None else Budget(memory)
        enough = (
            4 * self._placement.copies(budget) * sum(file.size for file in files)
            + _TILE_PIXEL * prod(sides)
            + _PIXEL * width * height * self.scale**2
        )
        phases = partial(upscaler_phase, self.package, width, height, component=_COMPONENT)
        return self._placement.plan(budget, lambda: [phases()], enough, always=always)

    def cancel(self) -> None:
        """Stop the upscaling that another thread is in, within its tile."""
        if (run := self._run) is not None:
            run.cancel()

    def close(self) -> None:
        """Unload the model."""
        self._components.close()

    def _sizes(self, size: tuple[int, int], scale: float | None) -> tuple[list[tuple[int, int]], tuple[int, int]]:
        """What the model's passes upscale, and what the result is resized to: (width, height)."""
        factor = self.scale if scale is None else scale
        if isinstance(factor, bool) or not 0 < factor <= MAX_SCALE:
            raise RequestError(f"scale is {scale!r}; give a number above 0, {MAX_SCALE} at most")
        passes = range(self._config.passes(factor))
        sizes = [(size[0] * self.scale**done, size[1] * self.scale**done) for done in passes]
        target = max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)
        for width, height in (*sizes, target):
            check_result_size(width, height)
        check_result_size(sizes[-1][0] * self.scale, sizes[-1][1] * self.scale)
        return sizes, target

    def _run_passes(self, run: Runner, image: Image, sizes: list[tuple[int, int]], on_tile: OnTile | None) -> Image:
        counts = [count_tiles(run, self._config, each, component=_COMPONENT) for each in sizes]
        for index in range(len(sizes)):
            before = sum(counts[:index])

            def report(done: int, _: int, before: int = before) -> None:
                if on_tile is not None:
                    on_tile(before + done, sum(counts))

            image = upscale_rgb(run, self._config, image, component=_COMPONENT, on_tile=report)
        return image

    def __enter__(self) -> "Upscaler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
