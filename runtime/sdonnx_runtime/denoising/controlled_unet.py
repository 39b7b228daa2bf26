"""A U-Net with the residuals of its controls, and the keys and values of its IP-Adapters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sdonnx_runtime.denoising.control import LEVEL, MIDDLE, SKIP, ControlModel, ResidualSpec, make_control
from sdonnx_runtime.denoising.denoiser import is_within_steps
from sdonnx_runtime.denoising.ip_adapter import CrossAttentions, ImagePrompt, ImagePrompts
from sdonnx_runtime.denoising.step_cache import RunUNetGraph
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.execution.running.device_array import Tensor, as_numpy, freeze, last_entries
from sdonnx_runtime.images.crop import CropRegion
from sdonnx_runtime.packages.manifest import read_json
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.packages.variant import Variant
from sdonnx_runtime.request import CompleteRequest
from sdonnx_runtime.resolved import Pass


class ControlledUNet:
    """A U-Net with the residuals of controls; they don't run in DeepCache's cached steps, which add the last ones.

    In ``guess`` mode a ControlNet runs on the conditional batch entry alone, weaker at higher resolutions.
    """

    def __init__(
        self, run: RunUNetGraph, package: Package, controls: Sequence[ControlModel], images: Sequence[ImagePrompt],
        *, num_conditional: int, guess: bool, steps: int,
    ) -> None:  # fmt: skip
        config = read_json(package.root / "unet" / "config.json")
        unet, width = ResidualSpec.from_config(config), sum(CrossAttentions.of_unet(config).widths)
        self._run, self._controls, self._guess, self._steps = run, controls, guess, steps
        self._images = ImagePrompts(images, width, num_conditional=num_conditional, steps=steps)
        skips = (f"{SKIP}.{index}" for index in range(len(unet.skips)))
        levels = (f"{LEVEL}.{index}" for index in range(len(unet.levels)))
        zero = freeze(np.zeros((1, 1, 1, 1), np.float32))
        self._zeros: dict[str, Tensor] = {name: zero for name in (*skips, MIDDLE, *levels)}  # noqa: C420
        self._last, self._step = self._zeros, 0

    def next_step(self) -> None:
        """Go on to the next step."""
        self._step += 1

    def forget(self) -> None:
        """Drop the residuals, which keep the controls that made them in a device's memory."""
        self._last = self._zeros

    def __call__(self, inputs: Mapping[str, Tensor], graph: Variant) -> Mapping[str, Tensor]:
        """Run a graph of the U-Net with the step's residuals and images."""
        entries = len(inputs["encoder_hidden_states"])
        if graph.cache != "cached":
            self._last = self._residuals(inputs)
        residuals = {name: last_entries(value, entries) for name, value in self._last.items()}
        return self._run({**inputs, **residuals, **self._images(self._step, entries)}, graph)

    def _residuals(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum the residuals of all controls of the step; those of a single one stay where they are."""
        total = dict(self._zeros)
        for model in self._controls:
            control = model.control
            if control.scale == 0 or not is_within_steps((control.start, control.end), self._step, self._steps):
                continue
            for name, value in model(inputs, guess=self._guess).items():
                if name not in total:
                    raise PackageError(f"a control's output '{name}' is not for this U-Net; export the control again")
                none = total[name] is self._zeros[name]
                total[name] = value if none else as_numpy(total[name]) + as_numpy(value)
        return total


def make_controlled_unet(
    unet: RunUNetGraph, run: Callable[..., Any], package: Package, controls: Sequence[Package],
    images: Sequence[ImagePrompt], request: CompleteRequest, pass_: Pass, region: CropRegion | None, *,
    num_conditional: int,
) -> ControlledUNet | None:  # fmt: skip
    """Make a package's U-Net with controls and IP-Adapters for one pass; None without any.

    ``region`` is the crop of the request's image, which conditioning images have too; ``num_conditional`` counts the
    conditional entries of a batch.
    """
    if not controls and not images:
        return None
    size, guess = (pass_.width, pass_.height), request.control_guess
    models = [make_control(index, each, run, request, size, region) for index, each in enumerate(controls)]
    count = num_conditional
    return ControlledUNet(unet, package, models, images, num_conditional=count, guess=guess, steps=pass_.steps)
