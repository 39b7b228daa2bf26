"""Recognize files that are not whole checkpoints by their weights' names, for the error that says what they are."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

EXPORTABLE = (
    "what can be exported is a whole checkpoint of Stable Diffusion 1, 2 or XL, a ControlNet, T2I-Adapter or "
    "IP-Adapter for one, or an upscaler (RRDBNet, SRVGGNetCompact)"
)

_CONTROL_SIGNS = {
    r"(task_embedding$|control_add_embedding\.|spatial_ch_projs\.|transformer_layes\.)": (
        "a union ControlNet; give a ControlNet of one kind"
    ),
    r".*lllite": "a ControlNet-LLLite; give a whole ControlNet",
    r"(controlnet_blocks\.|controlnet_x_embedder\.|controlnet_mode_embedder\.|pos_embed_input\.)": (
        "a ControlNet of Flux or Stable Diffusion 3; give one of Stable Diffusion 1, 2 or XL"
    ),
    r"style_embedding$": "a style T2I-Adapter; give one of another kind",
    r"brushnet_": "a BrushNet; give an inpainting checkpoint, or a ControlNet",
}
"""As `_SIGNS`, of controls that can't be exported though they may look like others that can."""

_SIGNS = {
    r"(control_model\.|input_hint_block\.|controlnet_|lora_controlnet$|difference$|.*\bzero_convs\.)": (
        "a ControlNet of an unsupported kind, or a part of one; give a whole one, or the checkpoint that it controls"
    ),
    r"(lora_|lycoris_|.*\.lora[_.]|.*_lora\.|.*\.(hada_[wt]|lokr_[wt]|oft_|dora_scale|alpha$))": (
        "a LoRA or a relative of it; give the checkpoint that it is for, and this file with --lora"
    ),
    r"(ip_adapter\.|image_proj\.|image_proj_model\.|adapter_modules\.)": (
        "a part of an IP-Adapter, or a state of its training; give one with 'image_proj' and 'ip_adapter'"
    ),
    r"params(_ema)?\.|layers\.\d+\.(residual_group|blocks\.\d+)\.|conv_after_body\.|block_1\.c1_r\.|feats\.\d+\.": (
        "an upscaler of another architecture; give an RRDBNet (ESRGAN, Real-ESRGAN) or an SRVGGNetCompact"
    ),
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
        "a part of a U-Net; give a whole U-Net, and with --base the checkpoint that it was made from"
    ),
    r".*(text_model\.encoder|transformer\.resblocks)\.": (
        "a text encoder alone; give it with --text-encoder, and a checkpoint or a U-Net as the source"
    ),
}
"""Signs of a single component, for files without a U-Net in the original layout."""

_SPARSE = {r".*\bmotion_modules\.": "a SparseCtrl of AnimateDiff; give a ControlNet for single images"}

_UNET = ("model.diffusion_model.input_blocks.", "model.diffusion_model.time_embedding.")
"""Prefixes of a U-Net's keys in the original and diffusers' spelling."""


def unsupported_files(path: Path, names: Iterable[str]) -> str | None:
    """Return the message that says what a file is and what to do; None if it may be a whole checkpoint."""
    names = list(names)
    is_unet = any(name.startswith(_UNET) for name in names)
    return _message(path, names, _SIGNS if is_unet else {**_SIGNS, **_PARTS})


def unsupported_control(path: Path, names: Iterable[str]) -> str | None:
    """Return the message for a ControlNet or T2I-Adapter of an unsupported kind; None if it may be supported."""
    names = list(names)
    is_sparse = any(name.startswith("controlnet_") or "input_hint_block." in name for name in names)
    return _message(path, names, _CONTROL_SIGNS | (_SPARSE if is_sparse else {}))


def _message(path: Path, names: Sequence[str], signs: Mapping[str, str]) -> str | None:
    for sign, kind in signs.items():
        pattern = re.compile(sign)
        if any(pattern.match(name) for name in names):
            what, remedy = kind.split("; ", 1)
            return f"{path} looks like {what}; {EXPORTABLE}; {remedy}"
    return None
