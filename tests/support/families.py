"""Tiny random pipelines of diffusers, one for each family with its peculiarities; every weight in them matters."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from support.ldm import randomize, tokenizer

CROSS_DOWN, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, UP = "CrossAttnUpBlock2D", "UpBlock2D"


def unet(**changes):
    """Two levels, the upper one with attention."""
    config = {
        "block_out_channels": (32, 64),
        "down_block_types": (CROSS_DOWN, DOWN),
        "up_block_types": (UP, CROSS_UP),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 64,
        "sample_size": 8,
    }
    return random(UNet2DConditionModel(**{**config, **changes}), 1)


def vae(**changes):
    """Four levels, as Stable Diffusion's."""
    config = {
        "block_out_channels": (32, 32, 64, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "latent_channels": 4,
        "sample_size": 64,
    }
    return random(AutoencoderKL(**{**config, **changes}), 2)


def tiny_vae(**changes):
    """TAESD's, with fewer and narrower blocks."""
    config = {
        "encoder_block_out_channels": (16, 16, 16, 16),
        "decoder_block_out_channels": (16, 16, 16, 16),
        "num_encoder_blocks": (1, 2, 2, 2),
        "num_decoder_blocks": (2, 2, 2, 1),
    }
    return random(AutoencoderTiny(**{**config, **changes}), 3)


def clip(*, projected=False, seed=4, **changes):
    """OpenAI's CLIP, or with ``projected`` the text half with its projection."""
    config = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 1,
        "num_hidden_layers": 3,
        "vocab_size": 49408,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "projection_dim": 64,
    }
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return random(kind(CLIPTextConfig(**{**config, **changes})), seed)


def open_clip(*, projected=False, **changes):
    """OpenCLIP: exact GELU."""
    return clip(projected=projected, seed=5, hidden_act="gelu", **changes)


def random(module, seed):
    """With weights of a seed's own."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                fan_in = parameter.shape[-1] if parameter.shape[0] > 40000 else parameter[0].numel()
                parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)
    randomize(module)
    return module.eval()


def scheduler(kind=PNDMScheduler, **changes):
    """Stable Diffusion's betas."""
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    config |= {"skip_prk_steps": True, "set_alpha_to_one": False} if kind is PNDMScheduler else {}
    return kind(**{**config, **changes})


UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def sd1(kind=StableDiffusionPipeline, **parts):
    """Stable Diffusion 1, or a task's own U-Net of it."""
    given = {"vae": vae, "text_encoder": clip, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
    return kind(**{name: make() for name, make in given.items() if name not in parts}, **parts, **UNCHECKED)


def sd2(kind=StableDiffusionPipeline, *, in_channels=4, prediction_type="epsilon", **parts):
    """Stable Diffusion 2: OpenCLIP, padded with "!", linear projections, as many heads as a level is wide."""
    own = {
        "text_encoder": open_clip(hidden_size=128, num_attention_heads=2, projection_dim=32),
        "tokenizer": tokenizer("!"),
        "unet": unet(
            in_channels=in_channels,
            block_out_channels=(32, 64, 64),
            down_block_types=(CROSS_DOWN, CROSS_DOWN, DOWN),
            up_block_types=(UP, CROSS_UP, CROSS_UP),
            attention_head_dim=(2, 4, 4),
            cross_attention_dim=128,
            use_linear_projection=True,
        ),
        "scheduler": scheduler(prediction_type=prediction_type),
    }
    return sd1(kind, **{**own, **parts})


def xl_unet(*, ids=6, pooled=64, **changes):
    """SDXL's: pooled text and sizes added to the timestep embedding, more transformer layers at lower levels."""
    own = {
        "block_out_channels": (32, 64, 64),
        "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, UP),
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": 128,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": pooled + 8 * ids,
    }
    return unet(**{**own, **changes})


def sdxl(kind=StableDiffusionXLPipeline, **parts):
    """SDXL's base model."""
    own = {
        "vae": vae(scaling_factor=0.13025),
        "text_encoder": clip(),
        "text_encoder_2": open_clip(projected=True, eos_token_id=49407),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer("!"),
        "unet": xl_unet(),
        "scheduler": scheduler(EulerDiscreteScheduler, timestep_spacing="leading"),
    }
    return kind(**{**own, **parts}, add_watermarker=False)


def refiner():
    """SDXL's refiner: the second text encoder alone, an aesthetic score for the target size."""
    return StableDiffusionXLImg2ImgPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=open_clip(projected=True, eos_token_id=49407),
        tokenizer_2=tokenizer("!"),
        unet=xl_unet(ids=5, cross_attention_dim=64, transformer_layers_per_block=2, sample_size=8),
        scheduler=scheduler(EulerDiscreteScheduler, timestep_spacing="leading"),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def lcm():
    """A latent consistency model: the guidance scale is embedded with the timestep."""
    return sd1(LatentConsistencyModelPipeline, unet=unet(time_cond_proj_dim=32), scheduler=scheduler(LCMScheduler))


ASYMMETRIC = {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": (1, 1, 2),
    "reverse_transformer_layers_per_block": ((2, 3), (2, 1), 1),
}
"""As SSD-1B and Vega are cut from SDXL: the middle without attention, a depth for each block on the way up."""

TEXT_TO_IMAGE = {
    "sd2 base": sd2,
    "sd2 768": lambda: sd2(prediction_type="v_prediction"),
    "sd-turbo": lambda: sd2(scheduler=scheduler(EulerDiscreteScheduler, timestep_spacing="trailing")),
    "sdxl": sdxl,
    "ssd-1b": lambda: sdxl(unet=xl_unet(**ASYMMETRIC)),
    "bk-sdm": lambda: sd1(
        unet=unet(
            block_out_channels=(32, 64, 64),
            down_block_types=(CROSS_DOWN, CROSS_DOWN, CROSS_DOWN),
            up_block_types=(CROSS_UP, CROSS_UP, CROSS_UP),
            mid_block_type=None,
        )
    ),
    "sdxs": lambda: sd1(
        unet=unet(
            block_out_channels=(32, 64, 64),
            down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN),
            up_block_types=(CROSS_UP, CROSS_UP, UP),
            mid_block_type=None,
        ),
        vae=tiny_vae(),
    ),
}
"""What makes an image of text alone."""

WITH_IMAGES = {
    "sd1 inpaint": lambda: sd1(StableDiffusionInpaintPipeline, unet=unet(in_channels=9)),
    "sd2 inpaint": lambda: sd2(StableDiffusionInpaintPipeline, in_channels=9),
    "sdxl inpaint": lambda: sdxl(StableDiffusionXLInpaintPipeline, unet=xl_unet(in_channels=9)),
    "pix2pix": lambda: sd1(StableDiffusionInstructPix2PixPipeline, unet=unet(in_channels=8)),
    "refiner": refiner,
}
"""Models with an image as an input."""


def depth():
    """Stable Diffusion 2 with a depth map; the map is given, so that there is no estimator."""
    pipe = sd2(in_channels=5)
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    return StableDiffusionDepth2ImgPipeline(**parts, depth_estimator=None, feature_extractor=None)


PROMPTED = {
    "sd1": lambda: sd1(scheduler=scheduler(EulerDiscreteScheduler, timestep_spacing="linspace")),
    "sd2": sd2,
    "sdxl": sdxl,
    "refiner": refiner,
    "lcm": lcm,
    "pix2pix": WITH_IMAGES["pix2pix"],
    "inpaint": WITH_IMAGES["sd1 inpaint"],
}
"""What prompts are tried on."""
