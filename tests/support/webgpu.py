"""WebGPU on SwiftShader, the software Vulkan that comes with Chromium: where it is, and a process that draws on it."""

import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np

import sdonnx

FOLDER = "SDONNX_WEBGPU"
"""The environment variable for the folder where pip has put the provider: onnxruntime-ep-webgpu, onnxruntime-webgpu."""

_BROWSERS = ("/usr/lib/chromium", "/usr/lib/chromium-browser", "/opt/google/chrome")


def missing():
    """What WebGPU in software needs and isn't there; None if all is."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return f"{FOLDER} does not name the folder of onnxruntime-ep-webgpu (see CONTRIBUTING.md)"
    if not any(Path(folder, name).is_dir() for name in ("onnxruntime_ep_webgpu", "onnxruntime")):
        return f"{folder} has no onnxruntime-ep-webgpu"
    return None if _swiftshader() else "SwiftShader is not installed; it comes with Chromium"


def _swiftshader():
    found = (Path(browser, "vk_swiftshader_icd.json") for browser in _BROWSERS)
    return next((path for path in found if path.is_file()), None)


@contextmanager
def webgpu_process():
    """A process whose sessions run on SwiftShader; gives a function that calls another in there.

    One for many cases: what a shader is compiled to stays in the process.
    """
    driver = _swiftshader()
    search = [os.environ[FOLDER], *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {
        "VK_ICD_FILENAMES": str(driver),
        "LD_LIBRARY_PATH": str(driver.parent),  # Vulkan's loader
        "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": "1",
        "PYTHONPATH": os.pathsep.join(search),
    }
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_search, initargs=(search[0],)) as pool:
        with patch.dict(os.environ, settings):
            pool.submit(os.getpid).result()
        yield lambda function, *arguments, **options: pool.submit(function, *arguments, **options).result()


def _search(folder):
    """What multiprocessing gives a process to search comes before PYTHONPATH."""
    import sys

    sys.path.insert(0, folder)


def draw(package, request, device, **options):
    """The images of a request, (n, H, W, 3) uint8, and their latents."""
    with sdonnx.load(package, device=device, **options) as pipe:
        result = pipe.generate(request)
    return np.stack([np.asarray(image) for image in result.images]), np.asarray(result.latents)


def operators_on_cpu(model):
    """The operators of a model's nodes that a session on WebGPU leaves to the CPU.

    But for ONNX Runtime's own: it adds a Gather to each Shape whose input it transposes.
    """
    import onnxruntime
    import onnxruntime_ep_webgpu as plugin

    provider = plugin.get_ep_name()
    if not any(device.ep_name == provider for device in onnxruntime.get_ep_devices()):
        onnxruntime.register_execution_provider_library(provider, plugin.get_library_path())
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_provider_for_devices(
        [each for each in onnxruntime.get_ep_devices() if each.ep_name == provider][:1], {}
    )
    session = onnxruntime.InferenceSession(model, options)
    parts = [each for each in session.get_provider_graph_assignment_info() if each.ep_name == "CPUExecutionProvider"]
    return sorted(node.op_type for part in parts for node in part.get_nodes() if node.op_type != "Gather")


def run_shared(paths, feeds):
    """What sessions of graphs on WebGPU compute with weights of their own and with shared ones, and what they share.

    Returns two lists of outputs, and the number of sessions that took each weight, by its name and address.
    """
    import onnxruntime
    from sdonnx_runtime.execution.running.shared_weights import SharedWeights
    from sdonnx_runtime.execution.session import Session

    given, add = Counter(), onnxruntime.SessionOptions.add_initializer

    def counted(self, name, value):
        given[name, value.data_ptr()] += 1
        add(self, name, value)

    def run(weights):
        sessions = [Session(path, device="webgpu", shared_weights=weights) for path in paths]
        return [session.run(feeds) for session in sessions]

    with patch.object(onnxruntime.SessionOptions, "add_initializer", counted):
        return run(None), run(SharedWeights()), given
