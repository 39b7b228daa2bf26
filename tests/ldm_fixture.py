"""Tiny random Stable Diffusion 1 pipelines, and their weights as one file in the original LDM layout."""

import re

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from sdonnx_export.clip_vocabulary import write_clip_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

VARIATIONS = {
    "plain": {},
    "linear projection, four heads, wider text": {"linear": True, "heads": 4, "text_width": 128, "layers": 2},
    "three levels, one of them plain": {"channels": (32, 64, 96), "attends": (True, True, False), "heads": 2},
    "equal channels, deep text encoder, v prediction": {
        "channels": (64, 64),
        "attends": (True, True),
        "heads": 1,
        "text_layers": 4,
        "prediction_type": "v_prediction",
    },
}


def tiny_pipeline(
    *,
    channels=(32, 64),
    attends=(True, False),
    layers=1,
    heads=8,
    linear=False,
    text_width=64,
    text_layers=2,
    prediction_type="epsilon",
    seed=0,
):
    """A pipeline of diffusers in which every weight matters."""
    torch.manual_seed(seed)
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in attends]
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)]
    unet = UNet2DConditionModel(
        block_out_channels=channels,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=layers,
        attention_head_dim=heads,
        use_linear_projection=linear,
        cross_attention_dim=text_width,
        sample_size=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=layers,
        latent_channels=4,
        sample_size=64,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=text_width,
            intermediate_size=2 * text_width,
            num_attention_heads=text_width // 64,
            num_hidden_layers=text_layers,
            vocab_size=49408,
            bos_token_id=0,
            eos_token_id=2,
        )
    )
    for module in (unet, vae, text):
        randomize(module)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tokenizer():
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as directory:
        write_clip_tokenizer(Path(directory))
        return CLIPTokenizer.from_pretrained(directory)


def randomize(module):
    """Norms and biases away from ones and zeros, where they would be without effect."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.1 * torch.randn_like(parameter) + (1.0 if name.endswith("weight") else 0.0))


def save_ldm(pipe, path):
    """One file with LDM's names, and the original config beside it, in the way A1111 knows it."""
    state = {
        **{f"model.diffusion_model.{ldm_unet(pipe.unet, k)}": v for k, v in pipe.unet.state_dict().items()},
        **{f"first_stage_model.{ldm_vae(k)}": ldm_value(k, v) for k, v in pipe.vae.state_dict().items()},
        **{f"cond_stage_model.transformer.{k}": v for k, v in pipe.text_encoder.state_dict().items()},
        "betas": torch.linspace(0, 1, 1000),
        "model_ema.decay": torch.tensor(0.9999),
    }
    save_file({name: value.contiguous().clone() for name, value in state.items()}, path)
    parameterization = "v" if pipe.scheduler.config.prediction_type == "v_prediction" else "eps"
    original = {
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "timesteps": 1000,
        "parameterization": parameterization,
        "scale_factor": 0.18215,
        "unet_config": {"params": {"num_heads": pipe.unet.config.attention_head_dim, "image_size": 8}},
        "first_stage_config": {"params": {"embed_dim": 4, "ddconfig": {"z_channels": 4, "resolution": 64}}},
    }
    path.with_suffix(".yaml").write_text(yaml.safe_dump({"model": {"params": original}}))


def ldm_unet(unet, name):
    per_level = unet.config.layers_per_block
    top = len(unet.config.block_out_channels) - 1

    def down(match):
        level, kind, layer = int(match[1]), match[2], int(match[3])
        index = 1 + level * (per_level + 1) + (layer if kind != "downsamplers" else per_level)
        return f"input_blocks.{index}.{1 if kind == 'attentions' else 0}."

    def up(match):
        level, kind, layer = int(match[1]), match[2], int(match[3])
        index = level * (per_level + 1) + (layer if kind != "upsamplers" else per_level)
        attends = unet.config.up_block_types[level].startswith("CrossAttn")
        slot = {"resnets": 0, "attentions": 1, "upsamplers": 2 if attends else 1}[kind]
        return f"output_blocks.{index}.{slot}."

    assert top >= 1
    resnet = ".resnets." in name
    downsampler = "downsamplers" in name
    name = re.sub(r"^down_blocks\.(\d+)\.(\w+)\.(\d+)\.", down, name)
    name = re.sub(r"^up_blocks\.(\d+)\.(\w+)\.(\d+)\.", up, name)
    for new, old in {
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
    }.items():
        name = name.replace(new, old)
    if name.startswith("conv_in."):
        return name.replace("conv_in.", "input_blocks.0.0.")
    if downsampler:
        return name.replace(".conv.", ".op.")
    if resnet:
        for new, old in {
            "norm1.": "in_layers.0.",
            "conv1.": "in_layers.2.",
            "time_emb_proj.": "emb_layers.1.",
            "norm2.": "out_layers.0.",
            "conv2.": "out_layers.3.",
            "conv_shortcut.": "skip_connection.",
        }.items():
            name = name.replace(new, old)
    return name


def ldm_vae(name):
    name = re.sub(r"^decoder\.up_blocks\.(\d+)", lambda match: f"decoder.up.{3 - int(match[1])}", name)
    for new, old in {
        "mid_block.resnets.0.": "mid.block_1.",
        "mid_block.resnets.1.": "mid.block_2.",
        "mid_block.attentions.0.group_norm.": "mid.attn_1.norm.",
        "mid_block.attentions.0.to_q.": "mid.attn_1.q.",
        "mid_block.attentions.0.to_k.": "mid.attn_1.k.",
        "mid_block.attentions.0.to_v.": "mid.attn_1.v.",
        "mid_block.attentions.0.to_out.0.": "mid.attn_1.proj_out.",
        "down_blocks.": "down.",
        "resnets.": "block.",
        "downsamplers.0.": "downsample.",
        "upsamplers.0.": "upsample.",
        "conv_shortcut.": "nin_shortcut.",
        "conv_norm_out.": "norm_out.",
    }.items():
        name = name.replace(new, old)
    return name


def ldm_value(name, value):
    """LDM's VAE has 1x1 convolutions where diffusers has linear layers."""
    kernel = "attentions" in name and ".to_" in name and value.ndim == 2
    return value[:, :, None, None] if kernel else value


def as_numpy(state):
    return {name: np.asarray(value) for name, value in state.items()}
