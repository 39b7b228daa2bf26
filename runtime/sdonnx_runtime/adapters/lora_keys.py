"""Tensor names in LoRA files: each trainer's spelling of components, layers and parameters."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PARAMETERS: Mapping[str, str] = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid",
    ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_B.bias": "up_bias",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".alpha": "alpha", ".scalar": "scalar", ".dora_scale": "norms",
    ".lora_magnitude_vector": "output_norms", ".lora_magnitude_vector.weight": "output_norms",
    **{f".bias_{name}": f"sparse_{name}" for name in ("indices", "values", "size")},
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ".oft_blocks": "oft_blocks", ".rescale": "rescale",
    **{f".{name}.weight": f"glora_{name}" for name in ("a1", "a2", "b1", "b2", "bm")},
    ".weight": "ia3_weight", ".on_input": "on_input", ".ia3_l": "ia3_l",
    ".diff": "difference", ".diff_b": "bias_difference", ".w_norm": "difference", ".b_norm": "bias_difference",
}  # fmt: skip
"""Suffixes of tensor names, and the parameter of each: kohya's, peft's, diffusers' and LyCORIS'."""

_COMPONENTS: Mapping[str, str] = {
    "lora_unet_": "unet", "oft_unet_": "unet", "unet.": "unet", "unet_": "unet", "diffusion_model.": "unet",
    "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder",
    "text_encoder.": "text_encoder", "text_encoder_1.": "text_encoder", "text_encoder_2.": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder", "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "clip_l.": "text_encoder", "clip_h.": "text_encoder", "clip_g.": "text_encoder_2",
}  # fmt: skip
"""Prefixes of names, and the component of each."""

_ADAPTER_NAME = re.compile(
    r"(\.(?:lora_(?:A|B|E|embedding_[AB]|magnitude_vector)|hada_\w+|lokr_\w+|ia3_l|oft_R))\.(?!(?:weight|bias)$)[\w-]+"
)
"""The name of an adapter in peft's own state dict, such as ``default``."""

_PEFT = (
    "adamss", "adaption_prompt", "beft", "boft", "bone", "c3a", "cartridge", "cpt", "deft", "delora", "fourierft",
    "frod", "glora", "gralora", "hira", "hra", "lily", "ln_tuning", "miss", "multitask_prompt_tuning", "oft", "osf",
    "p_tuning", "peanut", "poly", "prefix_tuning", "prompt_tuning", "psoft", "pvera", "randlora", "road", "shadow",
    "shira", "supertuning", "tinylora", "trainable_tokens", "unilora", "vblora", "vera", "waveft", "xlora",
)  # fmt: skip
"""Prefixes of peft's parameters of methods that aren't supported."""

_UNSUPPORTED: Mapping[str, str] = {
    r".*\.oft_diag$": "are OFT of LyCORIS 1",
    r".*\.(q_layer|p_layer)\.weight$|.*\.lambda_layer$": "are T-LoRA",
    r".*\.lora_E$|.*\.ranknum$": "are AdaLoRA",
    r".*\.lora_embedding_[AB]$": "are LoRA of an embedding",
    r".*\.(set_weight|reshape_weight)$": "replace a weight (ComfyUI)",
    r".*\.(scale_weight|weight_scale|scale_input|input_scale)$|scaled_fp8$": "are scales of fp8 weights",
    r".*\.modules_to_save\.|.*\.base_layer\.": "are weights of the model itself (peft)",
    r".*motion_modules": "are of AnimateDiff's motion modules",
    r"lllite_|lora_controlnet$|.*input_hint_block|.*zero_convs": "are of a ControlNet",
    r"lora_prior_|lora_te3_|lora_transformer_|transformer\.|.*(double|single|joint)_?(transformer_)?blocks": (
        "are for another family (Flux, Stable Diffusion 3, Stable Cascade, …)"
    ),
    rf".*\.({'|'.join(_PEFT)})_\w+": "are of an unsupported method of peft",
    r"bundle_emb\..*": "are an embedding of another family",
}
"""Names of tensors that aren't supported, and what they are."""


@dataclass(frozen=True, kw_only=True)
class TensorName:
    """The parts of a tensor's name."""

    component: str
    module: str
    """As `known_names` spells it."""
    layer: str
    """All of the name but the parameter."""
    parameter: str
    """A value of PARAMETERS."""


ORIGINAL_BLOCK = re.compile(r"input_blocks|middle_block|output_blocks")
"""What the original (LDM) names of U-Net layers have, as kohya's SDXL files have them."""

DIFFUSERS_BLOCK = re.compile(r"down_blocks|mid_block|up_blocks")


def precedence(layer: str) -> int:
    """The order in which names of one layer count, as in diffusers' loader: its own, kohya's, the original."""
    return 2 if ORIGINAL_BLOCK.search(layer) else int("." not in layer)


def parse_name(name: str) -> TensorName | None:
    """Parse a tensor's name; None if it isn't of a parameter in PARAMETERS."""
    plain = _ADAPTER_NAME.sub(r"\1", name)
    ends = [end for end in PARAMETERS if plain.endswith(end)]
    if not ends:
        return None
    end = max(ends, key=len)
    layer = plain.removesuffix(end)
    module = layer.removeprefix("base_model.model.").removeprefix("lycoris_").replace(".processor.", ".")
    start = next((start for start in _COMPONENTS if module.startswith(start)), "")
    component = _COMPONENTS.get(start, "text_encoder" if module.startswith("text_model") else "unet")
    module = module.removeprefix(start).replace(".", "_")
    return TensorName(component=component, module=module, layer=layer, parameter=PARAMETERS[end])


def describe_unsupported(name: str) -> str | None:
    """Say what an unsupported tensor is; None if its name is none that is known."""
    return next((title for pattern, title in _UNSUPPORTED.items() if re.match(pattern, name)), None)


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
        if match is not None and match[0] in blocks:  # of a damaged graph, blocks are missing
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
    "norm1": "in_layers.0", "norm2": "out_layers.0", "conv1": "in_layers.2", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip

_OUTSIDE: Mapping[str, str] = {
    "conv_in": "input_blocks_0_0", "conv_norm_out": "out_0", "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0", "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2",
}  # fmt: skip
