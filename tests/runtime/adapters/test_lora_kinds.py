"""Every kind of adapter on every kind of layer under every name, beside LyCORIS' and peft's own modules."""

import copy

import pytest
import torch
from lycoris.utils import extract_conv, extract_linear, make_sparse
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from support import lora as lora_fixture

LAYERS = {
    "linear": ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", lambda: torch.nn.Linear(48, 96)),
    "1x1": ("down_blocks.0.attentions.0.proj_in", lambda: torch.nn.Conv2d(48, 32, 1)),
    "3x3": ("down_blocks.0.resnets.0.conv1", lambda: torch.nn.Conv2d(32, 64, 3, padding=1)),
    "group norm": ("down_blocks.0.resnets.0.norm1", lambda: torch.nn.GroupNorm(4, 32)),
    "layer norm": ("down_blocks.0.attentions.0.transformer_blocks.0.norm1", lambda: torch.nn.LayerNorm(48)),
}
"""Kinds of layers, each with its place in a U-Net."""

ORIGINAL = {
    "linear": "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "1x1": "input_blocks.1.1.proj_in",
    "3x3": "input_blocks.1.0.in_layers.2",
    "group norm": "input_blocks.1.0.in_layers.0",
    "layer norm": "input_blocks.1.1.transformer_blocks.0.norm1",
}

SPELLINGS = {
    "kohya": lambda layer: f"lora_unet_{LAYERS[layer][0].replace('.', '_')}",
    "kohya with original names": lambda layer: f"lora_unet_{ORIGINAL[layer].replace('.', '_')}",
    "kohya's OFT": lambda layer: f"oft_unet_{ORIGINAL[layer].replace('.', '_')}",
    "lycoris": lambda layer: f"lycoris_{LAYERS[layer][0].replace('.', '_')}",
    "diffusers": lambda layer: f"unet.{LAYERS[layer][0]}",
    "peft": lambda layer: f"base_model.model.{LAYERS[layer][0]}",
    "comfyui": lambda layer: f"diffusion_model.{ORIGINAL[layer]}",
}

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]

CASES = [(kind, layer) for kind in lora_fixture.MODULES for layer in ("linear", "1x1", "3x3")]
CASES += [("norm", layer) for layer in ("group norm", "layer norm")]


def make_layer(kind):
    torch.manual_seed(1)
    layer = LAYERS[kind][1]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def inputs(layer):
    """Random inputs of a layer."""
    features = getattr(layer, "in_features", None) or getattr(layer, "normalized_shape", (None,))[0]
    if features is not None:
        return torch.randn(2, features)
    return torch.randn(2, getattr(layer, "in_channels", None) or layer.num_channels, 8, 8)


def merged_output(path, place, layer, x, scale):
    """The output of a layer with a file merged into its weight and bias."""
    blocks = ("down_blocks.0.resnets.0.conv2", "down_blocks.0.attentions.0.proj_out")
    before = {f"{place}.{name}": value.clone() for name, value in layer.state_dict().items()}
    state, _ = lora_fixture.merged(
        {**before, **{f"{name}.weight": torch.ones(1) for name in blocks}}, path, scale=scale
    )
    values = {name.removeprefix(f"{place}."): state[name] for name in before}
    return torch.func.functional_call(layer, values, x).detach()


def assert_close(found, wanted, plain):
    """80 dB of what the adapter changes."""
    change = (wanted - plain).abs().max()
    assert change > 0.01
    assert (found - wanted).abs().max() < 1e-4 * change


@pytest.mark.parametrize(("kind", "layer"), CASES)
def test_layers_give_what_those_of_lycoris_give(tmp_path, kind, layer):
    """In training; its merge for good scales LoHa and LoKr twice where alpha isn't the rank."""
    cases = [(spelling, torch.float32) for spelling in SPELLINGS] + [("kohya", dtype) for dtype in DTYPES[1:]]
    for seed, (spelling, dtype) in enumerate(cases):
        ours = make_layer(layer)
        x = inputs(ours)
        plain = ours(x).detach()
        module = lora_fixture.lycoris(make_layer(layer), kind, seed, dtype).eval()
        state = {f"{SPELLINGS[spelling](layer)}.{key}": value for key, value in module.state_dict().items()}
        path = lora_fixture.save(state, tmp_path / "a.safetensors", dtype)
        for scale in (1.0, 0.25):
            interpolates = scale != 1 and getattr(module, "wd", False)  # LyCORIS scales the norm alone
            module.multiplier = 1.0 if interpolates else scale
            wanted = module(x).detach()
            wanted = plain + scale * (wanted - plain) if interpolates else wanted
            assert_close(merged_output(path, LAYERS[layer][0], ours, x, scale), wanted, plain)


