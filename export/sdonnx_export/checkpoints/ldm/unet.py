"""Read the U-Net of the original single-file layout under diffusers' keys, and infer its config from the shapes."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sdonnx_runtime.errors import ExportError

from sdonnx_export.checkpoint_model import Part, Weight
from sdonnx_export.checkpoints.ldm.keys import Weights, apply_renames, as_linear, count

Shapes = Mapping[str, tuple[int, ...]]

_PROJECTIONS = (".proj_in.weight", ".proj_out.weight")


def read_unet(weights: Weights, original: Mapping[str, Any], *, heads: int | None, is_linear: bool = False) -> Part:
    """Read a U-Net with LDM's keys or diffusers'.

    Args:
        weights: by key, without the U-Net's prefix.
        original: the original config, flattened.
        heads: attention heads on each level, unless the original config has them; None is one for every 64 channels.
        is_linear: whether transformers' projections are linear layers. stable-diffusion.cpp stores all as convolutions.

    Raises:
        ExportError: a key is unexpected, or the cross-attention is of several kinds.
    """
    renamed = dict(weights) if "conv_in.weight" in weights else rename_keys(weights)
    if is_linear:
        renamed = {n: as_linear(w) if n.endswith(_PROJECTIONS) else w for n, w in renamed.items()}
    shapes = {name: weight.shape for name, weight in renamed.items()}
    return Part(config=_config(shapes, original, heads), weights=renamed)


def rename_keys(weights: Weights, more: Mapping[str, str] = MappingProxyType({})) -> dict[str, Weight]:
    """Rename keys to diffusers'; ``more`` maps prefixes of keys outside a U-Net's blocks.

    Raises:
        ExportError: a key is unexpected.
    """
    names = {**_block_names(weights), **more}
    renamed: dict[str, Weight] = {}
    for name, weight in weights.items():
        block = next((old for old in _block_prefixes(name) if old in names), None)
        if block is None:
            raise ExportError(f"unexpected key '{name}': not a Stable Diffusion U-Net")
        rest = name.removeprefix(block)
        inner = rest if "attentions" in names[block] else apply_renames(rest, _RESNET)
        renamed[names[block] + inner] = weight
    return renamed


def _block_prefixes(name: str) -> Iterable[str]:
    """Return the prefixes that may name a key's block: ``input_blocks.1.0.``, then ``input_blocks.1.``."""
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
"""Prefixes of keys outside the blocks."""


def _block_names(weights: Weights) -> dict[str, str]:
    """Map the prefix of each numbered block of the U-Net to diffusers'."""
    names = dict(_OUTSIDE)
    layers = {"resnets": 0, "attentions": 0}
    for slot in range(count(weights, r"middle_block\.(\d+)\.")):
        kind = _kind(weights, f"middle_block.{slot}.")
        names[f"middle_block.{slot}."] = f"mid_block.{kind}.{layers[kind]}."
        layers[kind] += 1
    for side, path, sampler in (("input", "down", "downsamplers"), ("output", "up", "upsamplers")):
        level = layer = 0
        for index in range(1 if side == "input" else 0, count(weights, rf"{side}_blocks\.(\d+)\.")):
            prefix, target, resizes = f"{side}_blocks.{index}.", f"{path}_blocks.{level}.", False
            for slot in ("0.", "1.", "2."):
                if f"{prefix}{slot}op.weight" in weights or f"{prefix}{slot}conv.weight" in weights:
                    names[prefix + slot], resizes = f"{target}{sampler}.0.", True
                else:
                    names[prefix + slot] = f"{target}{_kind(weights, prefix + slot)}.{layer}."
            level, layer = (level + 1, 0) if resizes else (level, layer + 1)
    return names


def _kind(weights: Weights, prefix: str) -> str:
    return "attentions" if f"{prefix}norm.weight" in weights else "resnets"


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
    """Infer the config of the down path and the mid block; ``up`` is the transformer layers of the up path, if any.

    Raises:
        ExportError: there is no cross-attention, or several kinds of it.
    """
    levels = range(count(shapes, r"down_blocks\.(\d+)\."))
    channels = [shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in levels]
    contexts = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    projections = {len(shape) for name, shape in shapes.items() if name.endswith("proj_in.weight")}
    if len(contexts) != 1 or len(projections) != 1:
        raise ExportError("the U-Net has no cross-attention to text, or several kinds of it; expected one kind")
    down = [_depths(shapes, f"down_blocks.{level}") for level in levels]
    return {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": _attention_head_dim(channels, original, heads),
        "block_out_channels": channels,
        "cross_attention_dim": contexts.pop(),
        "down_block_types": ["CrossAttnDownBlock2D" if depths else "DownBlock2D" for depths in down],
        "in_channels": shapes["conv_in.weight"][1],
        "layers_per_block": [count(shapes, rf"down_blocks\.{level}\.resnets\.(\d+)\.") for level in levels],
        "mid_block_type": _mid_block_type(shapes),
        **_transformer_layers(down, _depths(shapes, "mid_block"), up or [[]] * len(down)),
        "use_linear_projection": projections == {2},
    }


def _attention_head_dim(channels: list[int], original: Mapping[str, Any], heads: int | None) -> Any:
    """Return the numbers of heads, which is what diffusers means by ``attention_head_dim``."""
    width = original.get("num_head_channels", -1)
    if width <= 0 and original.get("num_heads", heads) is not None:
        return original.get("num_heads", heads)
    return [max(count // (width if width > 0 else 64), 1) for count in channels]


def _mid_block_type(shapes: Shapes) -> str | None:
    """Infer the mid block's type; distilled models leave out its attention, or the whole block (None)."""
    if "mid_block.resnets.0.conv1.weight" not in shapes:
        return None
    return "UNetMidBlock2DCrossAttn" if _depths(shapes, "mid_block") else "UNetMidBlock2D"


def _depths(shapes: Shapes, block: str) -> list[int]:
    """Count the transformer layers of each attention of a block."""
    return [
        count(shapes, rf"{block}\.attentions\.{layer}\.transformer_blocks\.(\d+)\.")
        for layer in range(count(shapes, rf"{block}\.attentions\.(\d+)\."))
    ]


def _transformer_layers(down: list[list[int]], mid: list[int], up: Sequence[list[int]]) -> dict[str, Any]:
    """Return the config's keys: for each level a number, or a list if its blocks differ.

    The up path is the down path reversed unless a second key differs. The lowest level's number is also the mid
    block's, and only that if the level has no attention.
    """
    layers = [_collapse(depths or [1]) for depths in (*down[:-1], down[-1] or mid)]
    config: dict[str, Any] = {"transformer_layers_per_block": layers}
    if any(depths and _collapse(depths) != depth for depths, depth in zip(up, layers[::-1], strict=True)):
        config["reverse_transformer_layers_per_block"] = [_collapse(depths or [1]) for depths in up]
    return config


def _collapse(depths: list[int]) -> int | list[int]:
    return depths[0] if len(set(depths)) == 1 else depths
