"""What an adapter's kernels can't do, and graphs that are rewritten around it; the CPU's kernels are the measure."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from sdonnx_runtime.errors import DeviceError
from sdonnx_runtime.execution.devices.fitting import fit_graph
from sdonnx_runtime.execution.devices.kernel_checks import KernelChecks
from sdonnx_runtime.execution.session import Session


def run_on_cpu(model, x):
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


class Checks:
    """What an adapter can do, as given."""

    def __init__(self, *, attends=True, has_float16=True):
        self.attends, self.has_float16 = lambda _heads: attends, has_float16


@pytest.fixture(scope="module")
def half(checkpoint, export_once, tmp_path_factory):
    """A package whose weights are stored in fp16."""
    return export_once(checkpoint, tmp_path_factory.mktemp("half") / "tiny-onnx", precision="fp16")


def test_right_kernels_pass():
    checks = KernelChecks(run_on_cpu)
    assert checks.attends(8) and checks.attends(1)


def test_attention_that_counts_some_keys_twice_is_wrong():
    def run(model, x):
        repeated = np.concatenate([x[:, :4], x], axis=1)
        return run_on_cpu(model.replace(b"\x08\x40", b"\x08\x44"), repeated)[:, 4:]  # 64 tokens become 68

    checks = KernelChecks(run)
    assert not checks.attends(8) and not checks.attends(1)


def test_a_kernel_that_fails_is_not_used_and_tried_once():
    tried = []

    def run(model, x):
        tried.append(x.shape)
        if x.shape[-1] == 512:
            raise RuntimeError("the total use of workgroup storage is larger than the maximum allowed")
        return run_on_cpu(model, x)

    checks = KernelChecks(run)
    assert [checks.attends(1), checks.attends(1), checks.attends(8)] == [False, False, True]
    assert len(tried) == 2


@pytest.mark.parametrize("model", [None, b""])
def test_nothing_to_rewrite(package, model):
    path = package / "unet" / "model.onnx"
    model = None if model is None else path.read_bytes()
    assert fit_graph(path, model, Checks()) is model


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_a_rewritten_graph_computes_the_same(half, component, rng):
    path = half / component / "model.onnx"
    fitted = fit_graph(path, None, Checks(attends=False, has_float16=False))
    graph = onnx.load_from_string(fitted).graph
    assert "MultiHeadAttention" not in {node.op_type for node in graph.node}
    stored = {each.name for each in graph.initializer if each.data_type == TensorProto.FLOAT16}
    assert {node.op_type for node in graph.node if stored & {*node.input}} == {"Cast"}
    whole = Session(path, device="cpu")
    shapes = {port.name: [size if isinstance(size, int) else 2 for size in port.shape] for port in whole.inputs}
    feeds = {name: np.asarray(rng.random(shape), np.float32) for name, shape in shapes.items()}
    if component == "text_encoder":
        feeds = {"input_ids": rng.integers(0, 99, shapes["input_ids"])}
    expected, found = whole.run(feeds), Session(path, model=fitted, device="cpu").run(feeds)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-4)


def test_a_graph_that_computes_in_fp16_needs_an_adapter_with_it(checkpoint, export_once, tmp_path):
    package = export_once(checkpoint, tmp_path / "tiny-onnx", target="webgpu")
    path = package / "unet" / "model.onnx"
    assert fit_graph(path, None, Checks()) is None
    with pytest.raises(DeviceError, match="fp16, which this adapter does not; export the package with --precision"):
        fit_graph(path, None, Checks(has_float16=False))


@pytest.mark.parametrize(("channels", "padded"), [(9, 12), (6, 8), (3, 3), (4, 4), (12, 12)])
def test_channels_in_threes_are_padded(channels, padded, tmp_path, rng):
    weight = numpy_helper.from_array(rng.standard_normal((8, channels, 3, 3), np.float32), "w")
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in "xy"]
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)
    graph = helper.make_graph([node], "graph", ports[:1], ports[1:], [weight])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    fitted = fit_graph(path, None, Checks())
    assert (fitted is None) == (padded == channels)
    if fitted is not None:
        x = rng.standard_normal((2, channels, 5, 7), np.float32)
        assert [node.op_type for node in onnx.load_from_string(fitted).graph.node] == ["Constant", "Pad", "Pad", "Conv"]
        expected = onnxruntime.InferenceSession(path).run(None, {"x": x})[0]
        np.testing.assert_allclose(run_on_cpu(fitted, x), expected, atol=1e-5)
