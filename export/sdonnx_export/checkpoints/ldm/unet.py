"""The U-Net of the original single-file layout in diffusers' names, with the config that its keys and shapes tell."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sdonnx_runtime.errors import ExportError

from sdonnx_export.checkpoint_model import Part, Weight
from sdonnx_export.checkpoints.ldm.keys import Weights, apply_renames, count

Shapes = Mapping[str, tuple[int, ...]]


def read_unet(weights: Weights, original: Mapping[str, Any], *, heads: int | None) -> Part:
    """A U-Net.

    Args:
        weights: by their names in the U-Net.
        original: what the original config says, flat.
        heads: how many a family has at each level where that doesn't say it; None is one for 64 channels.

    Raises:
        ExportError: there are weights that no such U-Net has, or its attention is of several kinds.
    """
    found = rename_keys(weights)
    shapes = {name: weight.shape for name, weight in found.items()}
    return Part(config=_config(shapes, original, heads), weights=found)


def rename_keys(weights: Weights, more: Mapping[str, str] = MappingProxyType({})) -> dict[str, Weight]:
    """The weights by diffusers' names; ``more`` has those of what is beside a U-Net's blocks.

    Raises:
        ExportError: one has no place.
    """
    names = {**_block_names(weights), **more}
    found: dict[str, Weight] = {}
    for name, weight in weights.items():
        block = next((old for old in _block_prefixes(name) if old in names), None)
        if block is None:
            raise ExportError(f"the U-Net's '{name}' has no place in a Stable Diffusion model; it is of another kind")
        rest = name.removeprefix(block)
        inner = rest if "attentions" in names[block] else apply_renames(rest, _RESNET)
        found[names[block] + inner] = weight
    return found


def _block_prefixes(name: str) -> Iterable[str]:
    """``input_blocks.1.0.in_layers.0.weight`` belongs under ``input_blocks.1.0.``; the longest first."""
    parts = name.split(".")
    return (".".join(parts[:length]) + "." for length in (3, 2))


_RESNET = (
    (r"^in_layers\.0\.", "norm1."),
    (r"^in_layers\.2\.", "conv1."),
    (r"^emb_layers\.1\.", "time_emb_proj."),
    (r"^out_layers\.0\.", "norm2."),
    (r"^out_layers\.3\.", "conv2."),
    (r"^skip_connection\.", "conv_shortcut."),
    (r"^op\.", "conv."),
)

_OUTSIDE = {
    "time_embed.0.": "time_embedding.linear_1.",
    "time_embed.2.": "time_embedding.linear_2.",
    "time_embed.cond_proj.": "time_embedding.cond_proj.",
    "label_emb.0.0.": "add_embedding.linear_1.",
    "label_emb.0.2.": "add_embedding.linear_2.",
    "input_blocks.0.0.": "conv_in.",
    "out.0.": "conv_norm_out.",
    "out.2.": "conv_out.",
}
"""What is outside of the blocks."""


def _block_names(weights: Weights) -> dict[str, str]:
    """What each numbered block of the U-Net is called in diffusers."""
    names = dict(_OUTSIDE)
    layers = {"resnets": 0, "attentions": 0}
    for slot in range(count(weights, r"middle_block\.(\d+)\.")):
        kind = _kind(weights, f"middle_block.{slot}.")
        names[f"middle_block.{slot}."] = f"mid_block.{kind}.{layers[kind]}."
        layers[kind] += 1
    for side, there, sampler in (("input", "down", "downsamplers"), ("output", "up", "upsamplers")):
        level = layer = 0
        for index in range(1 if side == "input" else 0, count(weights, rf"{side}_blocks\.(\d+)\.")):
            place, target, resizes = f"{side}_blocks.{index}.", f"{there}_blocks.{level}.", False
            for slot in ("0.", "1.", "2."):
                if f"{place}{slot}op.weight" in weights or f"{place}{slot}conv.weight" in weights:
                    names[place + slot], resizes = f"{target}{sampler}.0.", True
                else:
                    names[place + slot] = f"{target}{_kind(weights, place + slot)}.{layer}."
            level, layer = (level + 1, 0) if resizes else (level, layer + 1)
    return names


def _kind(weights: Weights, place: str) -> str:
    return "attentions" if f"{place}norm.weight" in weights else "resnets"


def _config(shapes: Shapes, original: Mapping[str, Any], heads: int | None) -> dict[str, Any]:
    up = [_depths(shapes, f"up_blocks.{level}") for level in range(count(shapes, r"down_blocks\.(\d+)\."))]
    config = {
        **down_config(shapes, original, heads, up),
        "out_channels": shapes["conv_out.weight"][0],
        "up_block_types": ["CrossAttnUpBlock2D" if depths else "UpBlock2D" for depths in up],
    }
    if "time_embedding.cond_proj.weight" in shapes:
        config["time_cond_proj_dim"] = shapes["time_embedding.cond_proj.weight"][1]
    return config


def down_config(
    shapes: Shapes, original: Mapping[str, Any], heads: int | None, up: Sequence[list[int]] = ()
) -> dict[str, Any]:
    """What the way down and the middle tell; ``up`` is the depths of the attentions on the way up, where there is one.

    Raises:
        ExportError: its attention is of several kinds, or there is none.
    """
    levels = range(count(shapes, r"down_blocks\.(\d+)\."))
    channels = [shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in levels]
    contexts = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    projections = {len(shape) for name, shape in shapes.items() if name.endswith("proj_in.weight")}
    if len(contexts) != 1 or len(projections) != 1:
        raise ExportError(
            "the U-Net has no cross-attention to text, or several kinds of it; a Stable Diffusion model has one kind"
        )
    down = [_depths(shapes, f"down_blocks.{level}") for level in levels]
    return {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": _heads(channels, original, heads),
        "block_out_channels": channels,
        "cross_attention_dim": contexts.pop(),
        "down_block_types": ["CrossAttnDownBlock2D" if depths else "DownBlock2D" for depths in down],
        "in_channels": shapes["conv_in.weight"][1],
        "layers_per_block": [count(shapes, rf"down_blocks\.{level}\.resnets\.(\d+)\.") for level in levels],
        "mid_block_type": _mid_block(shapes),
        **_transformer_layers(down, _depths(shapes, "mid_block"), up or [[]] * len(down)),
        "use_linear_projection": projections == {2},
    }


def _heads(channels: list[int], original: Mapping[str, Any], heads: int | None) -> Any:
    """Counts of heads, for that is what diffusers means by ``attention_head_dim``."""
    width = original.get("num_head_channels", -1)
    if width <= 0 and original.get("num_heads", heads) is not None:
        return original.get("num_heads", heads)
    return [max(count // (width if width > 0 else 64), 1) for count in channels]


def _mid_block(shapes: Shapes) -> str | None:
    """Distilled models leave out its attention, and all of it."""
    if "mid_block.resnets.0.conv1.weight" not in shapes:
        return None
    return "UNetMidBlock2DCrossAttn" if _depths(shapes, "mid_block") else "UNetMidBlock2D"


def _depths(shapes: Shapes, block: str) -> list[int]:
    """How many transformer layers each attention of a block has."""
    return [
        count(shapes, rf"{block}\.attentions\.{layer}\.transformer_blocks\.(\d+)\.")
        for layer in range(count(shapes, rf"{block}\.attentions\.(\d+)\."))
    ]


def _transformer_layers(down: list[list[int]], mid: list[int], up: Sequence[list[int]]) -> dict[str, Any]:
    """The keys that say so: for each level a number, or a list where its blocks differ.

    The way up is the way down reversed unless a second key says otherwise. The lowest level's number is the middle's
    too, and says that where the level has no attention of its own.
    """
    found = [_one(depths or [1]) for depths in (*down[:-1], down[-1] or mid)]
    config: dict[str, Any] = {"transformer_layers_per_block": found}
    if any(depths and _one(depths) != depth for depths, depth in zip(up, found[::-1], strict=True)):
        config["reverse_transformer_layers_per_block"] = [_one(depths or [1]) for depths in up]
    return config


def _one(depths: list[int]) -> int | list[int]:
    return depths[0] if len(set(depths)) == 1 else depths
