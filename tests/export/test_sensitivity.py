"""What narrowing one group of layers does to a U-Net is what torch's own fake quantization does in diffusers' model."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from sdonnx_export.export import export
from sdonnx_export.models.components import build
from sdonnx_export.operators.quantized import Range
from sdonnx_export.quantization.sensitivity import measure, sensitivity, write_mixed_precision
from sdonnx_runtime.errors import RequestError
from support.cli import run_cli
from support.graphs import UNET, part_of, saved, unet_reference
from torch.nn.functional import conv2d, linear

UNET_3 = {**UNET, "layers_per_block": 1}
SKIPPED = {"up_blocks.0.resnets.0": 64, "up_blocks.0.resnets.1": 32, "up_blocks.1": 32}
"""Channels that blocks read from a skip connection and that have a range of their own."""


def rounded(x, low, high):
    """To 256 values from least to greatest, 0 among them."""
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    scale = max((high - low) / 255, 1e-8)
    return torch.fake_quantize_per_tensor_affine(x, scale, round(-low / scale), 0, 255)


def by_channel(weight):
    scales = weight.flatten(1).abs().amax(1) / 127
    return torch.fake_quantize_per_channel_affine(weight, scales, torch.zeros(len(weight)).int(), 0, -127, 127)


def fake(name, module, ends):
    """The forward of a layer in 8 bits: kernels over known ranges, matrices over those of each run."""

    def kernel(x):
        y = conv2d(rounded(x, *ends[name]), by_channel(module.weight), None, module.stride, module.padding)
        return rounded(y, *ends[f"{name}.output"]) + module.bias[:, None, None]

    def pointwise(x):
        skipped = next((n for block, n in SKIPPED.items() if name.startswith(block) and "shortcut" in name), 0)
        parts = x.split([x.shape[1] - skipped, skipped], dim=1) if skipped else [x]
        weights = module.weight.split([part.shape[1] for part in parts], dim=1)
        made = [conv2d(rounded(p, p.min(), p.max()), by_channel(w)) for p, w in zip(parts, weights, strict=True)]
        return sum(made) + module.bias[:, None, None]

    def matrix(x):
        return linear(rounded(x, x.min(), x.max()), by_channel(module.weight), module.bias)

    def stored(x):
        return linear(x, by_channel(module.weight), module.bias)

    if isinstance(module, torch.nn.Linear):
        return stored if "time_emb" in name or ".attn2.to_k" in name or ".attn2.to_v" in name else matrix
    return pointwise if module.kernel_size == (1, 1) else kernel


def observed(unet, moments):
    """Least and greatest of what each kernel reads, and gives before its bias."""
    ends = {}

    def look(name, x):
        low, high = ends.get(name, (np.inf, -np.inf))
        ends[name] = (min(low, float(x.min())), max(high, float(x.max())))

    def hook(name):
        def see(module, inputs, output):
            look(f"{name}.weight", inputs[0])
            look(f"{name}.weight.output", output - module.bias[:, None, None])

        return see

    kernels = [(name, module) for name, module in unet.named_modules() if isinstance(module, torch.nn.Conv2d)]
    hooks = [module.register_forward_hook(hook(name)) for name, module in kernels]
    for moment in moments:
        unet_reference(unet, moment)
    for each in hooks:
        each.remove()
    return ends


def fake_error(unet, group, *, ends, moments, wanted):
    """Relative to ``wanted``, root mean square over the moments, with a group's layers, or all, in 8 bits."""
    changed = [
        (name, module)
        for name, module in unet.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        and (f"{name}.".startswith(f"{group}.") if group else name not in ("conv_in", "conv_out"))
    ]
    assert changed
    for name, module in changed:
        module.forward = fake(f"{name}.weight", module, ends)
    found = [unet_reference(unet, moment) for moment in moments]
    for _, module in changed:
        del module.forward
    ratios = [np.square(f - w).sum() / np.square(w).sum() for f, w in zip(found, wanted, strict=True)]
    return np.sqrt(np.mean(ratios))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET_3)
    part = part_of(unet)
    rng = np.random.default_rng(0)
    shapes = {"sample": (2, 4, 24, 32), "encoder_hidden_states": (2, 77, 48)}
    drawn = [{name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()} for _ in range(2)]
    moments = [{**each, "timestep": np.array(t, np.float32)} for each, t in zip(drawn, (800, 100), strict=True)]
    ends = observed(unet, moments)
    ranges = {name: Range.from_min_max(*pair) for name, pair in ends.items()}
    weights = saved(build("unet", part, "fp32"), tmp_path_factory.mktemp("unet"))
    error, groups = measure(part, "int8", ranges, moments, weights)
    wanted = [unet_reference(unet, moment) for moment in moments]
    find_error = partial(fake_error, unet, ends=ends, moments=moments, wanted=wanted)
    return unet, find_error, error, {group.name: group for group in groups}


