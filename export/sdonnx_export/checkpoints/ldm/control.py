"""A ControlNet or a T2I-Adapter in a single file, by its original names or diffusers', and the config they tell."""

import re
from pathlib import Path
from typing import Any

from sdonnx_runtime.errors import ExportError

from sdonnx_export.checkpoint_model import Part
from sdonnx_export.checkpoints.ldm.keys import Weights, count, with_prefix
from sdonnx_export.checkpoints.ldm.unet import down_config, rename_keys

_POOLED, _SIZES = 1280, 6
"""What SDXL is told beside the time: its pooled text, and how many numbers of sizes."""


def read_control(path: Path, weights: Weights) -> dict[str, Part]:
    """The part, by its name; empty if the file holds neither.

    Raises:
        ExportError: parts of it are missing or unknown.
    """
    what = "ControlNet"
    try:
        for prefix in ("control_model.", ""):
            mine = with_prefix(weights, prefix)
            if "input_hint_block.0.weight" in mine:
                return {"controlnet": _part(_original(mine))}
            if "controlnet_cond_embedding.conv_in.weight" in mine:
                return {"controlnet": _part(mine)}
        adapter, what = with_prefix(weights, "adapter.") or weights, "T2I-Adapter"
        if "body.0.resnets.0.block1.weight" in adapter:
            return {"adapter": _adapter(path, adapter)}
        if any(re.match(r"body\.0\.(body\.0\.)?block1\.weight", name) for name in adapter):
            light = "body.0.out_conv.weight" in adapter
            mine = {_adapter_name(name, light=light): weight for name, weight in adapter.items()}
            return {"adapter": _adapter(path, mine)}
    except (ExportError, KeyError) as error:
        reason = (
            f"lacks the weight {error}; download it again" if isinstance(error, KeyError) else f"can't be read: {error}"
        )
        raise ExportError(f"{path} looks like a {what}, but {reason}") from None
    return {}


def _original(weights: Weights) -> dict[str, Any]:
    """By diffusers' names."""
    last = count(weights, r"input_hint_block\.(\d+)\.") - 1
    own = {"middle_block_out.0.": "controlnet_mid_block.", "input_hint_block.0.": f"{_EMBEDDING}.conv_in."}
    own[f"input_hint_block.{last}."] = f"{_EMBEDDING}.conv_out."
    own |= {f"input_hint_block.{index}.": f"{_EMBEDDING}.blocks.{index // 2 - 1}." for index in range(2, last, 2)}
    zeros = count(weights, r"zero_convs\.(\d+)\.")
    own |= {f"zero_convs.{index}.0.": f"controlnet_down_blocks.{index}." for index in range(zeros)}
    return rename_keys(weights, own)


_EMBEDDING = "controlnet_cond_embedding"


def _part(weights: Weights) -> Part:
    shapes = {name: weight.shape for name, weight in weights.items()}
    contexts = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    config = down_config(shapes, {}, 8 if contexts == {768} else None)
    blocks = range(1, count(shapes, rf"{_EMBEDDING}\.blocks\.(\d+)\."), 2)
    widths = [shapes[f"{_EMBEDDING}.conv_in.weight"][0]]
    config |= {
        "_class_name": "ControlNetModel",
        "conditioning_channels": shapes[f"{_EMBEDDING}.conv_in.weight"][1],
        "conditioning_embedding_out_channels": [
            *widths, *(shapes[f"{_EMBEDDING}.blocks.{index}.weight"][0] for index in blocks)
        ],
    }  # fmt: skip
    if "add_embedding.linear_1.weight" in shapes:
        width = shapes["add_embedding.linear_1.weight"][1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (width - _POOLED) // _SIZES,
            "projection_class_embeddings_input_dim": width,
        }
    return Part(config=config, weights=weights)


def _adapter_name(name: str, *, light: bool) -> str:
    """An original one, of two residual blocks a level, in diffusers' names; a light one has them by level already."""
    name = re.sub(r"^body\.(\d+)\.body\.(\d+)\.", r"body.\1.resnets.\2.", name)
    found = re.match(r"body\.(\d+)\.(block[12]\..*)", name)
    if found:
        return f"body.{int(found[1]) // 2}.resnets.{int(found[1]) % 2}.{found[2]}"
    return name if light else re.sub(r"^body\.(\d+)\.in_conv\.", lambda it: f"body.{int(it[1]) // 2}.in_conv.", name)


def _adapter(path: Path, weights: Weights) -> Part:
    light = "body.0.out_conv.weight" in weights
    levels = count(weights, r"body\.(\d+)\.")
    last = "out_conv" if light else "resnets.0.block1"
    channels = [weights[f"body.{level}.{last}.weight"].shape[0] for level in range(levels)]
    inputs = weights["body.0.in_conv.weight" if light else "conv_in.weight"].shape[1]
    sizes = {downscale**2 * picture: (downscale, picture) for downscale in (8, 16) for picture in (1, 3)}
    if inputs not in sizes:
        known = ", ".join(str(size) for size in sizes)
        raise ExportError(f"{path} is a T2I-Adapter that reads {inputs} channels; expected {known}")
    downscale, picture = sizes[inputs]
    config = {
        "_class_name": "T2IAdapter",
        "adapter_type": "light_adapter" if light else "full_adapter_xl" if downscale == 16 else "full_adapter",
        "channels": channels[:-1] if light else channels,
        "downscale_factor": downscale,
        "in_channels": picture,
        "num_res_blocks": count(weights, r"body\.0\.resnets\.(\d+)\."),
    }
    return Part(config=config, weights={f"adapter.{name}": weight for name, weight in weights.items()})
