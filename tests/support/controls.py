"""Tiny random ControlNets and T2I-Adapters."""

from diffusers import ControlNetModel, T2IAdapter

from support.families import random


def controlnet(model, seed=7, **changes):
    """One for a U-Net, of which every weight matters."""
    widths = (8, 8, 16, 16)
    made = ControlNetModel.from_unet(model, conditioning_embedding_out_channels=widths, load_weights_from_unet=False)
    return random(ControlNetModel.from_config({**made.config, **changes}), seed)


def adapter(seed=9, **changes):
    config = {"channels": [32, 64], "num_res_blocks": 2, "downscale_factor": 8}
    return random(T2IAdapter(**{**config, **changes}), seed)
