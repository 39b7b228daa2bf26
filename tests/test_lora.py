"""Adapters at run time, beside diffusers with the same file fused, and LyCORIS's own merge."""

import copy

import families
import lora_fixture
import numpy as np
import pytest
import torch
from sdonnx_export.export import export
from sdonnx_runtime.lora import read_lora
from test_families import PROMPT, SEED, SIZE, psnr, reference

import sdonnx

MAKERS = {"sd1": families.sd1, "sd2": families.sd2, "sdxl": families.sdxl}
SETTINGS = {"negative_prompt": "blurry", "num_inference_steps": 3, "guidance_scale": 4.0, **SIZE}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A family's pipeline, and a package of it in a precision; made once."""
    pipes, directory = {}, tmp_path_factory.mktemp("lora")

    def get(name, precision="fp32"):
        source, package = directory / name, directory / f"{name}-{precision}"
        if name not in pipes:
            pipes[name] = MAKERS[name]()
            pipes[name].set_progress_bar_config(disable=True)
            pipes[name].save_pretrained(source)
        if not package.exists():
            export(str(source), package, precision=precision, calibration="none")
        return copy.deepcopy(pipes[name]), package

    return get


def fused(pipe, files):
    """diffusers' picture with files and their scales."""
    for index, (path, scale) in enumerate(files):
        pipe.load_lora_weights(str(path), adapter_name=f"a{index}")
        pipe.set_adapters([f"a{index}"], [1.0])
        pipe.fuse_lora(lora_scale=scale, adapter_names=[f"a{index}"])
        pipe.unload_lora_weights()
    return reference(pipe, prompt=PROMPT, **SETTINGS)


def ours(package, loras=(), **settings):
    with sdonnx.load(package, loras=loras) as pipe:
        return pipe.generate(PROMPT, seed=SEED, **{**SETTINGS, **settings})


def assert_equal(result, wanted, plain):
    """As diffusers has it, and not as without adapters."""
    assert np.abs(result.latents - wanted[0]).max() < 1e-3
    assert psnr(result.images[0], wanted[1]) > 50
    assert psnr(result.images[0], plain.images[0]) < 35


FILES = {
    "kohya": lora_fixture.kohya,
    "kohya with kernels": lambda pipe: lora_fixture.kohya(pipe, kernels=True),
    "peft": lora_fixture.peft,
    "old diffusers": lora_fixture.old_diffusers,
    "dora": lora_fixture.dora,
}


@pytest.mark.parametrize("name", ["sd1", "sd2"])
@pytest.mark.parametrize("kind", FILES)
def test_pictures_equal_those_of_diffusers(family, tmp_path, name, kind):
    pipe, package = family(name)
    file = lora_fixture.save(FILES[kind](pipe), tmp_path / "a.safetensors")
    scale = 1.0 if kind == "dora" else 0.7  # peft's norms go with its scale, ours with the whole
    assert_equal(ours(package, [(file, scale)]), fused(pipe, [(file, scale)]), ours(package))


@pytest.mark.parametrize("original", [False, True])
def test_pictures_of_sdxl_equal_those_of_diffusers(family, tmp_path, original):
    pipe, package = family("sdxl")
    file = lora_fixture.save(lora_fixture.kohya(pipe, kernels=True, original=original), tmp_path / "a.safetensors")
    assert_equal(ours(package, [(file, 0.7)]), fused(pipe, [(file, 0.7)]), ours(package))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_half_precision(family, tmp_path, dtype):
    pipe, package = family("sd1")
    state = lora_fixture.kohya(pipe)
    half = lora_fixture.save(state, tmp_path / "half.safetensors", dtype)
    whole = lora_fixture.save({name: value.to(dtype) for name, value in state.items()}, tmp_path / "whole.safetensors")
    assert np.array_equal(ours(package, [half]).latents, ours(package, [whole]).latents)
    assert_equal(ours(package, [half]), fused(pipe, [(whole, 1.0)]), ours(package))


LAYERS = {
    "linear": lambda: torch.nn.Linear(48, 96),
    "1x1": lambda: torch.nn.Conv2d(48, 32, 1),
    "3x3": lambda: torch.nn.Conv2d(32, 64, 3, padding=1),
}


@pytest.mark.parametrize("kind", lora_fixture.MODULES)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_give_what_those_of_lycoris_give(tmp_path, kind, layer):
    """In training; its merge for good scales LoHa and LoKr twice where alpha isn't the rank."""
    torch.manual_seed(1)
    layer = LAYERS[layer]()
    x = torch.randn(2, layer.weight.shape[1], *[8] * (layer.weight.ndim - 2))
    plain = layer(x).detach()
    module = lora_fixture.lycoris(layer, kind, seed=2).eval()
    file = tmp_path / "a.safetensors"
    lora_fixture.save({f"lora_unet_x.{name}": value for name, value in module.state_dict().items()}, file)
    wanted = module(x).detach()
    (change,) = read_lora(file).changes.values()
    weight = layer.weight.detach().numpy().copy()
    flat = weight.reshape(len(weight), -1)
    with torch.no_grad():
        for scale in (1.0, 0.25):
            layer.weight.copy_(torch.from_numpy(change(flat, scale).reshape(weight.shape)))
            expected = plain + scale * (wanted - plain)
            assert (expected - plain).abs().max() > 0.05
            torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
