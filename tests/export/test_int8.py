"""8 bits and less: layers against torch with the same rounding, ranges against torch's hooks, exports whole or not."""

from functools import partial

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from onnx.reference import ReferenceEvaluator
from sdonnx_export.export import export
from sdonnx_export.models.components import build
from sdonnx_export.operators.int8 import Int8Operators
from sdonnx_export.operators.precision import make_precision_lookup
from sdonnx_export.operators.quantized import Range
from sdonnx_export.quantization import calibration
from sdonnx_export.quantization.calibration import TappedOperators
from sdonnx_models import bundled
from sdonnx_runtime.adapters.quantization import BLOCK, block_scales, channel_scales, quantize_int4, quantize_int8
from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.execution import cpu
from sdonnx_runtime.execution.session import Session
from sdonnx_runtime.packages.package import Package
from support.cli import run_cli
from support.graphs import (
    UNET,
    UNET_VARIATIONS,
    VAE,
    VAE_VARIATIONS,
    part_of,
    run,
    unet_feeds,
    unet_reference,
)
from support.paths import ROOT

import sdonnx

IN_FLOAT32 = partial(lambda graph, weights, _precisions: Int8Operators(graph, weights, lambda _name: "fp32"))


@pytest.mark.core
@pytest.mark.parametrize("variation", UNET_VARIATIONS)
def test_channels_last_equals_diffusers(variation, tmp_path):
    """The layout of int8 graphs, without 8 bits."""
    unet = UNet2DConditionModel(**{**UNET, **UNET_VARIATIONS[variation]})
    part = part_of(unet)
    feeds = unet_feeds(unet.config, height=10 if variation == "plain" else 8)
    found = run(build("unet", part, "fp32", IN_FLOAT32), tmp_path, **feeds)["out_sample"]
    np.testing.assert_allclose(found, unet_reference(unet, feeds), atol=3e-5)


@pytest.mark.core
@pytest.mark.parametrize("variation", VAE_VARIATIONS)
def test_channels_last_vae_equals_diffusers(variation, tmp_path, rng):
    vae = AutoencoderKL(**{**VAE, **VAE_VARIATIONS[variation]})
    part = part_of(vae)
    latents = rng.standard_normal((2, vae.config.latent_channels, 6, 4), np.float32)
    found = run(build("vae_decoder", part, "fp32", IN_FLOAT32), tmp_path, latent_sample=latents)["sample"]
    with torch.no_grad():
        np.testing.assert_allclose(found, vae.decode(torch.from_numpy(latents)).sample.numpy(), atol=1e-4)


def test_ranges_are_those_that_torch_sees(tmp_path):
    unet = UNet2DConditionModel(**UNET)
    part, feeds = part_of(unet), unet_feeds(unet.config)
    outputs = run(build("unet", part, "int8", TappedOperators), tmp_path, **feeds)
    expected = {}

    def see(name, module, inputs, output):
        bias = module.bias.reshape(-1, 1, 1)
        for key, seen in ((f"{name}.weight", inputs[0]), (f"{name}.weight.output", output - bias)):
            expected[f"range:{key}"] = [float(seen.min()), float(seen.max())]

    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3) and "conv_" not in name:
            module.register_forward_hook(partial(see, name))
    found = {key: value for key, value in outputs.items() if key.startswith("range:")}
    np.testing.assert_allclose(outputs["out_sample"], unet_reference(unet, feeds), atol=2e-5)
    assert found.keys() == expected.keys()
    for name, ends in found.items():
        np.testing.assert_allclose(ends, expected[name], atol=1e-4, err_msg=name)


def dynamic(x):
    """Through 256 codes from the least to the greatest."""
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (high - low) / 255
    return torch.fake_quantize_per_tensor_affine(x, scale, round(-low / scale), 0, 255)


def known(x, span):
    return torch.fake_quantize_per_tensor_affine(x, span.scale, span.zero, 0, 255)


def rounded_weight(weight):
    scales = weight.abs().amax(dim=tuple(range(1, weight.ndim))) / 127
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -127, 127)


