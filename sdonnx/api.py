"""The public names of `sdonnx`, which imports them from here when one is first used."""

from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.errors import DeviceError, ExportError, PackageError, RequestError, SafetyError, SdonnxError
from sdonnx_runtime.execution.timings import Timings
from sdonnx_runtime.images.grid import make_grid
from sdonnx_runtime.memory.planner import ComponentPlan, Plan
from sdonnx_runtime.outputs.metadata import save_png
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.pipeline import Pipeline
from sdonnx_runtime.progress import Progress
from sdonnx_runtime.request import FAST, Control, IPAdapter, Request
from sdonnx_runtime.result import Result, Safety
from sdonnx_runtime.stream import Stream
from sdonnx_runtime.upscaler import Upscaler

from sdonnx.loading import load, load_upscaler

__all__ = [
    "FAST",
    "ComponentPlan",
    "Control",
    "DeviceError",
    "ExportError",
    "IPAdapter",
    "Lora",
    "Package",
    "PackageError",
    "Pipeline",
    "Plan",
    "Progress",
    "Request",
    "RequestError",
    "Result",
    "Safety",
    "SafetyError",
    "SdonnxError",
    "Stream",
    "Timings",
    "Upscaler",
    "load",
    "load_upscaler",
    "make_grid",
    "save_png",
]
