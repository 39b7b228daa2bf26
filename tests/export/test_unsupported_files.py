"""The error for a file that is not a checkpoint names what it is."""

import json

import pytest
import torch
from safetensors.torch import save_file
from sdonnx_export.checkpoints.open import open_checkpoint
from sdonnx_export.export import export
from sdonnx_runtime.errors import ExportError

import sdonnx

UNSUPPORTED = {
    "kohya LoRA": ("a LoRA", "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"),
    "kohya LoRA of a text encoder": ("a LoRA", "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"),
    "diffusers LoRA": ("a LoRA", "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"),
    "older diffusers LoRA": ("a LoRA", "unet.up_blocks.1.attentions.0.attn1.processor.to_q_lora.down.weight"),
    "PEFT LoRA": ("a LoRA", "base_model.model.down_blocks.1.attentions.0.proj_in.lora_B.weight"),
    "LoHa": ("a LoRA", "lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"),
    "LoKr": ("a LoRA", "lycoris_unet_mid_block_attentions_0_proj_in.lokr_w1"),
    "LoHa without a prefix": ("a LoRA", "unet.mid_block.attentions.0.proj_in.hada_w2_b"),
    "LoKr without a prefix": ("a LoRA", "unet.mid_block.attentions.0.proj_in.lokr_w2_a"),
    "DoRA": ("a LoRA", "unet.mid_block.attentions.0.proj_in.dora_scale"),
    "original ControlNet": ("a ControlNet", "control_model.zero_convs.0.0.weight"),
    "ControlNet LoRA": ("a ControlNet", "lora_controlnet"),
    "union ControlNet": ("a union ControlNet", "controlnet_cond_embedding.conv_in.weight", "task_embedding"),
    "union ControlNet of ProMax": (
        "a union ControlNet",
        "input_hint_block.0.weight",
        "control_add_embedding.linear_1.bias",
    ),
    "ControlNet-LLLite": (
        "a ControlNet-LLLite",
        "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight",
    ),
    "SparseCtrl": (
        "a SparseCtrl",
        "input_hint_block.0.weight",
        "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight",
    ),
    "ControlNet of Flux": ("a ControlNet of Flux", "controlnet_x_embedder.weight", "controlnet_blocks.0.weight"),
    "style T2I-Adapter": ("a style T2I-Adapter", "style_embedding"),
    "original T2I-Adapter": ("a T2I-Adapter", "body.0.in_conv.weight", "conv_in.weight"),
    "VAE of LDM": ("a VAE alone", "decoder.conv_in.weight", "encoder.down.0.block.0.norm1.weight"),
    "VAE of diffusers": ("a VAE alone", "decoder.conv_in.weight", "decoder.up_blocks.0.resnets.0.norm1.weight"),
    "VAE with its prefix": ("a VAE alone", "first_stage_model.decoder.mid.block_1.norm1.weight"),
    "textual inversion": ("a textual inversion", "emb_params"),
    "textual inversion of SDXL": ("a textual inversion", "clip_g", "clip_l"),
    "textual inversion of diffusers": ("a textual inversion", "<cat-toy>"),
    "part of an IP-Adapter": ("a part of an IP-Adapter", "ip_adapter.1.to_k_ip.weight"),
    "AnimateDiff": ("a motion module", "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"),
    "SD3": ("Flux or Stable Diffusion 3", "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
    "SD3 with its texts": (
        "Flux or Stable Diffusion 3",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
        "first_stage_model.decoder.conv_in.weight",
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    ),
    "SD3 of diffusers": ("Flux or Stable Diffusion 3", "transformer_blocks.0.norm1_context.linear.weight"),
    "Flux": ("Flux or Stable Diffusion 3", "double_blocks.0.img_attn.qkv.weight"),
    "Flux in ComfyUI": ("Flux or Stable Diffusion 3", "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"),
    "U-Net of diffusers": ("a part of a U-Net", "down_blocks.0.resnets.0.conv1.weight"),
    "text encoder": ("a text encoder alone", "text_model.encoder.layers.0.mlp.fc1.weight"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_file_of_another_kind_is_named(kind, tmp_path):
    what, *names = UNSUPPORTED[kind]
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(ExportError, match=f"x.safetensors looks like {what}.*; .*can be exported.*; .*give") as error:
        open_checkpoint(str(tmp_path / "x.safetensors"))
    assert "\n" not in str(error.value)
    assert ("--vae" in str(error.value)) == (what == "a VAE alone")


CUT = {
    "original ControlNet without a prefix": ("a ControlNet", "input_hint_block.0.weight"),
    "diffusers ControlNet": ("a ControlNet", "controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.x"),
    "diffusers T2I-Adapter": ("a T2I-Adapter", "adapter.body.0.resnets.0.block1.weight", "adapter.conv_in.weight"),
}
"""What could be exported, were it whole."""


@pytest.mark.parametrize("kind", CUT)
def test_a_net_that_is_cut_is_named(kind, tmp_path):
    what, *names = CUT[kind]
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(ExportError, match=f"x.safetensors looks like {what}, but ") as error:
        open_checkpoint(str(tmp_path / "x.safetensors"))
    assert "\n" not in str(error.value)


def test_pickled_textual_inversions_are_named(tmp_path):
    """AUTOMATIC1111's and CompVis's: a dictionary in a dictionary."""
    learned = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(2, 768)}, "name": "x"}
    torch.save(learned, tmp_path / "x.pt")
    with pytest.raises(ExportError, match="looks like a textual inversion"):
        open_checkpoint(str(tmp_path / "x.pt"))


@pytest.mark.parametrize("kind", ["StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionUpscalePipeline"])
def test_an_unsupported_pipeline_is_refused_by_name(kind, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    for via in ("native", "optimum"):
        with pytest.raises(sdonnx.ExportError, match=kind):
            export(str(tmp_path), tmp_path / "out", via=via)
    with pytest.raises(sdonnx.PackageError, match=kind):
        sdonnx.load(tmp_path)
