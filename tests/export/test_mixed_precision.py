"""Mixed precisions: each layer has what its file says, and a file that can't be honoured is refused in one line."""

import json

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import UNet2DConditionModel
from sdonnx_export.export import export
from sdonnx_export.models.components import build
from sdonnx_export.operators.precision import MixedPrecision, parse_precision
from sdonnx_runtime.errors import ExportError, RequestError
from support.graphs import UNET, part_of, run, unet_feeds, unet_reference

import sdonnx

MIX = """
base = "fp32"

[unet]
"mid_block.resnets.0.conv2" = "fp32"  # the first match counts
"mid_block.resnets.*.conv?" = "int8-weights"
down_blocks = "fp16"
"""


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return f"mixed:{path}"


@pytest.mark.core
def test_each_layer_is_stored_as_the_first_pattern_says(tmp_path):
    mix = parse_precision(written(tmp_path / "mix.toml", MIX))
    unet = UNet2DConditionModel(**UNET)
    part, feeds = part_of(unet), unet_feeds(unet.config)
    found = run(build("unet", part, mix), tmp_path, **feeds)["out_sample"]
    before = unet_reference(unet, feeds)
    state = {name: rounded(name, value) for name, value in unet.state_dict().items()}
    unet.load_state_dict(state)
    np.testing.assert_allclose(found, unet_reference(unet, feeds), atol=2e-5)
    assert np.abs(found - before).max() > 2e-4


def rounded(name, value):
    """What MIX leaves of a weight, by torch's own rounding."""
    if value.ndim > 1 and name.startswith("down_blocks."):
        return value.half().float()
    if name.startswith("mid_block.resnets.") and ".conv" in name and value.ndim > 1 and "0.conv2" not in name:
        scales = value.flatten(1).abs().amax(1) / 127
        return torch.fake_quantize_per_channel_affine(value, scales, torch.zeros(len(value)).int(), 0, -127, 127)
    return value


def test_a_package_of_a_mix_runs(checkpoint, tmp_path):
    """In 4 bits a component needs a later opset; the others keep theirs."""
    text = '\ufeffbase = "int8"\n[unet]\nconv_in = "int8"\nmid_block = "int4"\n[text_encoder]\n"*" = "fp16"\n'
    mix = MixedPrecision.read(tmp_path / written(tmp_path / "mix.toml", text).removeprefix("mixed:"))
    root = export(str(checkpoint), tmp_path / "mixed", precision=mix, calibration="fast", defaults={"size": 64})
    components = json.loads((root / "sdonnx.json").read_text())["components"]
    stored = {name: component["precision"] for name, component in components.items()}
    assert stored == {"text_encoder": "mixed", "unet": "mixed", "vae_decoder": "int8", "vae_encoder": "int8"}
    models = {name: ir.load(root / name / "model.onnx") for name in stored}
    opsets = {name: model.graph.opset_imports[""] for name, model in models.items()}
    assert opsets == {"text_encoder": 20, "unet": 21, "vae_decoder": 20, "vae_encoder": 20}
    unet = models["unet"].graph.initializers
    assert unet["conv_in.weight_quantized"].dtype == ir.DataType.INT8
    assert unet["conv_out.weight"].dtype == ir.DataType.FLOAT
    assert unet["mid_block.resnets.0.conv1.weight_quantized"].dtype == ir.DataType.INT4
    assert [node.op_type for node in unet["conv_in.weight_quantized"].consumers()] == ["QLinearConv"]
    with sdonnx.load(root) as pipe:
        assert pipe.generate("a cat", seed=1, num_inference_steps=2).images[0].size == (64, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base = ", "not valid TOML"),
        ("base = " + "[" * 20_000, "not valid TOML"),
        ('[unet]\n"*" = "fp16"', "has no 'base'"),
        ('base = "int3"', "'base' is 'int3'; choose fp32, fp16"),
        ('base = "fp32"\nmid_block = "fp16"', "'mid_block' is not a table"),
        ('base = "fp32"\n[unet]\nmid_block.resnets = "fp16"', "put patterns with dots in quotes"),
        ('base = "fp32"\n[unet]\n"*" = 8', r"'\*' of \[unet\] is 8; choose"),
        (
            'base = "fp32"\n[vae]\n"*" = "fp16"',
            "unknown component 'vae' in mixed precision; expected text_encoder, unet, vae_decoder",
        ),
        (
            'base = "fp32"\n[unet]\n"*" = "fp16"\n"down_blocks.7" = "int8"',
            "'down_blocks.7' of mixed precision matches no layer of unet",
        ),
        ('base = "fp32"\n[unet]\n"*.norm1" = "fp16"', r"'\*.norm1' of mixed precision matches no layer"),
    ],
)
def test_a_file_that_can_not_be_honoured_is_named(text, message, checkpoint, tmp_path):
    with pytest.raises(ExportError, match=message):
        export(str(checkpoint), tmp_path / "out", precision=written(tmp_path / "mix.toml", text))
    assert [path.name for path in tmp_path.iterdir()] == ["mix.toml"]


def test_a_precision_that_there_is_not_is_named(tmp_path):
    with pytest.raises(RequestError, match=r"'int3' is unknown; choose fp32, .* or mixed:FILE"):
        parse_precision("int3")
    with pytest.raises(ExportError, match=r"nowhere.toml can't be read"):
        parse_precision(f"mixed:{tmp_path / 'nowhere.toml'}")
