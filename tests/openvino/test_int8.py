"""Graphs in 8 bits for OpenVINO: ranges against torch's hooks, layers against torch with the same rounding, images."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from sdonnx_export.export import export
from sdonnx_export.models.components import build
from sdonnx_export.operators.openvino import OpenVinoOperators
from sdonnx_export.operators.quantized import Range
from sdonnx_export.quantization.calibration import TappedOperators
from sdonnx_models import bundled
from sdonnx_runtime.adapters.merging import load_adapters
from sdonnx_runtime.packages.package import Package
from support.cli import run_cli
from support.graphs import UNET, part_of, run, unet_feeds, unet_reference
from support.paths import ROOT

import sdonnx

LAYERS = (
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "up_blocks.1.resnets.0.conv_shortcut",
    "up_blocks.0.upsamplers.0.conv",
    "mid_block.attentions.0.proj_in",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v",
    "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
)


ATTENTION = "up_blocks.1.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """A U-Net, its part, what it is given, and the taps of its graph."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET)
    with torch.no_grad():
        unet.get_submodule(f"{ATTENTION}.to_q").weight *= 20  # scores large enough for their rounding to be seen
    part, feeds = part_of(unet), unet_feeds(unet.config, height=32, width=48)
    tapped = build("unet", part, "int8", partial(TappedOperators, target="openvino"))
    outputs = run(tapped, tmp_path_factory.mktemp("observed"), **feeds)
    return unet, part, feeds, {key[6:]: value for key, value in outputs.items() if key.startswith("range:")}


def as_ranges(taps):
    return {name: Range.from_min_max(float(low), float(high)) for name, (low, high) in taps.items()}


def test_ranges_are_those_that_torch_sees(observed):
    """Of the inputs of all int8 layers, and of all queries and keys."""
    unet, _, feeds, taps = observed
    expected = {}

    def see(name, module, inputs, output):
        if f"{name}.weight" in taps:
            expected[f"{name}.weight"] = [float(inputs[0].min()), float(inputs[0].max())]
        if name.endswith((".to_q", ".to_k")):
            expected[f"{name}.weight.output"] = [float(output.min()), float(output.max())]

    hooks = [module.register_forward_hook(partial(see, name)) for name, module in unet.named_modules()]
    unet_reference(unet, feeds)
    for hook in hooks:
        hook.remove()
    assert taps.keys() == expected.keys()
    assert taps.keys() >= {f"{layer}.weight" for layer in LAYERS}
    for name, ends in taps.items():
        np.testing.assert_allclose(ends, expected[name], atol=1e-4, err_msg=name)


def rounded(x, span):
    return torch.fake_quantize_per_tensor_affine(x, span.scale, span.zero, 0, 255)


def rounded_weight(weight):
    scales = weight.abs().amax(dim=tuple(range(1, weight.ndim))) / 127
    return torch.fake_quantize_per_channel_affine(
        weight, scales, torch.zeros(len(scales), dtype=torch.int32), 0, -127, 127
    )


def relative(found, expected):
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_rounds_as_torch_does(layer, observed, tmp_path, monkeypatch):
    unet, part, feeds, taps = observed
    name, span = f"{layer}.weight", as_ranges(taps)[f"{layer}.weight"]

    def operators(graph, weights, _precisions):
        return OpenVinoOperators(graph, weights, lambda each: "int8" if each == name else "fp32", {name: span})

    found = run(build("unet", part, "int8", operators), tmp_path, **feeds)["out_sample"]
    exact, module = unet_reference(unet, feeds), unet.get_submodule(layer)
    weight, bias = rounded_weight(module.weight.detach()), module.bias
    if isinstance(module, torch.nn.Linear):
        apply = partial(torch.nn.functional.linear, weight=weight, bias=bias)
    else:
        geometry = {"stride": module.stride, "padding": module.padding}
        apply = partial(torch.nn.functional.conv2d, weight=weight, bias=bias, **geometry)
    monkeypatch.setattr(module, "forward", lambda x, *_: apply(rounded(x, span)))
    expected = unet_reference(unet, feeds)
    assert relative(found, expected) < relative(expected, exact) / 20


