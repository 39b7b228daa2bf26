"""What devices compute in, which one ``auto`` takes for it, and what is said of that."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from sdonnx_runtime.errors import DeviceError, RequestError
from sdonnx_runtime.execution import ort
from sdonnx_runtime.execution.devices.choosing import (
    Notes,
    avoid_unstaged,
    avoided_devices,
    choose_devices,
    note_choice,
)
from sdonnx_runtime.execution.devices.computing import coarsest, resolve_compute
from sdonnx_runtime.execution.devices.node_assignment import check_operators
from sdonnx_runtime.execution.devices.table import DeviceName
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.memory.budget import Budget
from sdonnx_runtime.memory.placement import Placement
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.packages.variant import PLAIN
from support.plugins import install_openvino, openvino_device

import sdonnx

XEON, OLDER = "BF16 WINOGRAD FP32 INT8 BIN EXPORT_IMPORT", "WINOGRAD FP32 INT8 BIN EXPORT_IMPORT"
GPU, NPU = "FP32 BIN FP16 INT8 EXPORT_IMPORT", "FP16 INT8 EXPORT_IMPORT"
"""What OpenVINO lists of a server's CPU, of an older one, of a GPU, of an NPU."""


@pytest.mark.parametrize(
    ("device", "hardware", "capabilities", "computed"),
    [
        ("openvino", "CPU", XEON, {"auto": "bf16", "f32": "f32", "bf16": "bf16", "f16": None}),
        ("openvino", "CPU", OLDER, {"auto": "f32", "f32": "f32", "bf16": None, "f16": None}),
        ("openvino:gpu", "GPU", GPU, {"auto": "f16", "f32": "f32", "bf16": None, "f16": "f16"}),
        ("openvino:npu", "NPU", NPU, {"auto": "f16", "f32": None, "bf16": None, "f16": "f16"}),
    ],
)
def test_openvino_computes_in_what_its_device_has_instructions_for(
    device, hardware, capabilities, computed, monkeypatch
):
    install_openvino(monkeypatch, openvino_device(hardware, capabilities=capabilities))
    for asked, used in computed.items():
        if used is not None:
            assert resolve_compute(device, asked) == used
        else:
            expected = rf"'{device}' computes in .*, not in {asked}; use --compute {computed['auto']}"
            with pytest.raises(DeviceError, match=expected):
                resolve_compute(device, asked)


@pytest.mark.parametrize(
    ("device", "graph_compute", "asked", "remedy"),
    [
        ("cpu", "f32", "bf16", "computes in f32, not in bf16; use --compute f32 or --device openvino"),
        ("cpu", "f32", "f16", "use --compute f32 or --device openvino"),
        ("webgpu", "f32", "f16", "use --compute f32 or --device openvino"),
        ("cuda:1", "f16", "f32", "computes in f16, not in f32; use --compute f16, or export .* --precision fp32"),
        ("directml", "f16", "bf16", "computes in f16, not in bf16; use --compute f16"),
    ],
)
def test_other_devices_compute_in_what_the_graph_is_written_in(device, graph_compute, asked, remedy):
    assert resolve_compute(device, "auto", graph_compute) == graph_compute
    assert resolve_compute(device, graph_compute, graph_compute) == graph_compute
    with pytest.raises(DeviceError, match=remedy):
        resolve_compute(device, asked, graph_compute)


def test_a_package_says_what_it_is_written_in(package):
    opened = Package.open(package)
    half = {name: replace(each, precision="fp16") for name, each in opened.manifest.components.items()}
    generic = replace(opened, manifest=replace(opened.manifest, components=half))
    cuda = replace(generic, manifest=replace(generic.manifest, target="cuda"))
    openvino = replace(generic, manifest=replace(generic.manifest, target="openvino"))
    assert [each.compute("unet") for each in (opened, generic, cuda, openvino)] == ["f32", "f32", "f16", "f32"]
    sdonnx.Pipeline(cuda, device="cuda", compute="f16")
    with pytest.raises(DeviceError, match=r"'cuda' computes in f16, not in f32; .*--precision fp32"):
        sdonnx.Pipeline(cuda, device="cuda", compute="f32")
    with pytest.raises(DeviceError, match="'cpu' computes in f32, not in bf16"):
        sdonnx.load(package, device="cpu", compute="bf16")
    with pytest.raises(RequestError, match="compute is 'half'; choose auto, f32, bf16, f16"):
        sdonnx.load(package, compute="half")


