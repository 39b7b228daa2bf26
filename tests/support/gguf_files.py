"""GGUF files as their programs write them, of tensors that the gguf package quantizes."""

import re

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""What can be exported."""

_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where a block has its scale and its minimum, which gguf can't quantize to."""


def quantize(values, kind):
    """The bytes of float32 values; of the K types, blocks at random of small values."""
    number = GGMLQuantizationType[kind]
    if kind not in _SCALES:
        return gguf.quants.quantize(values, number)
    elements, size = GGML_QUANT_SIZES[number]
    blocks = np.random.default_rng(values.size).integers(0, 256, (values.size // elements, size), np.uint8)
    for place in _SCALES[kind]:
        blocks[:, place : place + 2] = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


def dequantize(raw, kind):
    """What the gguf package reads."""
    return gguf.quants.dequantize(raw, GGMLQuantizationType[kind])


def write(path, tensors, *, architecture=None, original_shapes=None, **options):
    """Write tensors, by name their bytes (or values) and type; as stable-diffusion.cpp without an architecture."""
    writer = gguf.GGUFWriter(path, architecture or "", **options)
    if architecture is None:
        writer.kv_data[0].clear()
    for name, shape in (original_shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
    for name, (raw, kind) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_unet(path, weights, architecture="sd1"):
    """Write a U-Net alone as ComfyUI-GGUF does, its matrices in all types; return what the gguf package reads of it."""
    tensors, shapes, expected = {}, {}, {}
    for index, (name, values) in enumerate(weights.items()):
        stored, kind = values, "F32"
        if values.ndim > 1 and values.size >= 512 and values.size % 256 == 0:
            kind = TYPES[index % len(TYPES)]
            if values.shape[-1] % 256:
                stored, shapes[name] = values.reshape(-1, 256), values.shape
        tensors[name] = quantize(stored, kind), kind
        expected[name] = dequantize(tensors[name][0], kind).reshape(values.shape)
    write(path, tensors, architecture=architecture, original_shapes=shapes)
    return expected


def sd_cpp_names(weights):
    """A whole file's weights as stable-diffusion.cpp converted them until 2025: text encoders have transformers' names.

    Queries, keys and values are apart; linear projections of the U-Net and the VAE are 1x1 convolutions.
    """
    renamed = {}
    for name, values in weights.items():
        name = re.sub(r"^conditioner\.embedders\.(\d)\.", lambda match: ("", "1.")[int(match[1])] + "$", name)
        name = name.replace("1.$", "cond_stage_model.1.").replace("$", "cond_stage_model.")
        for pattern, new in _OPEN_CLIP:
            name = re.sub(pattern, new, name)
        if re.search(r"(proj_in|proj_out|attn_1\.[qkv])\.weight$", name):
            values = values.reshape(*values.shape[:2], 1, 1)
        if re.search(r"attn\.in_proj_", name):
            for which, third in zip("qkv", np.split(values, 3), strict=True):
                renamed[name.replace("attn.in_proj_", f"self_attn.{which}_proj.")] = third
        elif not name.endswith(("logit_scale", "attn_mask", "betas")) and not name.startswith("model_ema."):
            renamed[name] = values
    return renamed


_STAGE, _TEXT = r"^(cond_stage_model\.(?:1\.)?)model\.", r"\1transformer.text_model."
_OPEN_CLIP = (
    (_STAGE + r"ln_final\.", _TEXT + "final_layer_norm."),
    (_STAGE + "positional_embedding", _TEXT + "embeddings.position_embedding.weight"),
    (_STAGE + r"token_embedding\.", _TEXT + "embeddings.token_embedding."),
    (_STAGE + "text_projection", _TEXT + "text_projection"),
    (_STAGE + r"transformer\.resblocks\.(\d+)\.attn\.out_proj", _TEXT + r"encoder.layers.\2.self_attn.out_proj"),
    (_STAGE + r"transformer\.resblocks\.(\d+)\.ln_", _TEXT + r"encoder.layers.\2.layer_norm"),
    (_STAGE + r"transformer\.resblocks\.(\d+)\.mlp\.c_fc", _TEXT + r"encoder.layers.\2.mlp.fc1"),
    (_STAGE + r"transformer\.resblocks\.(\d+)\.mlp\.c_proj", _TEXT + r"encoder.layers.\2.mlp.fc2"),
    (_STAGE + r"transformer\.resblocks\.", _TEXT + "encoder.layers."),
)

BIG_ENDIAN = GGUFEndian.BIG
