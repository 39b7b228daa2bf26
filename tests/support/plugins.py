"""Plugins of ONNX Runtime, and the devices that they offer, for tests without hardware."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import onnxruntime
from sdonnx_runtime.execution import ort


def ep_device(provider="WebGpuExecutionProvider", kind="GPU", vendor="NVIDIA", **metadata):
    """An OrtEpDevice, as ONNX Runtime describes it."""
    hardware = SimpleNamespace(type=SimpleNamespace(name=kind), vendor=vendor, device_id=0x2684, metadata=metadata)
    return SimpleNamespace(ep_name=provider, ep_metadata={"version": "0.4.0"}, ep_options={}, device=hardware)


def openvino_device(kind="CPU", name="Core Ultra 7", capabilities="FP32 INT8"):
    """An OrtEpDevice of OpenVINO's plugin."""
    device = ep_device("OpenVINOExecutionProvider", kind, "Intel")
    device.ep_metadata |= {"ov_device": kind, "FULL_DEVICE_NAME": name, "OPTIMIZATION_CAPABILITIES": capabilities}
    return device


def install_openvino(monkeypatch, *devices):
    """Install OpenVINO's plugin, which offers ``devices``; returns what was registered."""
    return install_plugin(monkeypatch, devices, module="onnxruntime_ep_openvino")


def install_plugin(monkeypatch, devices=(), *, module="onnxruntime_ep_webgpu", error=None):
    """Install a plugin that offers ``devices`` once it is registered, or fails to be; returns what was registered."""
    registered = []

    def register(name, path):
        if error is not None:
            raise error
        registered.append((name, path))

    plugin = ModuleType(module)
    plugin.__spec__ = ModuleSpec(module, None)
    plugin.get_library_path = lambda: "/lib/plugin.so"
    monkeypatch.setitem(sys.modules, module, plugin)
    monkeypatch.setattr(ort, "PLUGINS", ort.Plugins())
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", register)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: list(devices) if registered else [])
    return registered