def test_scores_are_products_of_rounded_queries_and_keys(observed, tmp_path, monkeypatch):
    unet, part, feeds, taps = observed
    names = [f"{ATTENTION}.{each}" for each in ("to_q", "to_k")]
    ranges = {f"{name}.weight.output": as_ranges(taps)[f"{name}.weight.output"] for name in names}

    def operators(graph, weights, _precisions):
        return OpenVinoOperators(graph, weights, lambda _name: "fp32", ranges)

    found = run(build("unet", part, "int8", operators), tmp_path, **feeds)["out_sample"]
    exact = unet_reference(unet, feeds)

    def rounding(forward, scale):
        return lambda x: torch.fake_quantize_per_tensor_affine(forward(x), scale, 0, -128, 127)

    for name in names:
        module, largest = unet.get_submodule(name), float(np.abs(taps[f"{name}.weight.output"]).max())
        scale = ranges[f"{name}.weight.output"].symmetric_scale
        assert abs(127 * scale - largest) < scale
        monkeypatch.setattr(module, "forward", rounding(module.forward, scale))
    expected = unet_reference(unet, feeds)
    assert relative(found, expected) < relative(expected, exact) / 10


@pytest.fixture(scope="module")
def pictogram(tmp_path_factory):
    """The bundled model in 8 bits for OpenVINO, calibrated on images of its own kind."""
    directory = tmp_path_factory.mktemp("pictogram")
    (directory / "prompts.txt").write_text("a cat on a blue background\na red apple on a white background\n")
    checkpoint, prompts = ROOT / "models" / "pictogram" / "checkpoint", str(directory / "prompts.txt")
    defaults = {"size": 64, "guidance_scale": 4.0}
    return export(
        str(checkpoint), directory / "int8", target="openvino", precision="int8", calibration=prompts, defaults=defaults
    )


SETTINGS = {"num_inference_steps": 25, "guidance_scale": 4.0, "sampler": "dpmpp_2m", "width": 64, "height": 64}
CAPTIONS = ("a tiger on a white background", "a house on a green background", "a pear on a pink background")


def draw(package, device, loras=()):
    with sdonnx.load(package, device=device, keep_loaded=True) as pipe:
        pipe.set_loras(loras)
        images = [pipe.generate(text, seed=seed, **SETTINGS).images[0] for seed, text in enumerate(CAPTIONS)]
    return np.stack([np.asarray(image, np.float32) for image in images])


def decibels(found, expected):
    return float(np.median(10 * np.log10(255**2 / np.square(found - expected).mean(axis=(1, 2, 3)))))


def test_images_in_8_bits_are_those_of_float32(pictogram, on_openvino):
    found = on_openvino(draw, pictogram, "openvino")
    assert decibels(found, draw(bundled()["pictogram"], "cpu")) > 30


def test_so_they_are_with_a_lora(pictogram, on_openvino):
    lora = sdonnx.Lora(path=ROOT / "models" / "pictogram" / "adapters" / "grey.safetensors")
    assert load_adapters(Package.open(pictogram), [lora]).deltas
    plain, expected = (draw(bundled()["pictogram"], "cpu", each) for each in ((), (lora,)))
    found = on_openvino(draw, pictogram, "openvino", (lora,))
    assert decibels(found, expected) > 28 > decibels(plain, expected) + 5


def test_another_device_refuses_the_package(pictogram, tmp_path):
    ran = run_cli("run", "a cat", "-m", pictogram, "--device", "cpu", "-o", "cat.png", cwd=tmp_path)
    assert ran.returncode != 0
    assert "made for OpenVINO" in ran.stderr
    assert "--device openvino" in ran.stderr
    assert list(tmp_path.iterdir()) == []
