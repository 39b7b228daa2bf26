"""Stable Diffusion on ONNX Runtime, without PyTorch.

    import sdonnx

    pipe = sdonnx.load("my-package")
    result = pipe.generate("a photograph of an astronaut riding a horse", seed=32)
    result.images[0].save("horse.png")

General layout:

    load                          opens a package, by directory, bundled name or Hub id
    Package, Pipeline             what it opens, and what generates
    Request, Control, Lora, FAST  what to generate
    Stream, Progress              one generation, step by step
    Result, Timings, save_png     its images
    Plan, ComponentPlan           predicted memory and time
    SdonnxError                   the root of RequestError, PackageError, DeviceError and ExportError
"""

from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.errors import DeviceError, ExportError, PackageError, RequestError, SdonnxError
from sdonnx_runtime.execution.timings import Timings
from sdonnx_runtime.generation import Progress
from sdonnx_runtime.memory.planner import ComponentPlan, Plan
from sdonnx_runtime.outputs.metadata import save_png
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.pipeline import Pipeline
from sdonnx_runtime.request import FAST, Control, Request
from sdonnx_runtime.result import Result
from sdonnx_runtime.stream import Stream

from sdonnx.loading import load

__all__ = [
    "FAST",
    "ComponentPlan",
    "Control",
    "DeviceError",
    "ExportError",
    "Lora",
    "Package",
    "PackageError",
    "Pipeline",
    "Plan",
    "Progress",
    "Request",
    "RequestError",
    "Result",
    "SdonnxError",
    "Stream",
    "Timings",
    "load",
    "save_png",
]
