"""Single files of ControlNets and T2I-Adapters, in each published layout, read as diffusers reads them."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from safetensors.torch import save_file
from sdonnx_export.checkpoints.open import open_checkpoint
from sdonnx_export.models.controlnet import ControlNetConfig
from support.controls import adapter, controlnet
from support.families import unet, xl_unet
from support.ldm import ldm_unet


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
