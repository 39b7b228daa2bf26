"""Graphs run a stage at a time, against the whole; shape inference against ONNX Runtime's."""

import threading
import tracemalloc

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from sdonnx_export.export import export
from sdonnx_export.operators.partition import cut
from sdonnx_export.operators.precision import PRECISIONS
from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.adapters.merging import load_adapters, merge_weights
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.execution.staged_model import StagedModel, open_model
from sdonnx_runtime.execution.strategy import ExecutionPlan, ExecutionStrategy
from sdonnx_runtime.graphs import shape_inference as shapes
from sdonnx_runtime.graphs import split_convs
from sdonnx_runtime.graphs.partition import read_stages
from sdonnx_runtime.memory.constants import MERGE_LINEAR
from sdonnx_runtime.memory.estimates import merging_bytes
from sdonnx_runtime.memory.planner import Plan
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.pipeline import Pipeline
from support.controls import adapter, controlnet
from support.families import sd1, sd2, sdxl, tiny_vae
from support.images import photograph
from support.ip_adapters import image_encoder, ip_adapter, save_ip_adapter

import sdonnx

ASKED = {"width": 64, "height": 96, "num_inference_steps": 2, "guidance_scale": 5.0, "seed": 3}
FAMILIES = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl}


@pytest.fixture(scope="module")
def made(export_once, tmp_path_factory):
    """A family's package of a precision; made once."""
    directory, known = tmp_path_factory.mktemp("low-memory"), {}

    def get(family, precision="fp32"):
        if family not in known:
            known[family] = directory / family
            FAMILIES[family]().save_pretrained(known[family])
        if (family, precision) not in known:
            output = directory / f"{family}-{precision}"
            known[family, precision] = export_once(known[family], output, precision=precision, calibration="fast")
        return known[family, precision]

    return get


def whole_and_low(package, request="a cat", loading=None, **changes):
    """Latents of a request, and what they are with little memory."""
    results = []
    for memory in ("auto", "min"):
        with sdonnx.load(package, memory=memory, **(loading or {})) as pipe:
            results.append(pipe.generate(request, **{**ASKED, **changes}))
    assert np.abs(results[0].latents).max() > 0.1
    return [result.latents for result in results]


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize(
    ("family", "precision"),
    [*(("sd1", precision) for precision in PRECISIONS), ("sd2", "fp32"), ("sdxl", "fp32"), ("sdxl", "int8")],
)
def test_stages_give_bit_by_bit_what_the_whole_gives(family, precision, made):
    np.testing.assert_array_equal(*whole_and_low(made(family, precision)))


@pytest.mark.core
@pytest.mark.usefixtures("all_threads")
def test_the_bundled_model_too():
    np.testing.assert_array_equal(*whole_and_low("pictogram", "a red apple on a blue background", width=64, height=64))


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_interval": 2, "num_inference_steps": 4},
        {"token_downsampling": True},
        {**sdonnx.FAST, "num_inference_steps": 4},
        {"image": photograph(), "strength": 0.7},
        {"guidance_scale": 1},
        {"tiling": "xy"},
        {"tiling": "x", "image": photograph(), "strength": 0.7, **sdonnx.FAST},
        {"num_images": 2, "guidance_interval": (1.0, 5.0), "num_inference_steps": 4},
    ],
    ids=lambda changes: "+".join(changes),
)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_whatever_is_asked(precision, changes, made):
    np.testing.assert_array_equal(*whole_and_low(made("sd1", precision), **changes))


@pytest.mark.parametrize("make", [controlnet, adapter])
def test_stages_with_a_controlnet(make, made, tmp_path):
    net = make(sd1().unet) if make is controlnet else make()
    net.save_pretrained(tmp_path / "net")
    package = export(str(tmp_path / "net"), tmp_path / "package")
    control = sdonnx.Control(image=photograph())
    merge_weights = whole_and_low(made("sd1"), loading={"controls": [package]}, controls=(control,))
    np.testing.assert_array_equal(*merge_weights)
    assert not np.array_equal(merge_weights[0], whole_and_low(made("sd1"))[0])


