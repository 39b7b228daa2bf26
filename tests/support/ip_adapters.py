"""Tiny random IP-Adapters in the form of their published files, and the image encoder that they were trained with."""

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from support.families import random

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 24,
    "image_size": 28,
    "patch_size": 7,
}


def image_encoder(**changes):
    return random(CLIPVisionModelWithProjection(CLIPVisionConfig(**{**VISION, **changes})), 21)


def ip_adapter(unet, *, plus=False, seed=22, tokens=None, hidden=64, heads=2, depth=4):
    """The state dict of an IP-Adapter for a U-Net of diffusers, which reads no other depth of a Plus."""
    torch.manual_seed(seed)
    text = unet.config.cross_attention_dim
    projection = _resampler(text, tokens or 6, hidden, heads, depth) if plus else _projection(text)
    layers = [layer for name, layer in unet.named_modules() if name.endswith("attn2")]
    order = {"down_blocks": 0, "up_blocks": 1, "mid_block": 2}
    names = [name for name in unet.attn_processors if "attn2" in name]
    assert len(names) == len(layers) and names == sorted(names, key=lambda name: order[name.split(".")[0]])
    widths = [unet.get_submodule(name.removesuffix(".processor")).to_q.out_features for name in names]
    own = {
        f"{2 * index + 1}.to_{each}_ip.weight": _weight(width, text)
        for index, width in enumerate(widths)
        for each in "kv"
    }
    return {"image_proj": projection, "ip_adapter": own}


def save_ip_adapter(state, path):
    """Write it as the Hub has it: flat in safetensors, nested in a pickle."""
    if path.suffix == ".safetensors":
        flat = {f"{part}.{name}": tensor for part, own in state.items() for name, tensor in own.items()}
        save_file(flat, path)
    else:
        torch.save(state, path)
    return path


def _projection(text):
    width = VISION["projection_dim"]
    return {"proj.weight": _weight(4 * text, width), "proj.bias": _bias(4 * text), **_norm("norm", text)}


def _resampler(text, tokens, hidden, heads, depth):
    state = {"latents": _weight(tokens, hidden)[None], **_linear("proj_in", hidden, VISION["hidden_size"])}
    state |= {**_linear("proj_out", text, hidden), **_norm("norm_out", text)}
    inner = 64 * heads
    for index in range(depth):
        attention, forward = f"layers.{index}.0", f"layers.{index}.1"
        state |= {**_norm(f"{attention}.norm1", hidden), **_norm(f"{attention}.norm2", hidden)}
        state |= {
            f"{attention}.to_q.weight": _weight(inner, hidden),
            f"{attention}.to_kv.weight": _weight(2 * inner, hidden),
        }
        state |= {f"{attention}.to_out.weight": _weight(hidden, inner), **_norm(f"{forward}.0", hidden)}
        state |= {
            f"{forward}.1.weight": _weight(4 * hidden, hidden),
            f"{forward}.3.weight": _weight(hidden, 4 * hidden),
        }
    return state


def _weight(*shape):
    return torch.randn(shape) / shape[-1] ** 0.5


def _bias(size):
    return torch.randn(size) * 0.2


def _norm(name, size):
    return {f"{name}.weight": 1 + _bias(size), f"{name}.bias": _bias(size)}


def _linear(name, outputs, inputs):
    return {f"{name}.weight": _weight(outputs, inputs), f"{name}.bias": _bias(outputs)}
