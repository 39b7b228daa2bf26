"""Tiny random Stable Diffusion 1 pipelines, and any family's weights as one file in the original LDM layout."""

import re
import tempfile
from functools import cache
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from sdonnx_export.packaging.clip_tokenizer import write_clip_tokenizer
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


def tokenizer(pad="<|endoftext|>"):
    """CLIP's, padded with ``pad``."""
    return CLIPTokenizer.from_pretrained(_tokenizer_directory(pad).name)


@cache
def _tokenizer_directory(pad):
    directory = tempfile.TemporaryDirectory()
    write_clip_tokenizer(Path(directory.name), pad)
    return directory


def randomize(module):
    """Norms and biases away from ones and zeros, where they would be without effect."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.1 * torch.randn_like(parameter) + (1.0 if name.endswith("weight") else 0.0))


def save_ldm(pipe, path):
    """One file with LDM's names, with the original config next to it as A1111 expects."""
    save_file({name: value.contiguous().clone() for name, value in ldm_state(pipe).items()}, path)
    path.with_suffix(".yaml").write_text(yaml.safe_dump({"model": {"params": original_config(pipe)}}))


def ldm_state(pipe):
    """All weights, and some that a training leaves."""
    return {
        **{f"model.diffusion_model.{ldm_unet(pipe.unet, k)}": v for k, v in pipe.unet.state_dict().items()},
        **{f"first_stage_model.{ldm_vae(k)}": ldm_value(k, v) for k, v in pipe.vae.state_dict().items()},
        **ldm_texts(pipe),
        "betas": torch.linspace(0, 1, 1000),
        "model_ema.decay": torch.tensor(0.9999),
    }


def original_config(pipe):
    """SDXL's has another structure: its U-Net is a "network", and what it predicts is how the "denoiser" scales."""
    heads = pipe.unet.config.attention_head_dim
    unet = {"params": {"num_heads": heads if isinstance(heads, int) else list(heads), "image_size": 8}}
    config = {
        "scale_factor": pipe.vae.config.scaling_factor,
        "first_stage_config": {"params": {"embed_dim": 4, "ddconfig": {"z_channels": 4, "resolution": 64}}},
    }
    predicts_v = pipe.scheduler.config.prediction_type == "v_prediction"
    if getattr(pipe, "text_encoder_2", None) is not None:
        target = f"sgm.modules.diffusionmodules.denoiser_scaling.{'V' if predicts_v else 'Eps'}Scaling"
        denoiser = {"params": {"num_idx": 1000, "scaling_config": {"target": target}}}
        return {**config, "network_config": unet, "denoiser_config": denoiser}
    betas = {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000}
    return {**config, **betas, "unet_config": unet, "parameterization": "v" if predicts_v else "eps"}


def ldm_texts(pipe):
    """The text encoders where each family keeps them."""
    first, second = pipe.text_encoder, getattr(pipe, "text_encoder_2", None)
    if second is None and first.config.hidden_act == "quick_gelu":
        return prefixed("cond_stage_model.transformer.", first.state_dict())
    if second is None:
        return prefixed("cond_stage_model.model.", open_clip_with_unread(first))
    if first is None:
        return prefixed("conditioner.embedders.0.model.", open_clip(second.state_dict()))
    return {
        **prefixed("conditioner.embedders.0.transformer.", first.state_dict()),
        **prefixed("conditioner.embedders.1.model.", open_clip(second.state_dict())),
    }


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def open_clip(state):
    """OpenCLIP's names and shapes for transformers': queries, keys and values in one, the projection turned."""
    renamed = {"logit_scale": torch.tensor(4.6)}
    for name, value in state.items():
        name = re.sub(r"^text_model\.", "", name)
        for new, old in {
            "embeddings.position_embedding.weight": "positional_embedding",
            "embeddings.token_embedding.": "token_embedding.",
            "final_layer_norm.": "ln_final.",
            "encoder.layers.": "transformer.resblocks.",
            "layer_norm": "ln_",
            "self_attn.": "attn.",
            "fc1.": "c_fc.",
            "fc2.": "c_proj.",
        }.items():
            name = name.replace(new, old)
        renamed[name] = value
    for name in [name for name in renamed if ".attn.q_proj." in name]:
        parts = [renamed.pop(name.replace("q_proj", f"{which}_proj")) for which in "qkv"]
        renamed[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    if "text_projection.weight" in renamed:
        renamed["text_projection"] = renamed.pop("text_projection.weight").T
    return renamed


def open_clip_with_unread(encoder):
    """As Stable Diffusion 2 has it: with a last layer, a projection and a mask that nothing reads."""
    state = open_clip(encoder.state_dict())
    layers, width = encoder.config.num_hidden_layers, encoder.config.hidden_size
    first = "transformer.resblocks.0."
    more = {name.replace(".0.", f".{layers}.", 1): value + 1 for name, value in state.items() if name.startswith(first)}
    return {**state, **more, "text_projection": torch.eye(width), "attn_mask": torch.zeros(77, 77)}


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
        "time_embedding.cond_proj.": "time_embed.cond_proj.",
        "add_embedding.linear_1.": "label_emb.0.0.",
        "add_embedding.linear_2.": "label_emb.0.2.",
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
