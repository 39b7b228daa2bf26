"""The predicted memory of a GPU: weights as torch counts them, activations by type and size, and how it is said."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from onnx import helper
from sdonnx_export.models.components import build
from sdonnx_export.operators.int8 import Int8Operators
from sdonnx_runtime.graphs.onnx_proto import decode_model
from sdonnx_runtime.graphs.shape_inference import TensorInfo, infer_shapes
from sdonnx_runtime.memory.device_memory import OUTSIDE, plan_device
from sdonnx_runtime.memory.estimates import Graph
from sdonnx_runtime.memory.planner import LoadedComponent
from support.cli import run_cli
from support.graphs import UNET, part_of, saved

import sdonnx


def loaded(path, name="unet", size=(8, 12)):
    height, width = size
    shapes = {"sample": (1, 4, height, width), "timestep": (), "encoder_hidden_states": (2, 77, 48)}
    inputs = tuple((name, TensorInfo(shape)) for name, shape in shapes.items())
    return LoadedComponent(component=name, graphs=(Graph(path=path, inputs=inputs),))


@pytest.fixture(scope="module")
def unets(tmp_path_factory):
    """A U-Net of torch, and its graphs by target and precision."""
    unet, graphs = UNet2DConditionModel(**UNET), {}
    part = part_of(unet)
    for target, precision in (("cuda", "fp16"), ("cuda", "fp32"), ("generic", "fp16"), ("generic", "fp32")):
        directory = tmp_path_factory.mktemp(f"{target}-{precision}")
        graphs[target, precision] = saved(build("unet", part, precision, target=target), directory)
    return unet, graphs


@pytest.mark.parametrize(
    ("target", "precision", "size"), [("cuda", "fp16", 2), ("cuda", "fp32", 4), ("generic", "fp16", 4)]
)
def test_weights_are_counted_as_a_device_holds_them(unets, target, precision, size):
    """Graphs for every device compute in float32: weights that they store in float16 are cast when they are opened."""
    unet, graphs = unets
    (planned,) = plan_device([[loaded(graphs[target, precision])]], "cuda").components
    wanted = size * sum(weight.numel() for weight in unet.parameters())
    norms = [module for module in unet.modules() if isinstance(module, torch.nn.GroupNorm)]
    wanted += (4 - size) * 2 * sum(norm.num_channels for norm in norms)  # whose weights are float32 on CUDA
    constants = planned.weights - wanted
    assert 0 < constants < 400


def test_activations_of_float16_take_half(unets):
    half, single, every = (
        plan_device([[loaded(unets[1][key], size=(64, 64))]], "cuda").components[0].activations
        for key in (("cuda", "fp16"), ("cuda", "fp32"), ("generic", "fp32"))
    )
    assert half / single == pytest.approx(0.5, abs=0.02)
    assert single <= every
    doubled = plan_device([[loaded(unets[1]["cuda", "fp16"], size=(128, 64))]], "cuda").components[0].activations
    assert doubled / half == pytest.approx(2, abs=0.05)


def test_the_sum_of_all_components_and_the_largest_one(unets):
    first, second = (loaded(unets[1]["cuda", precision], precision) for precision in ("fp16", "fp32"))
    plan = plan_device([[first], [second]], "webgpu:1")
    takes = [each.weights + each.activations for each in plan.components]
    assert plan.outside == OUTSIDE["webgpu"]
    assert plan.single_peak == plan.outside + takes[1] < plan.outside + sum(takes) == plan.resident_peak
    together = plan_device([[first, second]], "cuda")  # as a U-Net and its ControlNet are
    assert takes[1] < together.single_peak - together.outside < sum(takes)


@pytest.mark.parametrize("pads", [[1, 1, 1, 1], [0, 0, 1, 1]])
def test_shapes_of_operators_that_only_cuda_has(pads):
    attributes = {"strides": [2, 2], "pads": pads, "domain": "com.microsoft"}
    nodes = [
        helper.make_node("NhwcConv", ["x", "w", "b"], ["conv"], **attributes),
        helper.make_node("GroupNorm", ["conv", "b", "b"], ["norm"], groups=2, domain="com.microsoft"),
        helper.make_node("BiasSplitGelu", ["norm", "b"], ["y"], domain="com.microsoft"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "graph", [], []))
    values = {"x": TensorInfo((2, 7, 12, 3), 2), "w": TensorInfo((8, 3, 3, 3), 2), "b": TensorInfo((8,), 4)}
    assert len(list(infer_shapes(decode_model(memoryview(model.SerializeToString())).nodes, values))) == 3
    top, left, bottom, right = pads
    x = torch.nn.functional.pad(torch.zeros(2, 3, 7, 12), (left, right, top, bottom))
    n, _, height, width = torch.nn.functional.conv2d(x, torch.zeros(8, 3, 3, 3), stride=2).shape
    assert values["conv"] == values["norm"] == TensorInfo((n, height, width, 8), 2)
    assert values["y"] == TensorInfo((n, height, width, 4), 2)


def test_the_command(package):
    command = ("plan", package, "--device", "cuda", "--size", "64x64")
    planned = json.loads(run_cli(*command, "--json").stdout)
    unet = next(each for each in planned["components"] if each["component"] == "unet")
    stored = sum(path.stat().st_size for path in (package / "unet").glob("*.onnx*"))
    assert unet["disk"] == stored > unet["weights"] > 0.5 * stored
    shown = run_cli(*command).stdout
    assert "64x64 on cuda: 0.8 GB of VRAM" in shown
    assert "predicted, not measured" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "tpu"), "there is no device 'tpu'; choose auto, cuda"),
        (("--device", "cuda", "--memory", "2GB"), "--memory, --threads and --compute are about the CPU"),
        (("--device", "cuda", "--compute", "f32"), "are about the CPU and openvino; leave them out with --device cuda"),
    ],
)
def test_what_has_no_meaning_is_refused(package, options, message):
    ran = run_cli("plan", package, *options)
    assert ran.returncode == 2
    assert message in " ".join(ran.stderr.split())


def test_int8_has_no_kernels_on_a_gpu(unets, tmp_path):
    path = saved(build("unet", part_of(unets[0]), "int8", Int8Operators), tmp_path)
    with pytest.raises(sdonnx.RequestError, match=r"the unet computes in int8, for which cuda has no kernels; export"):
        plan_device([[loaded(path)]], "cuda")


def test_a_package_is_planned_for_what_it_is_made_for(package, tmp_path):
    shutil.copytree(package, made_for_cuda := tmp_path / "cuda")
    manifest = made_for_cuda / "sdonnx.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "target": "cuda"}))
    assert "on cuda: 0.8 GB of VRAM" in run_cli("plan", made_for_cuda).stdout
    ran = run_cli("plan", made_for_cuda, "--device", "webgpu")
    assert ran.returncode != 0
    assert "the package is made for CUDA" in " ".join(ran.stderr.split())