LAYERS = (("unet", "attn1.to_k"), ("unet", "ff.net.0.proj"), ("unet", "conv1"), ("text_encoder", "mlp.fc1"))


def lora(pipe, directory, layers=LAYERS):
    """A file that changes the last layer of each kind."""
    state = {}
    for part, end in layers:
        name, layer = [each for each in getattr(pipe, part).named_modules() if each[0].endswith(end)][-1]
        outputs, inputs, *kernel = layer.weight.shape
        state[f"{part}.{name}.lora_A.weight"] = torch.randn(4, inputs, *kernel) / 4
        state[f"{part}.{name}.lora_B.weight"] = torch.randn(outputs, 4, *[1 for _ in kernel]) / 4
    save_file(state, directory / "lora.safetensors")
    return directory / "lora.safetensors"


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_with_an_adapter(precision, made, tmp_path):
    package = made("sd1", precision)
    merge_weights = whole_and_low(package, loading={"loras": [lora(sd1(), tmp_path)]})
    np.testing.assert_array_equal(*merge_weights)
    assert not np.array_equal(merge_weights[0], whole_and_low(package)[0])


@pytest.mark.parametrize("layer", ["conv1", "ff.net.0.proj"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_merging_a_lora_takes_the_planned_memory(precision, layer, made, tmp_path):
    package, file = Package.open(made("sd1", precision)), lora(sd1(), tmp_path, [("unet", layer)])
    path, changes = package.graph("unet"), load_adapters(package, [Lora.of(file)]).deltas["unet"]
    stages, traced = read_stages(path).stages, []
    for stage in stages:
        merge_weights(path, stage.weights, changes)
        tracemalloc.start()
        merge_weights(path, stage.weights, changes)
        traced.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    planned = max(merging_bytes(stage, frozenset(changes))[1] for stage in stages)
    is_narrow = layer != "conv1" and precision in ("fp32", "fp16", "int8")  # they take an array less than the plan's
    needed = planned * (1 - 1 / MERGE_LINEAR) if is_narrow else planned
    assert 0.9 * needed < max(traced) < 1.1 * needed


@pytest.mark.parametrize(("adapted", "tiling"), [(False, None), (True, None), (True, "xy")])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_split_convolutions_give_the_same(precision, adapted, tiling, made, tmp_path, monkeypatch):
    loading = {"loras": [lora(sd1(), tmp_path)]} if adapted else {}
    package = made("sd1", precision)
    expected = sdonnx.load(package, **loading).generate("a cat", tiling=tiling, **ASKED)
    monkeypatch.setattr(split_convs, "LIMIT", 80_000)
    weights = {name for stage in read_stages(package / "unet" / "model.onnx").stages for name in stage.weights}
    assert "mid_block.resnets.0.conv1.weight_32" in weights
    found = sdonnx.load(package, memory="min", **loading).generate("a cat", tiling=tiling, **ASKED)
    np.testing.assert_array_equal(found.latents, expected.latents)


def test_stages_are_those_that_an_export_cuts(made):
    """By the onnx_ir library."""
    package = Package.open(made("sdxl", "int8"))
    for component, listed in package.manifest.components.items():
        for graph in listed.graphs.values():
            found, wanted = read_stages(package.root / graph), cut(ir.load(package.root / graph))
            assert len(found.stages) == len(wanted) > (1 if component == "unet" else 0)
            for mine, theirs in zip(found.stages, wanted, strict=True):
                assert set(mine.inputs) == {each.name for each in theirs.graph.inputs}
                assert set(mine.outputs) == {each.name for each in theirs.graph.outputs}
                assert set(mine.weights) == set(theirs.graph.initializers)


def test_no_more_than_one_stage_is_open(made, monkeypatch):
    alive, most = set(), [0, 0]

    class Watched(Session):
        def __init__(self, path, **options):
            super().__init__(path, **options)
            alive.add(id(self))
            most[:] = [max(most[0], len(alive)), most[1] + 1]

        def __del__(self):
            alive.discard(id(self))

    monkeypatch.setattr("sdonnx_runtime.execution.staged_model.Session", Watched)
    sdonnx.load(made("sdxl"), memory="min").generate("a cat", **ASKED)
    assert most[0] == 1
    assert most[1] > 2 * len(read_stages(made("sdxl") / "unet" / "model.onnx").stages)


def test_a_run_is_cancelled_between_stages(made, monkeypatch):
    stream = sdonnx.load(made("sd1"), memory="min").stream("a cat", **ASKED)
    next(stream)
    stages, real = [], StagedModel._run_stage

    def run(self, index, values):
        stages.append(index)
        if len(stages) == 3:
            closer = threading.Thread(target=stream.close)
            closer.start()
            closer.join()
        return real(self, index, values)

    monkeypatch.setattr(StagedModel, "_run_stage", run)
    assert list(stream) == []
    assert len(stages) == 3


def test_a_missing_graph_input_is_named(made):
    path = made("sd1") / "unet" / "model.onnx"
    chain = StagedModel(path, read_stages(path), {})
    with pytest.raises(
        sdonnx.PackageError, match="requires input 'encoder_hidden_states', which this version does not"
    ):
        chain.run({"sample": np.ones((1, 4, 8, 8), np.float32), "timestep": np.array(1, np.float32)})


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_truncated_graph_is_named(keep, made, tmp_path):
    data = (made("sd1") / "unet" / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(sdonnx.PackageError, match="model.onnx is damaged"):
        read_stages(tmp_path / "model.onnx")
    with pytest.raises(sdonnx.PackageError, match="can't be read"):
        read_stages(tmp_path / "nothing.onnx")


SIZES = {"batch": 2, "states": 1, "height": 16, "width": 24, "tokens": 77, "pooled": 64, "ids": 6, "images": 1}
SIZES |= {"image_height": 128, "image_width": 192, "image_prompts": 2, "image_tokens": 4, "patches": 17}


def compare_shapes(path, *, circular="", has_wrap=True, **sizes):
    """Of every value in a graph, against ONNX Runtime's."""
    (stage,) = read_stages(path, cut=False, circular=circular, has_wrap=has_wrap).stages
    model = onnx.load_from_string(stage.model)
    onnx.load_external_data_for_model(model, str(path.parent))
    del model.graph.value_info[:]
    known = {each.name for each in model.graph.output}
    names = dict.fromkeys(name for node in model.graph.node for name in node.output if name not in known)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    feeds, sizes = {}, {**SIZES, **sizes}
    for port in session.get_inputs():
        free = dict.fromkeys((f"{port.name}.{axis}" for axis in ("batch", "channels", "height", "width")), 1)
        shape = [size if isinstance(size, int) else {**free, **sizes}[size] for size in port.shape]
        feeds[port.name] = np.ones(shape, np.int64 if port.type == "tensor(int64)" else np.float32)
    given = dict(zip((each.name for each in session.get_outputs()), session.run(None, feeds), strict=True))
    values = {name: shapes.TensorInfo.of(each) for name, each in feeds.items()}
    for name, weight in stage.weights.items():
        inside = weight.read() if not weight.external else None
        values[name] = shapes.TensorInfo(weight.shape, weight.length / max(np.prod(weight.shape), 1), inside)
    for _ in shapes.infer_shapes(stage.nodes, values):
        pass
    assert len(given) > 10
    assert {name: (values[name].shape, values[name].itemsize) for name in given} == {
        name: (each.shape, each.itemsize) for name, each in given.items()
    }


@pytest.mark.parametrize(
    ("family", "precision"), [*(("sd1", precision) for precision in PRECISIONS), ("sdxl", "fp32"), ("sdxl", "int8")]
)
def test_shapes_are_those_of_onnx_runtime(family, precision, made):
    package = Package.open(made(family, precision))
    for component, listed in package.manifest.components.items():
        for variant in listed.graphs:
            if not variant.startswith("cached"):
                compare_shapes(package.graph(component, variant))


@pytest.mark.parametrize("has_wrap", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_shapes_with_circular_padding(precision, has_wrap, made):
    package = Package.open(made("sd1", precision))
    for component in ("unet", "vae_decoder"):
        compare_shapes(package.graph(component), circular="xy", has_wrap=has_wrap)


@pytest.mark.parametrize("make", [controlnet, adapter, tiny_vae])
def test_shapes_of_what_goes_with_a_model(make, tmp_path):
    (make(sd1().unet) if make is controlnet else make()).save_pretrained(tmp_path / "net")
    alone = make is tiny_vae
    source, vae = (None, str(tmp_path / "net")) if alone else (str(tmp_path / "net"), None)
    package = Package.open(export(source, tmp_path / "package", vae=vae))
    for component in package.manifest.components:
        compare_shapes(package.graph(component), **({"height": 128, "width": 192} if component == "adapter" else {}))


def test_shapes_of_an_ip_adapter(tmp_path):
    image_encoder().save_pretrained(tmp_path / "image_encoder")
    source = save_ip_adapter(ip_adapter(sd1().unet, plus=True), tmp_path / "adapter.safetensors")
    package = Package.open(export(str(source), tmp_path / "package"))
    for component in package.manifest.components:
        compare_shapes(package.graph(component))


STRATEGIES = {
    "split batch": ExecutionStrategy(split_batch=True),
    "staged": ExecutionStrategy(staged=True),
    "staged, split batch": ExecutionStrategy(split_batch=True, staged=True),
    "some resident": ExecutionStrategy(staged=True, resident_stages=frozenset({("model.onnx", 0), ("model.onnx", 3)})),
    "all resident, no arena": ExecutionStrategy(
        staged=True, no_arena=True, resident_stages=frozenset(("model.onnx", index) for index in range(99))
    ),
    "no arena": ExecutionStrategy(no_arena=True),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_strategy_gives_the_same(strategy, precision, made, monkeypatch):
    package = made("sd1", precision)
    expected = sdonnx.load(package).generate("a cat", **ASKED)
    execution = ExecutionPlan(default=STRATEGIES[strategy])
    plan = Plan(components=(), minimum_budget=0, execution=execution)
    monkeypatch.setattr(Pipeline, "plan", lambda *_, **__: plan)
    found = sdonnx.load(package).generate("a cat", **ASKED)
    np.testing.assert_array_equal(found.latents, expected.latents)
    np.testing.assert_array_equal(np.asarray(found.images[0]), np.asarray(expected.images[0]))


@pytest.mark.parametrize(("precision", "rows"), [("fp32", 1), ("fp16", 1), ("int8", 2), ("int4", 2)])
def test_the_batch_is_split_where_that_gives_the_same(precision, rows, made, monkeypatch):
    seen, run = set(), Session.run

    def watched(self, feeds):
        seen.update(len(feeds[port.name]) for port in self.inputs if port.name == "encoder_hidden_states")
        return run(self, feeds)

    monkeypatch.setattr(Session, "run", watched)
    path, generator = made("sd1", precision) / "unet" / "model.onnx", np.random.default_rng(4)
    model = open_model(path, {}, ExecutionStrategy(split_batch=True, staged=True), device="cpu")
    feeds = {"sample": (1, 4, 8, 8), "encoder_hidden_states": (2, 77, 64), "timestep": ()}
    outputs = model.run({name: generator.standard_normal(shape).astype(np.float32) for name, shape in feeds.items()})
    assert outputs["out_sample"].shape == (2, 4, 8, 8)
    assert seen == {rows}


def test_resident_stages_are_opened_once(made, monkeypatch):
    opened = []

    class Watched(Session):
        def __init__(self, path, **options):
            super().__init__(path, **options)
            opened.append(options["model"])

    monkeypatch.setattr("sdonnx_runtime.execution.staged_model.Session", Watched)
    path = made("sd1") / "unet" / "model.onnx"
    stages = read_stages(path)
    chain = StagedModel(path, stages, {}, resident_stages={1, 2}, device="cpu")
    feeds = {"sample": np.ones((1, 4, 8, 8), np.float32), "encoder_hidden_states": np.ones((2, 77, 64), np.float32)}
    for _ in range(3):
        chain.run({**feeds, "timestep": np.array(1, np.float32)})
    assert [opened.count(stage.model) for stage in stages.stages] == [
        1 if place in (1, 2) else 3 for place in range(len(stages.stages))
    ]