def in_8_bits(module, name, ranges, border):
    """What an int8 layer does, in torch: inputs, weights and what kernels give are rounded."""
    weight = module.weight.detach()
    if isinstance(module, torch.nn.Linear):
        return lambda x: torch.nn.functional.linear(dynamic(x), rounded_weight(weight), module.bias)
    apply = partial(torch.nn.functional.conv2d, stride=module.stride, padding=module.padding)
    bias = module.bias.reshape(-1, 1, 1)
    if module.kernel_size == (1, 1):
        parts = [slice(0, border), slice(border, None)] if border is not None else [slice(None)]
        return lambda x: sum(apply(dynamic(x[:, part]), rounded_weight(weight[:, part])) for part in parts) + bias
    read, given = ranges[f"{name}.weight"], ranges[f"{name}.weight.output"]
    return lambda x: known(apply(known(x, read), rounded_weight(weight)), given) + bias


def ranges_of(part, directory, feeds, component="unet"):
    seen = run(build(component, part, "int8", TappedOperators), directory, **feeds)
    ends = {name.removeprefix("range:"): value for name, value in seen.items() if name.startswith("range:")}
    return {name: Range.from_min_max(float(low), float(high)) for name, (low, high) in ends.items()}


LAYERS = {
    "down_blocks.0.resnets.0.conv1": None,
    "down_blocks.0.resnets.1.conv2": None,
    "down_blocks.0.downsamplers.0.conv": None,
    "down_blocks.1.resnets.0.conv_shortcut": None,
    "up_blocks.0.resnets.0.conv_shortcut": 64,  # so many of its channels don't come over a skip connection
    "up_blocks.1.resnets.0.conv_shortcut": 64,
    "up_blocks.1.resnets.2.conv_shortcut": 32,
    "up_blocks.0.upsamplers.0.conv": None,
    "mid_block.attentions.0.proj_in": None,
    "up_blocks.1.attentions.0.proj_out": None,
    "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": None,
    "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v": None,
    "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0": None,
    "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj": None,
    "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2": None,
}


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """A U-Net, its part, what it is given, the ranges of its layers and what it makes."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET)
    # An image large enough: one code of the least layer's 24,576 that falls the other way is 2 % of rounding's error.
    part, feeds = part_of(unet), unet_feeds(unet.config, height=32, width=48)
    return unet, part, feeds, ranges_of(part, tmp_path_factory.mktemp("observed"), feeds), unet_reference(unet, feeds)


@pytest.mark.core
@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_rounds_as_torch_does(layer, observed, tmp_path, monkeypatch):
    """One alone: where many round, a code that falls the other way moves others, and nothing can be compared."""
    unet, part, feeds, ranges, exact = observed

    def operators(graph, weights, _precisions):
        return Int8Operators(graph, weights, lambda name: "int8" if name == f"{layer}.weight" else "fp32", ranges)

    found = run(build("unet", part, "int8", operators), tmp_path, **feeds)["out_sample"]
    module = unet.get_submodule(layer)
    monkeypatch.setattr(module, "forward", in_8_bits(module, layer, ranges, LAYERS[layer]))
    expected = unet_reference(unet, feeds)
    assert relative(found, expected) < relative(expected, exact) / 20


@pytest.mark.core
@pytest.mark.parametrize("variation", UNET_VARIATIONS)
def test_int8_unet_is_near_diffusers(variation, tmp_path):
    unet = UNet2DConditionModel(**{**UNET, **UNET_VARIATIONS[variation]})
    part, feeds = part_of(unet), unet_feeds(unet.config, height=10 if variation == "plain" else 8)
    model = build("unet", part, "int8", partial(Int8Operators, ranges=ranges_of(part, tmp_path, feeds)))
    assert relative(run(model, tmp_path, **feeds)["out_sample"], unet_reference(unet, feeds)) < 0.04


@pytest.mark.core
def test_cpus_whose_int8_kernels_may_overflow_take_slower_ones(tmp_path, monkeypatch):
    """The same codes and sums, whatever the kernel."""
    unet = UNet2DConditionModel(**UNET)
    part, feeds = part_of(unet), unet_feeds(unet.config)
    model = build("unet", part, "int8", partial(Int8Operators, ranges=ranges_of(part, tmp_path, feeds)))
    results = []
    for feature in ("avx512_vnni", "avx2"):
        monkeypatch.setattr(cpu, "cpu_features", lambda feature=feature: {feature})
        monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
        results.append(run(model, tmp_path, **feeds)["out_sample"])
    assert relative(results[1], unet_reference(unet, feeds)) < 0.04
    assert relative(*results) < 0.04


def relative(found, expected):
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


@pytest.mark.core
@pytest.mark.parametrize("precision", ["int8-weights", "int4"])
def test_weights_alone_in_codes(precision, tmp_path):
    """Equals torch with weights that onnx's own reference made of the codes."""
    unet = UNet2DConditionModel(**{**UNET, "cross_attention_dim": 64})
    part, feeds = part_of(unet), unet_feeds(unet.config)
    directory = tmp_path / precision
    directory.mkdir()
    found = run(build("unet", part, precision), directory, **feeds)["out_sample"]
    chosen = make_precision_lookup(precision, "unet")
    state = {
        name: value if chosen(name) == "fp32" or value.ndim == 1 else rounded_by_onnx(value.numpy(), chosen(name))
        for name, value in unet.state_dict().items()
    }
    unet.load_state_dict(state)
    np.testing.assert_allclose(found, unet_reference(unet, feeds), atol=2e-4 if precision == "int4" else 5e-5)
    whole = sum(value.nbytes for value in unet.state_dict().values())
    assert (directory / "model.onnx_data").stat().st_size < whole * (0.25 if precision == "int4" else 0.35)


