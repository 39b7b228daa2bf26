"""Upscalers: graphs against spandrel's networks, files in each spelling of the keys, and files that are refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sdonnx_export.checkpoints.open import open_checkpoint
from sdonnx_export.export import export
from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.execution.session import Session
from support.upscalers import UPSCALERS, basicsr_keys, bsrgan_keys, load_with_spandrel, random_upscaler

import sdonnx


def upscaled(package, image):
    return Session(package / "upscaler" / "model.onnx", device="cpu").run({"image": image.numpy()})["upscaled"]


def psnr(found, wanted):
    return 10 * np.log10(np.ptp(wanted) ** 2 / np.square(found - wanted).mean())


@pytest.mark.parametrize("kind", UPSCALERS)
def test_a_graph_is_spandrels_network(kind, tmp_path):
    torch.save({"params_ema": random_upscaler(kind).state_dict()}, tmp_path / "net.pth")
    theirs = load_with_spandrel(tmp_path / "net.pth")
    image = torch.rand(1, 3, 20, 28)
    with torch.no_grad():
        wanted = theirs(image).numpy()
    package = export(str(tmp_path / "net.pth"), tmp_path / "package")
    assert psnr(upscaled(package, image), wanted) > 60
    with sdonnx.load_upscaler(package) as upscaler:
        assert upscaler.scale == UPSCALERS[kind][0]


@pytest.mark.parametrize(
    ("precision", "least"), [("fp16", 60), ("int8", 35), ("int8-weights", 45), ("int4", 25), ("mixed", 40)]
)
@pytest.mark.parametrize("kind", ["Real-ESRGAN x2", "Compact"])
def test_each_precision(kind, precision, least, tmp_path):
    net = random_upscaler(kind)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    (tmp_path / "mix.toml").write_text('base = "int8-weights"\n[upscaler]\n"body.*" = "fp16"\n')
    asked = f"mixed:{tmp_path / 'mix.toml'}" if precision == "mixed" else precision
    package = export(str(tmp_path / "net.safetensors"), tmp_path / "package", precision=asked)
    image = torch.rand(1, 3, 4, 4)
    smooth = torch.nn.functional.interpolate(image, size=(24, 28), mode="bicubic").clamp(0, 1)
    with torch.no_grad():
        assert psnr(upscaled(package, smooth), net(smooth).numpy()) > least
    assert json.loads((package / "sdonnx.json").read_text())["components"]["upscaler"]["precision"] == precision


SPELLINGS = {
    "ESRGAN": lambda state: state,
    "BSRGAN": bsrgan_keys,
    "BasicSR": basicsr_keys,
    "BasicSR's training state": lambda state: {
        **{f"params.{name}": torch.zeros_like(tensor) for name, tensor in basicsr_keys(state).items()},
        **{f"params_ema.{name}": tensor for name, tensor in basicsr_keys(state).items()},
    },
    "several GPUs": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_of_the_keys(spelling, tmp_path):
    state = random_upscaler("ESRGAN").state_dict()
    save_file({k: v.clone() for k, v in SPELLINGS[spelling](state).items()}, tmp_path / "net.safetensors")
    part = open_checkpoint(str(tmp_path / "net.safetensors")).parts["upscaler"]
    wanted = basicsr_keys(state)
    assert part.weights.keys() == wanted.keys()
    for name, weight in part.weights.items():
        np.testing.assert_array_equal(weight.read(), wanted[name].numpy())


def test_a_growth_that_spandrel_does_not_know_is_read_from_the_shapes(tmp_path):
    state = basicsr_keys(random_upscaler("ESRGAN").state_dict())
    for name, tensor in state.items():
        if ".conv" in name:  # of a dense block, which adds 8 channels instead of 32
            inputs = 16 + 8 * (int(name.split(".conv")[1][0]) - 1)
            outputs = tensor.shape[0] if ".conv5." in name else 8
            state[name] = tensor[:outputs, :inputs].clone() if tensor.ndim == 4 else tensor[:outputs].clone()
    save_file(state, tmp_path / "net.safetensors")
    package = export(str(tmp_path / "net.safetensors"), tmp_path / "package")
    config = json.loads((package / "upscaler" / "config.json").read_text())
    assert config == {
        "_class_name": "RRDBNet", "num_feat": 16, "num_block": 2, "num_grow_ch": 8, "scale": 4, "multiple": 1,
        "receptive_field": 34,
    }  # fmt: skip


def without(name):
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def reshaped(name, *shape):
    return lambda state: {**state, name: torch.zeros(*shape)}


DAMAGED = {
    "a missing layer": ("ESRGAN", without("model.0.weight"), "looks like an RRDBNet, but lacks .* 'conv_first.weight'"),
    "a missing bias": ("ESRGAN", without("model.10.bias"), "lacks the weight 'conv_last.bias'; download it again"),
    "a hole": ("Compact", without("body.4.weight"), "looks like an SRVGGNetCompact, but lacks .* 'body.4.weight'"),
    "no activations": ("Compact", without("body.1.weight"), "lacks the weight 'body.1.weight'"),
    "gray": ("ESRGAN", reshaped("model.0.weight", 16, 1, 3, 3), "it has 1 channels in and 3 out; supported: 3, of RGB"),
    "a wide kernel": ("ESRGAN", reshaped("model.0.weight", 16, 3, 5, 5), "has shape .*; the config requires"),
    "another width": ("Compact", reshaped("body.2.bias", 9), "'body.2.bias' has shape .*; the config requires"),
    "flat": ("ESRGAN", reshaped("model.0.weight", 16), "can't be read|lacks"),
    "ESRGAN+": ("ESRGAN", lambda state: {**state, "model.1.sub.0.RDB1.conv1x1.weight": torch.zeros(1)}, "ESRGAN\\+"),
    "endless": (
        "ESRGAN",
        lambda state: {**state, "model.999999999.weight": torch.zeros(1)},
        "a layer 'model.999999999'",
    ),
    "endless blocks": (
        "ESRGAN",
        lambda state: {**basicsr_keys(state), "body.999999999.rdb1.conv1.weight": torch.zeros(1)},
        "'num_block' is 1000000000; supported: at most 100",
    ),
    "endless layers": ("Compact", reshaped("body.999999999.weight", 48, 3), "'num_conv' is .*; supported: at most 100"),
    "endless factors": (
        "ESRGAN",
        lambda state: {**basicsr_keys(state), "conv_up999999999.weight": torch.zeros(1)},
        "1 of its weights are unknown",
    ),
    "more": ("ESRGAN", lambda state: {**state, "model.1.sub.0.noise": torch.zeros(1)}, "1 of its weights are unknown"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused(damage, tmp_path):
    kind, change, message = DAMAGED[damage]
    state = change(random_upscaler(kind).state_dict())
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "net.safetensors")
    with pytest.raises(ExportError, match=message) as error:
        export(str(tmp_path / "net.safetensors"), tmp_path / "package")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def test_a_cut_file_is_refused(tmp_path):
    torch.save(random_upscaler("ESRGAN").state_dict(), tmp_path / "net.pth")
    content = (tmp_path / "net.pth").read_bytes()
    (tmp_path / "net.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ExportError, match="net.pth is damaged or incomplete"):
        export(str(tmp_path / "net.pth"), tmp_path / "package")


OTHERS = {
    "SwinIR": ("conv_first.weight", "layers.0.residual_group.blocks.0.norm1.weight", "conv_after_body.weight"),
    "DAT": ("params.before_RG.1.weight", "params.layers.0.blocks.0.norm1.weight"),
    "SPAN": ("block_1.c1_r.sk.weight", "conv_cat.weight"),
    "RealPLKSR": ("feats.0.weight", "feats.1.channe_mixer.0.weight"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_architecture_is_named(kind, tmp_path):
    torch.save({name: torch.zeros(4, 4) for name in OTHERS[kind]}, tmp_path / "net.pth")
    with pytest.raises(
        ExportError, match="net.pth looks like an upscaler of another architecture; .*; give an RRDBNet"
    ):
        export(str(tmp_path / "net.pth"), tmp_path / "package")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "prompts.txt"}, "has no U-Net to calibrate on prompts"),
        ({"prediction_type": "epsilon"}, "is an upscaler, which takes no --prediction-type"),
    ],
)
def test_options_of_models_are_refused(options, message, tmp_path):
    save_file(random_upscaler("Compact x1").state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(ExportError, match=message):
        export(str(tmp_path / "net.safetensors"), tmp_path / "package", precision="int8", **options)