def test_auto_takes_the_first_device_that_computes_so(monkeypatch):
    install_openvino(monkeypatch, openvino_device(capabilities=XEON))
    assert choose_devices("auto", "generic") == ["openvino", "cpu"]
    assert choose_devices("auto", "generic", compute="f32") == ["openvino", "cpu"]
    assert choose_devices("auto", "generic", compute="bf16") == ["openvino"]
    with pytest.raises(DeviceError, match="no device here computes in f16: device 'openvino' computes in bf16 or f32"):
        choose_devices("auto", "generic", compute="f16")


def test_where_openvino_is_not_installed_its_extra_is_named(package):
    with pytest.raises(DeviceError, match=r"no device here computes in bf16: .*'openvino'.*sdonnx\[openvino\]"):
        sdonnx.load(package, compute="bf16")


def test_auto_leaves_a_package_that_is_made_for_the_cpu_in_int8_to_it(monkeypatch, notes, package):
    install_openvino(monkeypatch, openvino_device(capabilities=XEON))
    opened = Package.open(package)
    unet = replace(opened.manifest.components["unet"], precision="int8")
    manifest = replace(opened.manifest, components={**opened.manifest.components, "unet": unet})
    int8 = replace(opened, manifest=manifest)
    assert avoided_devices(opened) == {}
    assert choose_devices("auto", "generic", avoided=avoided_devices(int8)) == ["cpu"]
    assert choose_devices("openvino", "generic", avoided=avoided_devices(int8)) == ["openvino"]
    assert notes() == [f"not using openvino: {opened.name} is made for the CPU in int8; using cpu"]


def test_auto_leaves_a_mixed_package_with_int8_convolutions_to_the_cpu(tmp_path, package):
    text = """<ir_version: 9, opset_import: ["com.microsoft" : 1]>
        g (uint8[N] x) => (uint8[N] y) { y = com.microsoft.QLinearConv(x) }"""
    ir.save(ir.from_onnx_text(text), graph := tmp_path / "model.onnx")
    opened = Package.open(package)
    parts = opened.manifest.components
    fp16 = replace(parts["unet"], precision="mixed")
    int8 = replace(fp16, graphs={PLAIN: graph})
    packages = [
        replace(opened, manifest=replace(opened.manifest, components={**parts, "unet": each})) for each in (fp16, int8)
    ]
    (without, found) = map(avoided_devices, packages)
    assert without == {}
    assert found["openvino"].endswith("has 1 QLinearConv, which device 'openvino' does not run")


@pytest.mark.parametrize("form", [QuantFormat.QOperator, QuantFormat.QDQ])
def test_auto_leaves_an_optimum_export_in_int8_to_the_cpu_where_openvino_does_not_take_it(form, tmp_path, package):
    """As ONNX Runtime quantizes a graph: QLinearMatMul is left to the CPU, MatMul on dequantized values is not."""
    text = """<ir_version: 9, opset_import: ["" : 17]>
        g (float[N,4] x) => (float[N,4] y) <float[4,4] w = {1,2,3,4,5,6,7,8,1,2,3,4,5,6,7,8}> { y = MatMul(x, w) }"""
    ir.save(ir.from_onnx_text(text), tmp_path / "float.onnx")
    path = tmp_path / "text_encoder" / "model.onnx"
    path.parent.mkdir()
    quantize_static(tmp_path / "float.onnx", path, OneBatch(), quant_format=form)
    opened = Package.open(package)
    parts = {name: replace(each, precision="unknown") for name, each in opened.manifest.components.items()}
    parts["text_encoder"] = replace(parts["text_encoder"], graphs={PLAIN: path})
    found = avoided_devices(replace(opened, manifest=replace(opened.manifest, components=parts)))
    reason = "text_encoder has 1 QLinearMatMul, which device 'openvino' does not run"
    assert found == ({"openvino": reason} if form == QuantFormat.QOperator else {})


class OneBatch(CalibrationDataReader):
    """What ONNX Runtime quantizes by: one batch."""

    def __init__(self):
        self._batches = iter([{"x": np.eye(4, dtype=np.float32)}])

    def get_next(self):
        return next(self._batches, None)