def rounded_by_onnx(weight, precision):
    """A torch weight through codes and ONNX's DequantizeLinear; input channels are its second axis."""
    if precision == "int8-weights" or weight.shape[1] % BLOCK != 0:
        scales = channel_scales(weight, 0)
        codes, options = quantize_int8(weight, scales, 0), {"axis": 0}
    else:
        scales = block_scales(weight, 1)
        codes, options = quantize_int4(weight, scales, 1).astype(ml_dtypes.int4), {"axis": 1, "block_size": BLOCK}
    kinds = {"int8": onnx.TensorProto.INT8, "int4": onnx.TensorProto.INT4}
    node = onnx.helper.make_node("DequantizeLinear", ["codes", "scales"], ["weight"], **options)
    graph = onnx.helper.make_graph(
        [node],
        "dequantize",
        [
            onnx.helper.make_tensor_value_info("codes", kinds[codes.dtype.name], codes.shape),
            onnx.helper.make_tensor_value_info("scales", onnx.TensorProto.FLOAT, scales.shape),
        ],
        [onnx.helper.make_tensor_value_info("weight", onnx.TensorProto.FLOAT, weight.shape)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    (made,) = ReferenceEvaluator(model).run(None, {"codes": codes, "scales": scales})
    spread = scales if codes.dtype.name == "int4" else scales.reshape(-1, *[1] * (weight.ndim - 1))
    steps = np.repeat(np.abs(spread), BLOCK, axis=1) if codes.dtype.name == "int4" else np.abs(spread)
    limit = 1.01 if codes.dtype.name == "int4" else 0.51  # the end of a block's scale that has no code of its own
    assert (np.abs(made - weight) <= limit * steps).all()
    return torch.from_numpy(np.ascontiguousarray(made))


SHOWN = ["cat on a blue", "red apple on a white", "guitar on a black", "sunflower on a yellow"]


@pytest.fixture(scope="module")
def pictogram(tmp_path_factory):
    """The bundled model in 8 bits, calibrated on images of its own kind."""
    directory = tmp_path_factory.mktemp("pictogram")
    (directory / "prompts.txt").write_text("".join(f"a {name} background\n" for name in SHOWN))
    checkpoint = ROOT / "models" / "pictogram" / "checkpoint"
    defaults = {"size": 64, "guidance_scale": 4.0}
    prompts = str(directory / "prompts.txt")
    return export(str(checkpoint), directory / "int8", precision="int8", calibration=prompts, defaults=defaults)


def test_images_in_8_bits_are_those_of_float32(pictogram):
    captions = ["a tiger on a white background", "a house on a green background", "a rose on a yellow background"]
    decibels = []
    with sdonnx.load(pictogram) as ours, sdonnx.load(bundled()["pictogram"]) as whole:
        for seed, caption in enumerate(captions):
            settings = {"seed": seed, "num_inference_steps": 12, "guidance_scale": 4.0, "sampler": "dpmpp_2m"}
            pair = [np.asarray(pipe.generate(caption, **settings).images[0], float) for pipe in (ours, whole)]
            decibels.append(10 * np.log10(255**2 / np.square(pair[0] - pair[1]).mean()))
    assert np.median(decibels) > 30


def test_the_vae_in_8_bits_is_diffusers_within_a_thousandth_of_an_image_s_energy(pictogram):
    root = ROOT / "models" / "pictogram"
    images = np.load(root / "composites.npz")["images"][:4]
    values = images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    vae = AutoencoderKL.from_pretrained(root / "checkpoint" / "vae", torch_dtype=torch.float32)
    with torch.no_grad():
        latents = vae.encode(torch.from_numpy(values)).latent_dist.mean
        expected = vae.decode(latents).sample.numpy()
    encoded = Session(pictogram / "vae_encoder" / "model.onnx", device="cpu").run({"sample": values})
    (moments,) = encoded.values()
    assert relative(moments[:, :4], latents.numpy()) < 0.03
    decoder = Session(pictogram / "vae_decoder" / "model.onnx", device="cpu")
    (decoded,) = decoder.run({"latent_sample": latents.numpy()}).values()
    assert 10 * np.log10(4 / np.square(decoded - expected).mean()) > 35


@pytest.mark.parametrize("precision", ["int8", "int8-weights", "int4"])
def test_a_package_of_fewer_bits_by_its_command(precision, checkpoint, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat")
    options = ["--precision", precision, "--calibration", "none" if precision == "int8" else "full"]
    exported = run_cli("export", checkpoint, "-o", "small", *options, cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", "small"]
    assert precision in run_cli("info", "small", cwd=tmp_path).stdout
    ran = run_cli("run", "a cat", "-m", "small", "--size", "64x64", "--steps", 2, "-o", "cat.png", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr


def test_prompts_of_an_editor_that_marks_utf_8(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n", encoding="utf-8-sig")
    assert calibration.Calibration.parse(str(tmp_path / "prompts.txt")).prompts == ("a cat", "a dog")


def test_a_calibration_goes_on_where_it_was_stopped(checkpoint, tmp_path, monkeypatch, caplog):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    settings = {"precision": "int8", "calibration": str(tmp_path / "prompts.txt"), "defaults": {"size": 64}}
    whole = export(str(checkpoint), tmp_path / "whole", **settings)
    ran = []
    run_session = calibration.Session.run

    def counted(self, feeds):
        if ".calibration" in str(self.path) and self.path.parent.name == "unet":
            ran.append(self)
            if len(ran) == 5:
                raise KeyboardInterrupt
        return run_session(self, feeds)

    monkeypatch.setattr(calibration.Session, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        export(str(checkpoint), tmp_path / "stopped", **settings)
    assert "the same command resumes it" in caplog.text
    assert not (tmp_path / "stopped").exists()
    total = len(list((tmp_path / ".stopped.calibration" / "runs").glob("unet-*.npz")))
    assert total == 4
    export(str(checkpoint), tmp_path / "stopped", **settings)
    assert not (tmp_path / ".stopped.calibration").exists()
    for name in ("unet", "vae_decoder", "vae_encoder"):
        path = f"{name}/model.onnx"
        assert (tmp_path / "stopped" / path).read_bytes() == (whole / path).read_bytes()
    assert len(ran) == 5 + (9 + 8 - 4)  # of 8 and 7 steps, which pndm takes one more for; four had been seen


def test_another_checkpoint_is_calibrated_again(checkpoint, tmp_path):
    work = tmp_path / ".mine.calibration"
    work.mkdir()
    (work / "calibration.json").write_text("[]")
    (work / "seen").mkdir()
    (work / "seen" / "unet-000.npz").write_bytes(b"of another")
    export(str(checkpoint), tmp_path / "mine", precision="int8", calibration="fast", defaults={"size": 64})
    assert Package.open(tmp_path / "mine").precision == "int8"
    assert not work.exists()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("absent.txt", "can't be read"), ("empty.txt", "no prompts"), ("noise.bin", "can't be read")],
)
def test_a_calibration_that_is_none(name, complaint, checkpoint, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "noise.bin").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ExportError, match=complaint):
        export(str(checkpoint), tmp_path / "out", precision="int8", calibration=str(tmp_path / name))
    assert not (tmp_path / "out").exists()
