"""Read the text encoders of the original single-file layout, OpenAI's CLIP and OpenCLIP, under transformers' keys."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sdonnx_export.checkpoint_model import Part, Weight
from sdonnx_export.checkpoints.files import canonical_key, is_used_key
from sdonnx_export.checkpoints.ldm.keys import Weights, apply_renames, count

_OPEN_CLIP_H = 24
"""Layers of Stable Diffusion 2's encoder; the U-Net uses the output of the last but one."""


def read_clip(weights: Weights) -> Part:
    """Read OpenAI's CLIP, which these files have under transformers' keys already."""
    renamed = {canonical_key(name): w for name, w in weights.items() if is_used_key(name, "text_encoder")}
    return Part(config=_config(renamed, "quick_gelu"), weights=renamed)


def read_open_clip(weights: Weights, *, projected: bool) -> Part:
    """Read OpenCLIP: ``projected`` as in SDXL, with all layers; or as in Stable Diffusion 2, without the last layer.

    Stable Diffusion 2 applies the final norm to the output of the last layer but one. Files written from diffusers'
    weights lack the last layer and the projection already.
    """
    weights = {canonical_key(name): weight for name, weight in weights.items()}
    layers = count(weights, rf"{_LAYERS}(\d+)\.")
    if not projected and ("text_projection" in weights or layers == _OPEN_CLIP_H):
        last = tuple(f"{each}.{layers - 1}." for each in ("transformer.resblocks", "text_model.encoder.layers"))
        weights = {name: weight for name, weight in weights.items() if not name.startswith(last)}
    renamed: dict[str, Weight] = {}
    for name, weight in weights.items():
        new = apply_renames(name, _OPEN_CLIP)
        if new.endswith(("in_proj_weight", "in_proj_bias")):
            stem, kind = new.rsplit("in_proj_", 1)
            renamed |= {f"{stem}{part}_proj.{kind}": _split_qkv(weight, index) for index, part in enumerate("qkv")}
        elif name == "text_projection":
            renamed["text_projection.weight"] = _transposed(weight)
        elif name != "attn_mask":
            renamed[new] = weight
    part = "text_encoder_2" if projected else "text_encoder"
    renamed = {name: weight for name, weight in renamed.items() if is_used_key(name, part)}
    config = _config(renamed, "gelu")
    if projected:
        width = renamed["text_projection.weight"].shape[0]
        config |= {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": width}
    return Part(config=config, weights=renamed)


_LAYERS = r"(?:transformer\.resblocks|text_model\.encoder\.layers)\."

_OPEN_CLIP = (
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (rf"^{_LAYERS}", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.in_proj\.", ".in_proj_"),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def _config(weights: Mapping[str, Weight], activation: str) -> dict[str, Any]:
    vocabulary, width = weights["text_model.embeddings.token_embedding.weight"].shape
    return {
        "architectures": ["CLIPTextModel"],
        "eos_token_id": 2,
        "hidden_act": activation,
        "hidden_size": width,
        "intermediate_size": weights["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "max_position_embeddings": weights["text_model.embeddings.position_embedding.weight"].shape[0],
        "model_type": "clip_text_model",
        "num_attention_heads": width // 64,  # in every CLIP
        "num_hidden_layers": count(weights, r"text_model\.encoder\.layers\.(\d+)\."),
        "vocab_size": vocabulary,
    }


def _split_qkv(weight: Weight, index: int) -> Weight:
    """Return the queries', keys' or values' third of the in_proj of PyTorch's attention."""
    width = weight.shape[0] // 3
    third = slice(index * width, (index + 1) * width)
    return replace(weight, shape=(width, *weight.shape[1:]), read=lambda: weight.read()[third])


def _transposed(weight: Weight) -> Weight:
    """Return OpenCLIP's projection in transformers' layout, its transpose."""
    return replace(weight, shape=weight.shape[::-1], read=lambda: weight.read().T)
