"""Recognize files that are not whole checkpoints by their weights' names, for the error that says what they are."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

EXPORTABLE = (
    "what can be exported is a whole checkpoint of Stable Diffusion 1, 2 or XL, or a ControlNet or T2I-Adapter for one"
)

_SIGNS = {
    r"(control_model\.|input_hint_block\.|controlnet_|lora_controlnet$|lllite_|.*\bzero_convs\.)": (
        "a ControlNet of an unsupported kind, or a part of one; give a whole one, or the checkpoint that it controls"
    ),
    r"(lora_|lycoris_|.*\.lora[_.]|.*_lora\.|.*\.(hada_[wt]|lokr_[wt]|oft_|dora_scale|alpha$))": (
        "a LoRA or a relative of it; give the checkpoint that it is for, and this file with --lora"
    ),
    r"(ip_adapter\.|image_proj\.|image_proj_model\.)": "an IP-Adapter; give the checkpoint that it extends",
    r"(adapter\.)?body\.\d+\.": (
        "a T2I-Adapter of an unsupported kind, or a part of one; give a whole one, or the checkpoint that it controls"
    ),
    r"(emb_params$|string_to_param|clip_[lg]$|<[^>]+>$)": (
        "a textual inversion; give the checkpoint that it was trained with"
    ),
    r".*\bmotion_modules\.": "a motion module of AnimateDiff; give the checkpoint that it animates",
    r".*\b(norm1_context|joint_blocks|double_blocks|double_stream_blocks|single_transformer_blocks)\.": (
        "Flux or Stable Diffusion 3; give a checkpoint of one of those"
    ),
    r"edm_": "a model of EDM's formulation (Playground 2.5, CosXL); give one of another kind",
    r"(model\.diffusion_model\.label_emb\.weight|low_scale_model\.)": (
        "the x4 upscaler; give the checkpoint that generates the image"
    ),
    r"(noise_augmentor|embedder)\.": "Stable unCLIP, whose input is an image, not text; give Stable Diffusion 2.1",
}
"""Pattern of names that no whole checkpoint has; what they are a sign of, and the remedy. The first match counts."""

_PARTS = {
    r"(first_stage_model\.|vae\.)?(encoder|decoder)\.(conv_in|mid|mid_block)\.": (
        "a VAE alone; give it with --vae, and a whole checkpoint as the source"
    ),
    r"(unet\.)?(down_blocks|mid_block|up_blocks)\.": (
        "a U-Net alone, in diffusers' names; put it into the unet directory of a diffusers checkpoint, and give that"
    ),
    r".*(text_model\.encoder|transformer\.resblocks)\.": "a text encoder alone; give the whole checkpoint",
}
"""Signs of a single component, for files without a U-Net in the original layout."""

_UNET = "model.diffusion_model.input_blocks."


def unsupported_files(path: Path, names: Iterable[str]) -> str | None:
    """Return the message that says what a file is and what to do; None if it may be a whole checkpoint."""
    names = list(names)
    signs: Mapping[str, str] = _SIGNS if any(name.startswith(_UNET) for name in names) else {**_SIGNS, **_PARTS}
    for sign, kind in signs.items():
        pattern = re.compile(sign)
        if any(pattern.match(name) for name in names):
            what, remedy = kind.split("; ", 1)
            return f"{path} looks like {what}; {EXPORTABLE}; {remedy}"
    return None