def test_the_error_of_each_group_is_that_of_fake_quantization(measured):
    """But for values and zero points halfway between two codes, which fall to either and move what comes later."""
    _, find_error, _, groups = measured
    found = {name: group.error for name, group in groups.items()}
    assert found == pytest.approx({name: find_error(name) for name in groups}, rel=0.01)


def test_the_groups_are_all_layers_that_int8_quantizes_the_costliest_first(measured):
    unet, find_error, error, groups = measured
    narrow = {name for name, value in unet.named_parameters() if value.ndim > 1} - {"conv_in.weight", "conv_out.weight"}
    assert all(sum(name.startswith(f"{group}.") for group in groups) == 1 for name in narrow)
    kernels = 32 * 32 * 9 * 2 + 128 * 32
    resnet = groups["down_blocks.0.resnets.0"]
    assert resnet.saved == pytest.approx(3 * kernels, rel=0.02)  # scales are what is missing
    assert resnet.extra_bytes == pytest.approx(kernels, rel=0.03)
    assert error == pytest.approx(find_error(""), rel=0.03)
    costs = [group.cost for group in groups.values()]
    assert costs == sorted(costs, reverse=True)
    share = sum(group.cost * group.saved for group in groups.values()) / sum(group.saved for group in groups.values())
    assert share == pytest.approx(1)


def test_a_budget_keeps_the_costliest_that_it_can_pay(checkpoint, export_once, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = sensitivity(str(checkpoint), precision="int4", defaults={"size": 64})
    assert list(tmp_path.iterdir()) == []
    assert len(found.timesteps) == 4
    assert list(found.timesteps) == sorted(found.timesteps, reverse=True)
    first, second, third = (group for group in found.groups[:3])
    assert found.mixed_precision(first.extra_bytes + second.extra_bytes).patterns["unet"].keys() >= {
        first.name,
        second.name,
    }
    assert found.mixed_precision(0).patterns["unet"] == {}
    write_mixed_precision(tmp_path / "mix.toml", found, first.extra_bytes + second.extra_bytes)
    mixed = export(str(checkpoint), tmp_path / "mixed", precision=f"mixed:{tmp_path / 'mix.toml'}")
    narrow = export_once(checkpoint, tmp_path / "narrow", precision="int4")
    grown, before = ((path / "unet" / "model.onnx_data").stat().st_size for path in (mixed, narrow))
    assert before < grown <= before + first.extra_bytes + second.extra_bytes + 2**17  # offsets are multiples of 65536
    assert third.name not in (tmp_path / "mix.toml").read_text()


def test_command(package, tmp_path):
    """A package stands for its checkpoint; what is narrowed further is refused."""
    ran = run_cli("sensitivity", package, "--precision", "int8-weights", "--json", "--write", "mix.toml", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["source"] == "tiny"
    assert 0 < report["error"] < 0.1
    assert {group["name"] for group in report["groups"]} > {"time_embedding", "mid_block.resnets.0"}
    exported = run_cli("export", package, "-o", "out", "--precision", "mixed:mix.toml", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mix.toml", "out"]
    refused = run_cli("sensitivity", "out", cwd=tmp_path)
    assert refused.returncode == 1
    assert "give the checkpoint, or a package of fp32 or fp16" in refused.stderr


def test_a_precision_that_quantizes_nothing_is_refused(checkpoint):
    with pytest.raises(RequestError, match="choose int8, int8-weights, int4"):
        sensitivity(str(checkpoint), precision="fp16")