def test_the_operators_of_a_graph_with_its_weights_in_its_file(tmp_path):
    """They are not found in the weights, where the bytes of a name may be."""
    weight = np.frombuffer(b"QLinearConv\0" * (3 << 20), np.float32).copy()
    text = """<ir_version: 9, opset_import: ["" : 17]>
        g (float[N] x) => (float[N] y) { z = Add(x, w) y = NAME(z) }"""
    for op, message in {
        "Relu": None,
        "QLinearConv": f"^{tmp_path.name} has 1 QLinearConv, which device 'openvino'",
    }.items():
        model = ir.from_onnx_text(text.replace("NAME", op))
        model.graph.register_initializer(ir.Value(name="w", const_value=ir.tensor(weight, name="w")))
        ir.save(model, path := tmp_path / f"{op}.onnx")
        assert path.stat().st_size > weight.nbytes > 1 << 25
        with nullcontext() if message is None else pytest.raises(DeviceError, match=message):
            check_operators(DeviceName("openvino"), path, None)


def test_what_auto_leaves_out_is_not_loaded(monkeypatch, notes):
    loaded = install_openvino(monkeypatch, openvino_device(capabilities=XEON))
    for compute in ("auto", "f32"):
        assert choose_devices("auto", "generic", compute=compute, avoided={"openvino": "it is busy"}) == ["cpu"]
    assert (loaded, notes()) == ([], ["not using openvino: it is busy; using cpu"])
    assert choose_devices("auto", "generic", compute="bf16", avoided={"openvino": "it is busy"}) == ["openvino"]
    assert len(loaded) == 1


