"""Single files of ControlNets and T2I-Adapters, in each published layout, read as diffusers reads them."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from safetensors.torch import save_file
from sdonnx_export.checkpoints.open import open_checkpoint, open_source
from sdonnx_export.export import export
from sdonnx_export.models.controlnet import ControlNetConfig
from sdonnx_runtime.errors import ExportError
from support import families
from support.controls import adapter, controlnet
from support.families import unet, xl_unet
from support.ldm import ldm_unet, save_ldm


def original_name(net, name):
    """Of lllyasviel's files."""
    last = 2 * len(net.controlnet_cond_embedding.blocks) + 2
    for pattern, new in (
        (r"controlnet_cond_embedding\.conv_in\.", "input_hint_block.0."),
        (r"controlnet_cond_embedding\.conv_out\.", f"input_hint_block.{last}."),
        (r"controlnet_cond_embedding\.blocks\.(\d+)\.", lambda found: f"input_hint_block.{2 * int(found[1]) + 2}."),
        (r"controlnet_down_blocks\.(\d+)\.", r"zero_convs.\1.0."),
        (r"controlnet_mid_block\.", "middle_block_out.0."),
    ):
        if re.match(pattern, name):
            return re.sub(pattern, new, name)
    return ldm_unet(net, name)


@pytest.mark.parametrize("layout", ["control_model.", "", "diffusers"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_single_file(family, layout, tmp_path):
    own = {"cross_attention_dim": 768, "attention_head_dim": 8, "layers_per_block": 2}
    xl = {"layers_per_block": 2, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 1280 + 48}
    net = controlnet(unet(**own) if family == "sd1" else xl_unet(**xl, attention_head_dim=(1, 1, 1)))
    state = {name: value.clone().contiguous() for name, value in net.state_dict().items()}
    if layout != "diffusers":
        state = {layout + original_name(net, name): value for name, value in state.items()}
    save_file(state, tmp_path / "net.safetensors")
    net.save_config(tmp_path)
    theirs = net
    if family == "sd1" or layout == "diffusers":  # of SDXL's original names diffusers leaves some weights unread
        theirs = ControlNetModel.from_single_file(str(tmp_path / "net.safetensors"), config=str(tmp_path))
    theirs = theirs.state_dict()
    part = open_checkpoint(str(tmp_path / "net.safetensors")).parts["controlnet"]
    assert part.weights.keys() == theirs.keys()
    for name, weight in part.weights.items():
        np.testing.assert_array_equal(weight.read(), theirs[name].numpy())
    wanted = json.loads((tmp_path / "config.json").read_text())
    assert ControlNetConfig.from_dict(part.config) == ControlNetConfig.from_dict(wanted)


@pytest.mark.parametrize("kind", ["full_adapter", "light_adapter", "full_adapter_xl"])
@pytest.mark.parametrize("original", [False, True])
def test_a_single_file_of_an_adapter(kind, original, tmp_path):
    channels = [32, 64] if kind == "light_adapter" else [32, 64, 64, 64]
    net = adapter(adapter_type=kind, channels=channels, downscale_factor=16 if kind == "full_adapter_xl" else 8)
    state = net.state_dict()
    if original:
        place = r"body.\1.body.\2." if kind == "light_adapter" else lambda m: f"body.{2 * int(m[1]) + int(m[2])}."
        state = {
            re.sub(r"body\.(\d+)\.resnets\.(\d+)\.", place, k.removeprefix("adapter.")): v for k, v in state.items()
        }
        if kind != "light_adapter":
            state = {re.sub(r"body\.(\d+)\.in_", lambda m: f"body.{2 * int(m[1])}.in_", k): v for k, v in state.items()}
    save_file({name: value.clone().contiguous() for name, value in state.items()}, tmp_path / "net.safetensors")
    part = open_checkpoint(str(tmp_path / "net.safetensors")).parts["adapter"]
    again = T2IAdapter(**{name: value for name, value in part.config.items() if name != "_class_name"})
    again.load_state_dict({name: torch.from_numpy(weight.read()) for name, weight in part.weights.items()})
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for found, wanted in zip(again(image), net(image), strict=True):
            torch.testing.assert_close(found, wanted)


OWN = {"cross_attention_dim": 64, "layers_per_block": 2}
BASES = {
    "sd1": lambda: families.sd1(unet=unet(**OWN, attention_head_dim=8)),
    "sdxl": lambda: families.sdxl(unet=xl_unet(layers_per_block=2, attention_head_dim=(1, 1, 1))),
}


@pytest.fixture(scope="module", params=BASES)
def base(request, tmp_path_factory):
    """A base model as a file, its U-Net in original names, and a ControlNet trained from it, likewise."""
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    pipe = BASES[request.param]()
    save_ldm(pipe, path)
    net = controlnet(pipe.unet)
    model = {ldm_unet(pipe.unet, name): value for name, value in pipe.unet.state_dict().items()}
    trained = {original_name(net, name): value for name, value in net.state_dict().items()}
    return str(path), model, trained, net


def save_net(place, weights):
    save_file({name: value.clone().contiguous() for name, value in weights.items()}, place)
    return str(place)


def assert_is(part, net):
    expected = net.state_dict()
    assert part.weights.keys() == expected.keys()
    for name, weight in part.weights.items():
        torch.testing.assert_close(torch.from_numpy(weight.read()), expected[name], rtol=1e-5, atol=1e-5)
    found, wanted = (ControlNetConfig.from_dict(config) for config in (part.config, {**net.config}))
    assert found == wanted


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_a_difference_is_added_to_its_base(base, prefix, tmp_path):
    """As sd-webui-controlnet extracts it, which leaves out what is unchanged."""
    path, model, trained, net = base
    unchanged = "input_blocks.3.0.op.weight", "input_blocks.3.0.op.bias", "middle_block.1.norm.weight"
    unchanged = [name for name in unchanged if name in model]
    trained = {**trained, **{name: model[name] for name in unchanged}}
    stored = {name: value - model[name] if name in model else value for name, value in trained.items()}
    stored = {prefix + name: value for name, value in stored.items() if name not in unchanged}
    source = save_net(tmp_path / "diff.safetensors", {**stored, "difference": torch.tensor(1.0)})
    checkpoint = open_source(source, None, None, lambda *_: None, base=path)
    restored = ControlNetModel.from_config(net.config)
    restored.load_state_dict(net.state_dict())
    names = {original_name(net, name): name for name in net.state_dict()}
    restored.load_state_dict({names[name]: model[name] for name in unchanged}, strict=False)
    assert_is(checkpoint.parts["controlnet"], restored)
    assert checkpoint.stated == {"base model": "base.safetensors"}
    with pytest.raises(ExportError, match="is the difference between a ControlNet and .*; give .* with --base SRC"):
        open_checkpoint(source)
    with pytest.raises(ExportError, match="a ControlNet or a T2I-Adapter, which takes no --vae"):
        open_source(source, path, None, lambda *_: None, base=path)


def test_a_control_lora_is_added_to_its_base(base, tmp_path):
    """As Stability AI stores it; ComfyUI adds the product of up and down to the base model's weight."""
    path, model, trained, net = base
    torch.manual_seed(3)
    stored, whole = {"lora_controlnet": torch.zeros(0)}, {}
    for name, value in trained.items():
        if name in model and value.ndim > 1:
            up, down = torch.randn(len(value), 2), torch.randn(2, *value.shape[1:])
            stem = name.removesuffix(".weight")
            stored |= {f"{stem}.up": up[:, :, None, None] if value.ndim == 4 else up, f"{stem}.down": down}
            whole[name] = model[name] + torch.mm(up, down.flatten(1)).reshape(value.shape)
        elif name in model and "norm" in name:  # what a file leaves out is the base model's
            whole[name] = model[name]
        else:
            stored[name] = whole[name] = value
    expected = ControlNetModel.from_config(net.config)
    expected.load_state_dict({name: whole[original_name(net, name)] for name in net.state_dict()})
    source = save_net(tmp_path / "lora.safetensors", stored)
    assert_is(open_source(source, None, None, lambda *_: None, base=path).parts["controlnet"], expected)
    with pytest.raises(ExportError, match="is a Control-LoRA; give the checkpoint .* with --base SRC"):
        open_checkpoint(source)


def test_a_base_that_does_not_fit(base, tmp_path):
    path, model, trained, _ = base
    stored = {name: value - model[name] if name in model else value for name, value in trained.items()}
    cut = {**stored, "time_embed.0.weight": torch.zeros(4, 4), "difference": torch.tensor(1.0)}
    source = save_net(tmp_path / "diff.safetensors", cut)
    with pytest.raises(ExportError, match=r"'time_embedding.linear_1.weight' has shape \(4, 4\), .*; give the one"):
        open_source(source, None, None, lambda *_: None, base=path)
    whole = save_net(tmp_path / "whole.safetensors", trained)
    with pytest.raises(ExportError, match="takes no --base; leave it out"):
        open_source(whole, None, None, lambda *_: None, base=path)


def test_a_shuffle_controlnet_is_refused(base, tmp_path):
    """Its residuals are averaged over the image, of which only the name tells, as in AUTOMATIC1111."""
    source = save_net(tmp_path / "control_v11e_sd15_Shuffle.safetensors", base[2])
    with pytest.raises(ExportError, match="global_pool_conditions"):
        export(source, tmp_path / "out")


def test_a_union_controlnet_of_diffusers_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "ControlNetUnionModel"}))
    with pytest.raises(ExportError, match="holds a ControlNetUnionModel; supported: .*ControlNetModel"):
        open_checkpoint(str(tmp_path))
