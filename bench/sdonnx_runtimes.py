"""sdonnx as bench/peers.py measures it: on ONNX Runtime's CPU provider, and on OpenVINO at its default."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import openvino_models
from runtime_base import PROMPT, SEED, Feeds, Generate, Runtime


class Sdonnx(Runtime):
    """sdonnx in float32."""

    name = "sdonnx"
    needs = ("onnxruntime", "onnxscript")
    kinds = ("many steps", "few steps")
    device, target = "cpu", "generic"

    def convert(self) -> None:
        from sdonnx.cli.app import main

        options = ["--precision", self.precision, "--target", self.target]
        options += ["--calibration", "fast"]  # ranges do not change the speed
        options += ["--vae", str(self.checkpoint / "tiny_vae")] if self.has_few_steps else []
        sys.argv[1:] = ["export", str(self.checkpoint), "-o", str(self.folder), *options]
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise

    def open(self, part: str) -> Callable[[Feeds], np.ndarray]:
        from sdonnx_runtime.execution.session import Session

        import sdonnx

        session = Session(sdonnx.Package.open(self.folder).graph(part), device=self.device)
        return lambda feeds: next(iter(session.run(feeds).values()))

    def open_pipeline(self, *, fast: bool = False) -> Generate:
        return open_sdonnx(self, self.folder, device=self.device, fast=fast)


class SdonnxInt8(Sdonnx):
    """Weights and activations in int8, as ``--precision int8`` exports them."""

    precision = "int8"
    image_tasks = ("image", "fast")


class SdonnxOnOpenVino(Sdonnx):
    """``--device openvino``: it compiles a graph at its first run, or reads what an earlier process has compiled."""

    name = "sdonnx-openvino"
    precision = "fp16"
    compute = "default"
    needs = (*Sdonnx.needs, "onnxruntime_ep_openvino")
    image_tasks = ("image", "fast")
    device = "openvino"


class SdonnxInt8OnOpenVino(SdonnxOnOpenVino):
    """The int8 graph that is made for OpenVINO."""

    precision = "int8"
    target = "openvino"


def open_sdonnx(
    runtime: Runtime,
    package: Path,
    models: Mapping[str, Path] = MappingProxyType({}),
    *,
    device: str = "cpu",
    fast: bool = False,
) -> Generate:
    """Open sdonnx' pipeline; OpenVINO itself runs the ``models``, computing as ``runtime`` does."""
    import sdonnx

    options: dict[str, Any] = {"width": runtime.pixels, "height": runtime.pixels, "num_inference_steps": runtime.steps}
    options |= {"guidance_scale": max(runtime.guidance_scale, 1.0), **(sdonnx.FAST if fast else {})}
    open_model = openvino_models.model_opener(models, runtime.compute)
    opened = sdonnx.Package.open(package)
    pipe = sdonnx.Pipeline(opened, device=device, keep_loaded=runtime.has_few_steps, open_model=open_model)
    return lambda: pipe.generate(PROMPT, seed=SEED, sampler="euler", **options).images[0]
