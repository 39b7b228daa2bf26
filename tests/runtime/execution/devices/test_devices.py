"""Devices: their names, the targets they run, the plugins and adapters that are found."""

from dataclasses import replace

import onnxruntime
import pytest
from sdonnx_runtime.errors import DeviceError, RequestError
from sdonnx_runtime.execution import ort
from sdonnx_runtime.execution.components import check_device
from sdonnx_runtime.execution.devices import adapters
from sdonnx_runtime.execution.devices.adapters import adapter_names, choose_adapter, device_statuses
from sdonnx_runtime.execution.devices.table import DEVICES, DeviceName
from sdonnx_runtime.execution.ort import candidates
from sdonnx_runtime.packages.families import TARGETS
from sdonnx_runtime.packages.package import Package
from support.plugins import ep_device, install_plugin

import sdonnx


@pytest.mark.parametrize(
    ("text", "base", "adapter"),
    [
        ("cuda", "cuda", None),
        ("cuda:1", "cuda", 1),
        ("directml:0", "directml", 0),
        ("webgpu:12", "webgpu", 12),
        ("webgpu:low-power", "webgpu", "low-power"),
    ],
)
def test_a_device_s_name(text, base, adapter):
    assert DeviceName.parse(text) == DeviceName(base, adapter)
    assert str(DeviceName.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["cpu:1", "cuda:", "cuda:x", "cuda:-1", "cuda:²", "webgpu:fast", "cuda:12345", "", ":1"]
)
def test_a_name_that_is_none_says_what_is(text):
    with pytest.raises(RequestError, match=r"there is no device '.*'; choose (auto|cpu|cuda|webgpu)"):
        DeviceName.parse(text)


def test_every_target_has_a_device_that_prefers_it():
    preferred = {device.targets[0] for device in DEVICES.values()}
    assert preferred == {*TARGETS}
    assert all(device.targets[-1] == "generic" for device in DEVICES.values())


def made_for(package, target):
    return replace(package, manifest=replace(package.manifest, target=target))


def test_a_package_of_another_target_is_refused_with_the_command_that_helps(package):
    opened = made_for(Package.open(package), "cuda")
    for device in ("cpu", "directml:1", "webgpu"):
        with pytest.raises(DeviceError) as error:
            sdonnx.Pipeline(opened, device=device)
        assert str(error.value).startswith(f"{package}: the package is made for CUDA, and can't run on device")
        assert f"use --device cuda, or export it for every device: sdonnx export {opened.root} --target generic" in str(
            error.value
        )
    sdonnx.Pipeline(opened, device="cuda:1")  # planning needs no GPU


def test_auto_finds_no_device_for_a_package_of_a_target(package):
    with pytest.raises(DeviceError, match=r"sdonnx\[cuda\].*sdonnx export .* --target generic"):
        sdonnx.Pipeline(made_for(Package.open(package), "cuda"))


def test_parts_of_another_target_are_refused_too(package):
    opened = Package.open(package)
    cuda, directml = made_for(opened, "cuda"), made_for(opened, "directml")
    for parts in ({"preview_vae": cuda}, {"package": opened.with_vae(cuda)}):
        with pytest.raises(DeviceError, match="made for CUDA"):
            sdonnx.Pipeline(**{"package": opened, **parts}, device="directml")
    assert opened.with_vae(cuda).target("vae_decoder") == "cuda"
    assert opened.with_vae(cuda).target("unet") == "generic"
    check_device("directml", opened, directml, None)


def test_auto_picks_among_the_devices_that_run_a_target(monkeypatch):
    built = ["DmlExecutionProvider", "CPUExecutionProvider", "CUDAExecutionProvider", "WebGpuExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: built)
    assert candidates("auto") == ["cuda", "directml", "webgpu", "cpu"]
    assert candidates("auto", "directml") == ["directml"]
    assert candidates("webgpu", "webgpu") == ["webgpu"]


def test_a_plugin_is_registered_once_under_its_own_name(monkeypatch):
    registered = install_plugin(monkeypatch, [ep_device(Description="Arc A770", Discrete="1"), ep_device("CPU")])
    for _ in range(2):
        assert candidates("webgpu:0") == ["webgpu:0"]
    assert candidates("auto") == ["webgpu", "cpu"]
    assert registered == [("onnxruntime_ep_webgpu", "/lib/plugin.so")]
    assert adapter_names("webgpu") == {0: "Arc A770, discrete GPU"}


def test_a_plugin_that_newer_releases_list_as_available_is_still_a_plugin(monkeypatch):
    device = ep_device()
    install_plugin(monkeypatch, [device])
    candidates("webgpu")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["WebGpuExecutionProvider"])
    assert choose_adapter(DeviceName("webgpu")).ep_device is device


@pytest.mark.parametrize("devices", [[], [ep_device(is_virtual="1")]])
def test_a_plugin_without_an_adapter(devices, monkeypatch):
    install_plugin(monkeypatch, devices)
    with pytest.raises(
        DeviceError, match="device 'webgpu' finds no adapter: it requires a GPU with a Vulkan, Direct3D 12"
    ):
        candidates("webgpu")
    assert candidates("auto") == ["cpu"]


def test_auto_takes_no_software_adapter(monkeypatch):
    install_plugin(monkeypatch, [ep_device(kind="CPU")])
    assert candidates("auto") == ["cpu"]
    assert candidates("webgpu") == ["webgpu"]
    with pytest.raises(DeviceError, match=r"software adapter.*use --device webgpu, or .*sdonnx export SRC"):
        candidates("auto", "webgpu")
    assert adapter_names("webgpu") == {0: "software, on the CPU"}


