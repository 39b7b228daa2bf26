"""Families of tiny pipelines as single files in the original layout."""

import torch
from safetensors.torch import load_file, save_file

from support import families


def sdxl_of_two_widths(**unet):
    """SDXL whose encoders differ in width, as the published do: diffusers tells them by that."""
    second = families.open_clip(projected=True, hidden_size=128, num_attention_heads=2, projection_dim=128)
    made = families.xl_unet(cross_attention_dim=192, pooled=128, **unet)
    return families.sdxl(text_encoder_2=second, unet=made)


FAMILIES = {
    **{name: make for name, make in families.TEXT_TO_IMAGE.items() if name != "sdxs"},
    **families.WITH_IMAGES,
    "depth": families.depth,
    "lcm": families.lcm,
    "sdxl lcm": lambda: families.sdxl(unet=families.xl_unet(time_cond_proj_dim=32)),
    "sdxl of two widths": sdxl_of_two_widths,
    "ssd-1b of two widths": lambda: sdxl_of_two_widths(**families.ASYMMETRIC),
}
"""All but SDXS, whose VAE no single file has a place for."""


def without_config(path, place, changes=None, metadata=None):
    """A copy of a file alone, its weights changed (None takes one out), with metadata."""
    weights = {**load_file(path), **(changes or {})}
    save_file({name: tensor.clone() for name, tensor in weights.items() if tensor is not None}, place, metadata)
    return str(place)


EMPTY = torch.zeros(0)
