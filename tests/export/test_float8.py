"""A checkpoint of float8 is exported as its values in float32; scales count, other quantization is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from sdonnx_export.checkpoints.files import open_file
from sdonnx_export.checkpoints.open import open_checkpoint
from sdonnx_export.export import export
from sdonnx_runtime.errors import ExportError
from support.ldm import save_ldm, tiny_pipeline

DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("float8") / "single.safetensors"
    save_ldm(tiny_pipeline(), path)
    return load_file(path)


def is_matrix(name, tensor):
    return tensor.is_floating_point() and tensor.ndim > 1


def package_of(weights, directory):
    directory.mkdir()
    save_file(weights, directory / "model.safetensors")
    export(str(directory / "model.safetensors"), directory / "package")
    return {
        path.relative_to(directory): path.read_bytes() for path in directory.rglob("package/**/*") if path.is_file()
    }


def test_the_package_is_that_of_the_values_in_float32(weights, tmp_path):
    """Of both kinds of float8, in turn."""
    narrow = {
        name: each.to(DTYPES[index % 2]) if each.is_floating_point() else each
        for index, (name, each) in enumerate(weights.items())
    }
    wide = {name: each.float() if each.is_floating_point() else each for name, each in narrow.items()}
    assert package_of(narrow, tmp_path / "narrow") == package_of(wide, tmp_path / "wide")


def scaled(weights, spelling):
    """Weights as ComfyUI scales them to the range of float8, and what they are as torch multiplies them."""
    stored, expected = {}, dict(weights)
    for name, weight in weights.items():
        if not is_matrix(name, weight) or not name.startswith("model.diffusion_model."):
            stored[name] = weight
            continue
        layer = name.removesuffix(".weight")
        scale = weight.abs().amax() / 448 if spelling != "by output" else weight.abs().flatten(1).amax(1) / 448
        by_output = scale.reshape(-1, *[1] * (weight.ndim - 1))
        stored[name] = (weight / by_output).to(torch.float8_e4m3fn)
        expected[name] = stored[name].float() * by_output
        if spelling == "old":
            stored |= {f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.ones(())}
        else:
            mark = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored |= {f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": torch.tensor(list(mark)).to(torch.uint8)}
    if spelling == "old":
        stored["model.diffusion_model.scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    return stored, expected


@pytest.mark.parametrize("spelling", ["old", "new", "by output"])
def test_scales_are_multiplied(weights, tmp_path, spelling):
    stored, expected = scaled(weights, spelling)
    save_file(stored, tmp_path / "model.safetensors")
    found = open_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(torch.from_numpy(found[name].read()), tensor), name
    assert open_checkpoint(str(tmp_path / "model.safetensors")).parts["unet"].config["in_channels"] == 4


UNSUPPORTED = {
    "quantized as 'nvfp4'": {"a.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}')).to(torch.uint8)},
    r"quantized \('a.weight.absmax'\)": {"a.weight.absmax": torch.ones(1)},
    "'a.comfy_quant' is damaged": {"a.comfy_quant": torch.zeros(3)},
    "'a.weight' of I8": {"a.weight": torch.ones(2, 2).to(torch.int8), "a.weight_scale": torch.ones(())},
    r"has a scale of \(3,\)": {"a.weight": torch.ones(2, 2), "a.weight_scale": torch.ones(3)},
    "integers as 'a.weight', and no scale": {"a.weight": torch.ones(2, 2).to(torch.int8)},
    "has a scale for 'b.weight', which it lacks": {"b.weight_scale": torch.ones(())},
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_other_quantization_is_named(tmp_path, message):
    save_file(UNSUPPORTED[message], tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=message):
        open_file(tmp_path / "model.safetensors")


def test_a_dtype_that_is_not_supported_is_one_line(weights, tmp_path):
    name = next(name for name, weight in weights.items() if is_matrix(name, weight))
    save_file({**weights, name: weights[name].to(torch.complex64)}, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=f"the dtype C64 of '{name}' is not supported") as error:
        export(str(tmp_path / "model.safetensors"), tmp_path / "package")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "package").exists()
