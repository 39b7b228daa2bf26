"""Read the VAE of the original single-file layout, or of a file of its own, under diffusers' keys."""

import re

from sdonnx_export.checkpoint_model import Part, Weight
from sdonnx_export.checkpoints.files import canonical_key
from sdonnx_export.checkpoints.ldm.keys import Weights, apply_renames, as_linear, count


def read_vae(weights: Weights, scaling_factor: float | None) -> Part:
    """Read a VAE with LDM's keys or diffusers'; if ``scaling_factor`` is None, its config has none."""
    levels = count(weights, r"encoder\.down\.(\d+)\.") or count(weights, r"encoder\.down_blocks\.(\d+)\.")
    renamed: dict[str, Weight] = {}
    for name, weight in weights.items():
        name = re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}", name)
        name = canonical_key(apply_renames(name, _NAMES))
        renamed[name] = as_linear(weight) if re.search(r"attentions\.0\.to_.*weight", name) else weight
    shapes = {name: weight.shape for name, weight in renamed.items()}
    config = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "layers_per_block": count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
    }
    if scaling_factor is not None:
        config["scaling_factor"] = scaling_factor
    return Part(config=config, weights=renamed)


_NAMES = (
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
)
