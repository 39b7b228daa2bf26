"""Read a ControlNet or a T2I-Adapter from a single file with original or diffusers' keys, and infer its config."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.packages.families import FAMILIES

from sdonnx_export.checkpoint_model import Checkpoint, Part, Weight
from sdonnx_export.checkpoints.ldm.keys import Weights, count, with_prefix
from sdonnx_export.checkpoints.ldm.relative_control import (
    MARKERS,
    add_base,
    original_names,
    shared_config,
    stored_relative,
)
from sdonnx_export.checkpoints.ldm.unet import down_config, rename_keys
from sdonnx_export.checkpoints.unsupported import unsupported_control

_SDXL = FAMILIES["sdxl"]


def read_control(path: Path, weights: Weights, base: Checkpoint | None = None) -> dict[str, Part]:
    """Return the part by its name; empty if the file is neither.

    ``base`` is the model whose U-Net a ControlNet may be stored relative to.

    Raises:
        ExportError: weights are missing or unknown, or the base model is.
    """
    message = unsupported_control(path, weights)
    if message is not None:
        raise ExportError(message)
    kind, is_controlnet = "ControlNet", any(name in weights for name in _CONTROLNET)
    marker = stored_relative(weights)
    if is_controlnet and marker is not None and base is None:
        raise ExportError(f"{path} is {MARKERS[marker]}; give the checkpoint that it was made for with --base SRC")
    try:
        if is_controlnet:
            return {"controlnet": _read_controlnet(path, weights, base)}
        adapter, kind = with_prefix(weights, "adapter.") or weights, "T2I-Adapter"
        if "body.0.resnets.0.block1.weight" in adapter:
            return {"adapter": _adapter(path, adapter)}
        if any(re.match(r"body\.0\.(body\.0\.)?block1\.weight", name) for name in adapter):
            light = "body.0.out_conv.weight" in adapter
            renamed = {_rename_adapter(name, light=light): weight for name, weight in adapter.items()}
            return {"adapter": _adapter(path, renamed)}
    except (ExportError, KeyError) as error:
        reason = (
            f"lacks the weight {error}; download it again" if isinstance(error, KeyError) else f"can't be read: {error}"
        )
        raise ExportError(f"{path} looks like a {kind}, but {reason}") from None
    return {}


_CONTROLNET = (
    "control_model.input_hint_block.0.weight",
    "control_model.controlnet_cond_embedding.conv_in.weight",
    "input_hint_block.0.weight",
    "controlnet_cond_embedding.conv_in.weight",
)
"""Keys of which every ControlNet has one."""


def _read_controlnet(path: Path, weights: Weights, base: Checkpoint | None) -> Part:
    marker = stored_relative(weights)
    unet = base.parts["unet"] if marker is not None and base is not None else None
    own = {name: weight for name, weight in weights.items() if name not in MARKERS}
    own = with_prefix(own, "control_model.") or own
    if "input_hint_block.0.weight" in own:
        own = _rename_controlnet(own, {} if unet is None else original_names(unet))
    if unet is None or marker is None:
        part = _controlnet(own)
    else:
        part = _controlnet(add_base(own, unet, marker))
        part = replace(part, config={**part.config, **shared_config(unet)})
    is_pooled = "shuffle" in path.stem.lower()  # AUTOMATIC1111's rule; the weights don't tell
    return replace(part, config={**part.config, "global_pool_conditions": True}) if is_pooled else part


def _rename_controlnet(weights: Weights, blocks: Mapping[str, str]) -> dict[str, Weight]:
    """Rename original keys of a ControlNet to diffusers'; ``blocks`` are prefixes that its own keys may not tell."""
    last = count(weights, r"input_hint_block\.(\d+)\.") - 1
    names = {"middle_block_out.0.": "controlnet_mid_block.", "input_hint_block.0.": f"{_EMBEDDING}.conv_in."}
    names[f"input_hint_block.{last}."] = f"{_EMBEDDING}.conv_out."
    names |= {f"input_hint_block.{index}.": f"{_EMBEDDING}.blocks.{index // 2 - 1}." for index in range(2, last, 2)}
    zeros = count(weights, r"zero_convs\.(\d+)\.")
    names |= {f"zero_convs.{index}.0.": f"controlnet_down_blocks.{index}." for index in range(zeros)}
    return rename_keys(weights, {**blocks, **names})


_EMBEDDING = "controlnet_cond_embedding"


def _controlnet(weights: Weights) -> Part:
    shapes = {name: weight.shape for name, weight in weights.items()}
    contexts = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    config = down_config(shapes, {}, 8 if contexts == {768} else None)
    downsampling = range(1, count(shapes, rf"{_EMBEDDING}\.blocks\.(\d+)\."), 2)
    widths = [shapes[f"{_EMBEDDING}.conv_in.weight"][0]]
    config |= {
        "_class_name": "ControlNetModel",
        "conditioning_channels": shapes[f"{_EMBEDDING}.conv_in.weight"][1],
        "conditioning_embedding_out_channels": [
            *widths, *(shapes[f"{_EMBEDDING}.blocks.{index}.weight"][0] for index in downsampling)
        ],
    }  # fmt: skip
    if "add_embedding.linear_1.weight" in shapes:
        width = shapes["add_embedding.linear_1.weight"][1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (width - _SDXL.pooled_width) // _SDXL.time_ids,
            "projection_class_embeddings_input_dim": width,
        }
    return Part(config=config, weights=weights)


def _rename_adapter(name: str, *, light: bool) -> str:
    """Rename an original key to diffusers'; a full adapter numbers its residual blocks, of which a level has two."""
    name = re.sub(r"^body\.(\d+)\.body\.(\d+)\.", r"body.\1.resnets.\2.", name)
    match = re.match(r"body\.(\d+)\.(block[12]\..*)", name)
    if match:
        return f"body.{int(match[1]) // 2}.resnets.{int(match[1]) % 2}.{match[2]}"
    return name if light else re.sub(r"^body\.(\d+)\.in_conv\.", lambda it: f"body.{int(it[1]) // 2}.in_conv.", name)


def _adapter(path: Path, weights: Weights) -> Part:
    light = "body.0.out_conv.weight" in weights
    levels = count(weights, r"body\.(\d+)\.")
    last = "out_conv" if light else "resnets.0.block1"
    channels = [weights[f"body.{level}.{last}.weight"].shape[0] for level in range(levels)]
    inputs = weights["body.0.in_conv.weight" if light else "conv_in.weight"].shape[1]
    options = {downscale**2 * channels: (downscale, channels) for downscale in (8, 16) for channels in (1, 3)}
    if inputs not in options:
        known = ", ".join(str(each) for each in options)
        raise ExportError(f"{path} is a T2I-Adapter of {inputs} input channels; expected {known}")
    downscale, in_channels = options[inputs]
    config = {
        "_class_name": "T2IAdapter",
        "adapter_type": "light_adapter" if light else "full_adapter_xl" if downscale == 16 else "full_adapter",
        "channels": channels[:-1] if light else channels,
        "downscale_factor": downscale,
        "in_channels": in_channels,
        "num_res_blocks": count(weights, r"body\.0\.resnets\.(\d+)\."),
    }
    return Part(config=config, weights={f"adapter.{name}": weight for name, weight in weights.items()})
