"""Tensor names in LoRA files: each trainer's spelling of components, layers and parameters."""

import re
from collections.abc import Iterable, Mapping

PARAMETERS: Mapping[str, str] = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid",
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".alpha": "alpha", ".dora_scale": "norms",
    ".lora_magnitude_vector": "output_norms", ".lora_magnitude_vector.weight": "output_norms",
    ".lora_magnitude_vector.default": "output_norms", ".lora_magnitude_vector.default.weight": "output_norms",
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ".diff": "difference",
}  # fmt: skip
"""Suffixes of tensor names, and the parameter of each: kohya's, peft's, diffusers' and LyCORIS'."""

_COMPONENTS: Mapping[str, str] = {
    "lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder",
    "unet.": "unet", "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2",
}  # fmt: skip
"""Prefixes of names, and the component of each."""


def split_name(name: str) -> tuple[str, str] | None:
    """Split a tensor's name into layer and one of PARAMETERS' values; None if it is of no parameter."""
    for end in sorted(PARAMETERS, key=len, reverse=True):
        if name.endswith(end):
            return name.removesuffix(end), PARAMETERS[end]
    return None


def split_component(module: str) -> tuple[str, str]:
    """Split a layer's name into component and module, as `known_names` spells it."""
    module = module.removeprefix("base_model.model.").replace(".processor.", ".")
    for start, component in _COMPONENTS.items():
        if module.startswith(start):
            return component, module.removeprefix(start).replace(".", "_")
    component = "text_encoder" if module.startswith("text_model") else "unet"
    return component, module.removeprefix("lycoris_").replace(".", "_")


def known_names(modules: Iterable[str]) -> dict[str, str]:
    """Map every spelling of a component's modules to the module, such as ``mid_block.attentions.0.proj_in``."""
    names = list(modules)
    found = {name.replace(".", "_"): name for name in names}
    found |= {original: name for name, original in _original_names(names).items()}
    short = {name: re.sub(r"^text_model_", "", name) for name in found}
    found |= {short[name]: found[name] for name in short}
    found |= {name.removesuffix("_0"): found[name] for name in list(found) if name.endswith("_to_out_0")}
    for old, new in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
        found |= {name.replace(f"self_attn_{old}", f"self_attn_{new}"): found[name] for name in list(found)}
    return found


def _original_names(modules: list[str]) -> dict[str, str]:
    """Map the U-Net's modules to the original (LDM) names, with underscores; kohya's SDXL files have them."""
    blocks = _original_blocks(modules)
    found: dict[str, str] = {}
    for name in modules:
        match = _BLOCK.match(name)
        if match is not None:
            inner = name[match.end() + 1 :]
            inner = "op" if ".downsamplers." in match[0] else _INNER.get(inner, inner)
            found[name] = f"{blocks[match[0]]}_{inner.replace('.', '_')}"
        elif name in _OUTSIDE:
            found[name] = _OUTSIDE[name]
    return found


def _original_blocks(modules: list[str]) -> dict[str, str]:
    """Map blocks to original names: ``down_blocks.0.resnets.0`` is ``input_blocks_1_0``, and so on."""
    blocks = {match[0] for name in modules if (match := _BLOCK.match(name))}
    found: dict[str, str] = {"mid_block.resnets.0": "middle_block_0", "mid_block.attentions.0": "middle_block_1"}
    found["mid_block.resnets.1"] = "middle_block_2" if "mid_block.attentions.0" in blocks else "middle_block_1"
    for side, original, index, sampler in (("down", "input", 1, "downsamplers"), ("up", "output", 0, "upsamplers")):
        level: int = 0
        while f"{side}_blocks.{level}.resnets.0" in blocks:
            layer, block = 0, f"{side}_blocks.{level}"
            while f"{block}.resnets.{layer}" in blocks:
                found[f"{block}.resnets.{layer}"] = f"{original}_blocks_{index}_0"
                found[f"{block}.attentions.{layer}"] = f"{original}_blocks_{index}_1"
                layer, index = layer + 1, index + 1
            if side == "up":
                attends = f"{block}.attentions.0" in blocks
                found[f"{block}.{sampler}.0"] = f"{original}_blocks_{index - 1}_{2 if attends else 1}"
            elif f"{block}.{sampler}.0" in blocks:
                found[f"{block}.{sampler}.0"] = f"{original}_blocks_{index}_0"
                index += 1
            level += 1
    return found


_BLOCK = re.compile(r"(?:(?:down|up)_blocks\.\d+|mid_block)\.(?:resnets|attentions|downsamplers|upsamplers)\.\d+")

_INNER: Mapping[str, str] = {
    "conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}  # fmt: skip

_OUTSIDE: Mapping[str, str] = {
    "conv_in": "input_blocks_0_0", "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0", "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2",
}  # fmt: skip