def test_a_plugin_that_can_t_be_loaded(monkeypatch):
    install_plugin(monkeypatch, error=RuntimeError('ORT runtime version "1.22.0" is below the minimum required\nand'))
    with pytest.raises(
        DeviceError, match=r"can.t be loaded: ORT runtime version .*required; update both: pip install -U"
    ):
        candidates("webgpu")
    assert candidates("auto") == ["cpu"]


def test_another_library_may_have_registered_the_plugin(monkeypatch):
    install_plugin(monkeypatch, error=RuntimeError("library is already registered under onnxruntime_ep_webgpu"))
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: [ep_device()])
    assert candidates("webgpu") == ["webgpu"]


def test_an_absent_adapter_names_those_that_are_there(monkeypatch):
    install_plugin(monkeypatch, [ep_device(vendor="Intel"), ep_device(Description="RTX 4070")])
    with pytest.raises(
        DeviceError, match=r"no device 'webgpu:2' here; choose webgpu:0 \(Intel 2684, GPU\), webgpu:1 \(RTX"
    ):
        choose_adapter(DeviceName("webgpu", 2))


def test_an_adapter_of_cuda_is_a_provider_option(monkeypatch):
    monkeypatch.setattr(adapters, "run_command", lambda *_: "0, NVIDIA A100\n1, NVIDIA T4")
    assert choose_adapter(DeviceName("cuda", 1)).options == {"device_id": "1"}
    with pytest.raises(
        DeviceError, match=r"no device 'cuda:2' here; choose cuda:0 \(NVIDIA A100\), cuda:1 \(NVIDIA T4\)"
    ):
        choose_adapter(DeviceName("cuda", 2))


def test_directml_s_numbers_are_those_of_its_option(monkeypatch):
    second = ep_device("DmlExecutionProvider", Description="RX 7600")
    second.ep_options["device_id"] = "1"
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: [second])
    assert adapter_names("directml") == {1: "RX 7600, GPU"}
    assert choose_adapter(DeviceName("directml", 1)).options == {"device_id": "1"}


INTEGRATED, DISCRETE = ep_device(Discrete="0"), ep_device(Discrete="1")


@pytest.mark.parametrize(
    ("devices", "adapter", "options"),
    [
        ([INTEGRATED], 0, {}),
        ([INTEGRATED, DISCRETE], 0, {"powerPreference": "low-power"}),
        ([INTEGRATED, DISCRETE], 1, {"powerPreference": "high-performance"}),
        ([INTEGRATED, DISCRETE], "low-power", {"powerPreference": "low-power"}),
        ([INTEGRATED, DISCRETE], None, {}),
    ],
)
def test_webgpu_chooses_its_gpu_by_power(devices, adapter, options, monkeypatch):
    """The provider takes any OrtEpDevice and chooses the GPU itself, as its documentation says."""
    install_plugin(monkeypatch, devices)
    assert choose_adapter(DeviceName("webgpu", adapter)).options == options


def test_webgpu_can_t_tell_two_discrete_gpus(monkeypatch):
    install_plugin(monkeypatch, [DISCRETE, DISCRETE, INTEGRATED])
    with pytest.raises(DeviceError, match="can't choose among several discrete GPUs"):
        choose_adapter(DeviceName("webgpu", 1))


def test_a_type_of_hardware_chooses_among_the_devices_of_a_plugin(monkeypatch):
    """Providers that take the OrtEpDevice that they are given need an entry in DEVICES, and no more."""
    device = replace(
        DEVICES["webgpu"], provider="NpuExecutionProvider", plugin="npu_plugin", kinds={"npu": {}, "gpu": {}}
    )
    monkeypatch.setitem(DEVICES, "npu", device)
    devices = [ep_device(device.provider), ep_device(device.provider, kind="NPU")]
    install_plugin(monkeypatch, devices, module="npu_plugin")
    assert choose_adapter(DeviceName.parse("npu:npu")).ep_device is devices[1]
    assert choose_adapter(DeviceName.parse("npu:gpu")).ep_device is devices[0]
    install_plugin(monkeypatch, devices[:1], module="npu_plugin")
    with pytest.raises(DeviceError, match=r"no device 'npu:npu' here; choose npu:gpu"):
        choose_adapter(DeviceName.parse("npu:npu"))


def test_wheels_in_the_way_are_named(monkeypatch):
    monkeypatch.setattr(ort, "_installed_wheels", lambda: ["onnxruntime", "onnxruntime-webgpu"])
    assert ort.install_hint("cuda").endswith(
        "after pip uninstall -y onnxruntime onnxruntime-webgpu, which has the same files"
    )
    monkeypatch.setattr(ort, "_installed_wheels", lambda: ["onnxruntime"])
    assert ort.install_hint("webgpu") == 'install it with pip install "sdonnx[webgpu]"'


def test_the_state_of_every_device(monkeypatch):
    install_plugin(monkeypatch, [ep_device(Description="M3")])
    statuses = {each.device: each for each in device_statuses()}
    assert [*statuses] == [*DEVICES]
    assert statuses["webgpu"].adapters == {0: "M3, GPU"}
    assert (statuses["webgpu"].version, statuses["cpu"].version) == ("0.4.0", onnxruntime.__version__)
    assert "sdonnx[cuda]" in statuses["cuda"].problem
    assert "an NVIDIA GPU" in statuses["cuda"].problem
    install_plugin(monkeypatch)
    assert "finds no adapter" in next(each for each in device_statuses() if each.device == "webgpu").problem