@pytest.mark.parametrize("compute", ["auto", "f32"])
def test_where_memory_is_too_little_for_openvino_its_plugin_is_not_loaded(compute, monkeypatch, package):
    devices = [openvino_device(capabilities=OLDER)]
    install_openvino(monkeypatch, *devices)
    least = []
    for device in ("cpu", "openvino"):
        with sdonnx.load(package, device=device) as pipe:
            least.append(pipe.plan("a cat", always=True).minimum_budget)
    for memory, avoided in {2 * least[1]: [], sum(least) // 2: ["openvino"], "min": ["openvino"]}.items():
        loaded = install_openvino(monkeypatch, *devices)
        with sdonnx.load(package, memory=memory, compute=compute) as pipe:
            assert list(pipe.plan("a cat").execution.avoided) == avoided
            assert pipe.memory_upper_bound(64 * 64) > 0
            assert len(loaded) == (0 if avoided else 1)
            if memory == "min":
                assert pipe.generate("a cat", num_inference_steps=1).compute == "f32"
                assert loaded == []


def test_for_stages_auto_leaves_out_only_devices_that_compile(monkeypatch, notes):
    """Where the first device fails, the next one that runs stages is tried."""
    usable = ["webgpu", "openvino", "cpu"]
    monkeypatch.setattr(ort, "candidates", lambda *_, avoided=(): [name for name in usable if name not in avoided])
    avoided = avoid_unstaged("auto", "generic", avoided={"cuda": "it is busy"})
    assert list(avoided) == ["cuda", "openvino"]
    assert choose_devices("auto", "generic", avoided=avoided) == ["webgpu", "cpu"]
    assert notes() == []


def test_a_package_for_another_device_is_not_planned_for_openvino(monkeypatch, package):
    """One in float16 for CUDA, where openvino is installed too."""
    install_openvino(monkeypatch, openvino_device(capabilities=XEON))
    opened = Package.open(package)
    parts = {name: replace(each, precision="fp16") for name, each in opened.manifest.components.items()}
    cuda = replace(opened, manifest=replace(opened.manifest, components=parts, target="cuda"))
    copies = [
        Placement(packages=(each,), device="auto", compute=compute, cache=True).copies(Budget())
        for each, compute in ((opened, "f32"), (opened, "bf16"))
    ]
    assert copies == [8, 4]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert Placement(packages=(cuda,), device="auto", compute="f16", cache=True).copies(Budget()) == 1


def test_models_of_similar_names_are_each_said(notes):
    log = Notes().log
    for name in ("sd15", "sd21", "sd15"):
        log(f"{name}: 900 MB are free; trying cpu")
    assert notes() == ["sd15: 900 MB are free; trying cpu", "sd21: 900 MB are free; trying cpu"]


def test_a_device_that_is_left_out_is_said_once(monkeypatch, notes):
    """In a batch the free memory of each image is another one."""
    install_openvino(monkeypatch, openvino_device())
    for free in (900, 901):
        assert choose_devices("auto", "generic", avoided={"openvino": f"{free} MB are free"}) == ["cpu"]
    assert choose_devices("auto", "generic", avoided={"openvino": "it is busy"}) == ["cpu"]
    assert notes() == ["not using openvino: 900 MB are free; using cpu", "not using openvino: it is busy; using cpu"]


def test_what_is_chosen_is_said_with_what_gives_the_other_image(monkeypatch, notes):
    install_openvino(monkeypatch, openvino_device(capabilities=XEON), openvino_device("NPU", "NPU 4", NPU))
    for device, compute, asked in [
        ("cpu", "f32", "auto"), ("openvino", "bf16", "auto"), ("openvino", "bf16", "auto"), ("openvino", "f32", "f32"),
        ("openvino:npu", "f16", "auto"),
    ]:  # fmt: skip
        note_choice(device, compute, asked)
    bf16, f32, npu = notes()
    assert bf16.startswith("computing in bf16 on openvino (Core Ultra 7): images differ a little from those in f32")
    assert bf16.endswith("; --compute f32 gives those")
    assert f32 == "computing in f32 on openvino (Core Ultra 7)"
    assert npu == "computing in f16 on openvino:npu (NPU 4): images differ a little from those in f32"


def test_a_plugin_without_a_device_here_is_said(monkeypatch, notes):
    install_openvino(monkeypatch)
    assert choose_devices("auto", "generic") == ["cpu"]
    (line,) = notes()
    assert line.startswith("device 'openvino' finds no adapter")
    assert line.endswith("; using cpu")
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    assert choose_devices("auto", "generic") == ["cuda", "cpu"]
    assert len(notes()) == 1


def test_a_device_that_fails_to_start_is_said_and_the_cpu_computes(monkeypatch, caplog, package):
    """No image is lost; but what is asked for by name is an error."""
    unet = package / "unet" / "model.onnx"
    shapes = {"sample": (1, 4, 8, 8), "timestep": (), "encoder_hidden_states": (1, 77, 64)}
    feeds = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    expected = Session(unet, device="cpu").run(feeds)["out_sample"]
    install_openvino(monkeypatch, openvino_device(capabilities=XEON))  # whose hardware ONNX Runtime knows nothing of
    session = Session(unet, device="auto", cache=False)
    assert (session.device, session.compute) == ("openvino", "bf16")
    np.testing.assert_array_equal(session.run(feeds)["out_sample"], expected)
    assert (session.device, session.compute) == ("cpu", "f32")
    Session(unet, device="auto", cache=False).run(feeds)
    (line,) = (each for each in caplog.messages if "device 'openvino' failed to initialise" in each)
    assert line.endswith("; trying cpu")
    for asked in ({"device": "openvino"}, {"device": "auto", "compute": "bf16"}):
        with pytest.raises(DeviceError, match="device 'openvino' failed to initialise"):
            Session(unet, cache=False, **asked).run(feeds)


def test_an_image_is_as_coarse_as_its_coarsest_component():
    computed = {(): "f32", ("f32",): "f32", ("f32", "f16"): "f16", ("bf16", "f32"): "bf16", ("bf16", "f16"): "bf16"}
    assert {each: coarsest(each) for each in computed} == computed


@pytest.mark.core
def test_an_image_says_what_it_was_computed_in(openvino, package):
    """OpenVINO itself, in what it chooses; in f32 the image is the CPU's, and says nothing of it."""
    asked = {"seed": 3, "width": 64, "height": 64, "num_inference_steps": 2}
    results = {}
    for device, compute in (("cpu", "auto"), ("openvino", "f32"), ("auto", "auto")):
        with sdonnx.load(package, device=device, compute=compute, threads=1) as pipe:
            results[device, compute] = pipe.generate("a cat", **asked)
    cpu, f32, chosen = results.values()
    assert (cpu.compute, f32.compute, chosen.compute) == ("f32", "f32", resolve_compute("openvino"))
    np.testing.assert_allclose(f32.latents, cpu.latents, atol=1e-4)
    if chosen.compute == "bf16":
        assert np.abs(chosen.latents - cpu.latents).max() > np.abs(f32.latents - cpu.latents).max()


def test_where_the_cpu_does_not_compute_so_a_lack_of_memory_is_an_error(monkeypatch, package):
    install_openvino(monkeypatch, openvino_device(capabilities=XEON))
    with sdonnx.load(package, compute="f32") as pipe:
        assert list(pipe.plan("a cat", memory="min").execution.avoided) == ["openvino"]
    with (
        sdonnx.load(package, compute="bf16") as pipe,
        pytest.raises(RequestError, match="20MB of memory is too little for this on openvino; give [0-9]+"),
    ):
        pipe.plan("a cat", memory="20MB")