@pytest.mark.parametrize("layer", ["linear", "3x3"])
def test_the_sparse_rest_of_an_extracted_lora(tmp_path, layer):
    """As LyCORIS' extraction writes it: the product and the largest of what that leaves out."""
    ours = make_layer(layer)
    x, plain = inputs(ours), make_layer(layer)
    target = 0.3 * torch.randn_like(ours.weight)
    extract = extract_linear if layer == "linear" else extract_conv
    (down, up, rest), _ = extract(target, "fixed", 2)
    rest = make_sparse(rest.reshape(len(up), -1), 0.7)
    sparse = rest.to_sparse().coalesce()
    tensors = {
        "lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor([2.0]), "bias_values": sparse.values(),
        "bias_indices": sparse.indices().to(torch.int16), "bias_size": torch.tensor(rest.shape).to(torch.int16),
    }  # fmt: skip
    state = {f"{SPELLINGS['kohya'](layer)}.{name}": value for name, value in tensors.items()}
    path = lora_fixture.save(state, tmp_path / "a.safetensors", dtype=None)
    with torch.no_grad():
        ours.weight.add_((up.flatten(1) @ down.flatten(1) + rest).reshape(ours.weight.shape))
        assert_close(merged_output(path, LAYERS[layer][0], plain, x, 1.0), ours(x), plain(x))


class Layers(torch.nn.Module):
    """A layer of each kind that peft adapts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = torch.nn.Conv2d(8, 16, 3, padding=1)
        self.point = torch.nn.Conv2d(16, 24, 1)
        self.linear = torch.nn.Linear(24, 40)

    def forward(self, x):
        return self.linear(torch.tanh(self.point(torch.tanh(self.conv(x)))).movedim(1, -1))


ALL = ["conv", "point", "linear"]
PEFT = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=ALL),
    "lora without alpha": LoraConfig(r=4, lora_alpha=4, target_modules=ALL),
    "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=ALL),
    "dora": LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=ALL),
    "lora with a bias": LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=ALL),
    "lora with patterns": LoraConfig(
        r=4, lora_alpha=6, rank_pattern={"conv": 2}, alpha_pattern={"^conv": 3, "linear": 1}, target_modules=ALL
    ),
    "loha": LoHaConfig(r=4, alpha=6, target_modules=ALL),
    "loha with kernels": LoHaConfig(r=4, alpha=6, use_effective_conv2d=True, target_modules=ALL),
    "lokr": LoKrConfig(r=2, alpha=3, target_modules=ALL),
    "lokr with kernels": LoKrConfig(r=2, alpha=3, use_effective_conv2d=True, decompose_both=True, target_modules=ALL),
    "lokr of full matrices": LoKrConfig(r=64, alpha=32, target_modules=ALL),
    "ia3 of outputs": IA3Config(target_modules=["linear"], feedforward_modules=[]),
    "ia3 of inputs": IA3Config(target_modules=["linear"], feedforward_modules=["linear"]),
}


def adapted(config):
    """A model with one of peft's adapters of random weights, and the plain model."""
    model = get_peft_model(copy.deepcopy(plain := Layers()), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model, plain


@pytest.mark.parametrize("spelled", ["saved", "state dict"])
@pytest.mark.parametrize("kind", PEFT)
def test_layers_give_what_those_of_peft_give(tmp_path, kind, spelled):
    model, plain = adapted(PEFT[kind])
    x = torch.randn(2, 8, 6, 6)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    if spelled == "state dict":  # with the adapter's name in the keys
        lora_fixture.save({k: v for k, v in model.state_dict().items() if "default" in k}, file)
    state, changed = lora_fixture.merged(plain.state_dict(), file)
    assert {name.partition(".")[0] for name in changed} == set(model.peft_config["default"].target_modules)
    assert_close(torch.func.functional_call(plain, state, x), model(x).detach(), plain(x).detach())
