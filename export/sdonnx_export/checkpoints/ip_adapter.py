"""Read an IP-Adapter (arXiv:2308.06721) from a published file, with the image encoder that it was trained with."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdonnx_runtime.errors import ExportError

from sdonnx_export.checkpoint_model import Part
from sdonnx_export.checkpoints.image_encoder import read_image_encoder, vision_config
from sdonnx_export.checkpoints.ldm.keys import Weights, count, with_prefix
from sdonnx_export.models.clip_vision import ClipVisionConfig
from sdonnx_export.models.ip_adapter import HEAD_SIZE

_PROJECTION, _LAYERS = "image_proj.", "ip_adapter."

_BESIDE = ("image_encoder", "../models/image_encoder", "../sdxl_models/image_encoder")
"""Where h94/IP-Adapter has image encoders, as seen from an adapter's folder."""

_SIGNS = {
    r"ip_adapter\.\d+\.to_[qkv]_lora\.|image_proj\.(perceiver_resampler\.|proj\.2\.)": (
        "of faces (FaceID, or the full-face one), whose input is not CLIP's image embedding alone"
    ),
    r"ip_adapter\.\d+\.(processor|double_blocks|single_blocks)\.|image_proj\.(time_|layers\.\d+\.0\.norm_)": (
        "of Flux or Stable Diffusion 3"
    ),
}
"""Pattern of keys of IP-Adapters that can't be exported, and what they are."""


def is_ip_adapter(weights: Weights) -> bool:
    """Whether a file is an IP-Adapter, of any kind."""
    return any(name.startswith(_LAYERS) for name in weights) and any(name.startswith(_PROJECTION) for name in weights)


def read_ip_adapter(path: Path, weights: Weights, image_encoder: str | None) -> dict[str, Part]:
    """Return the parts ``image_encoder`` and ``ip_adapter``.

    Args:
        path: the adapter's file, beside which an image encoder may be.
        weights: the file's.
        image_encoder: the directory or Hub id of the image encoder, as `read_image_encoder` takes it; None looks for
            it beside the file.

    Raises:
        ExportError: the adapter is of an unsupported kind or lacks a weight, there is no image encoder, or it is not
            the one that the adapter was trained with.
    """
    for sign, what in _SIGNS.items():
        if any(re.match(sign, name) for name in weights):
            raise ExportError(
                f"{path} is an IP-Adapter {what}; give a plain or a Plus one for Stable Diffusion 1.5 or XL"
            )
    own = {name: weight for name, weight in weights.items() if name.startswith((_PROJECTION, _LAYERS))}
    try:
        config = _config(own)
    except (ArithmeticError, LookupError, ValueError) as error:
        raise ExportError(
            f"{path} looks like an IP-Adapter, but its weights are not those of a plain or a Plus one "
            f"({_reason(error)}); download it again"
        ) from None
    encoder = _find_encoder(path, config) if image_encoder is None else read_image_encoder(image_encoder)
    state = _image_state(path, config, ClipVisionConfig.from_dict(encoder.config))
    return {"image_encoder": encoder, "ip_adapter": Part(config={**config, "image_state": state}, weights=own)}


def _reason(error: Exception) -> str:
    return f"there is no {error}" if isinstance(error, KeyError) else str(error)


def _config(weights: Weights) -> dict[str, Any]:
    """Infer the config of an IP-Adapter from its weights; what is raised says that it is none."""
    shapes = {name: weight.shape for name, weight in weights.items()}
    projection = with_prefix(weights, _PROJECTION)
    if "proj.weight" in projection:
        width = shapes["image_proj.norm.weight"][0]
        rows, image_width = shapes["image_proj.proj.weight"]
        own: dict[str, Any] = {"image_projection": "linear", "num_tokens": rows // width}
    else:
        hidden, image_width = shapes["image_proj.proj_in.weight"]
        width = shapes["image_proj.proj_out.weight"][0]
        heads = shapes["image_proj.layers.0.0.to_q.weight"][0] // HEAD_SIZE
        own = {
            "image_projection": "resampler",
            "num_tokens": shapes["image_proj.latents"][1],
            "hidden_size": hidden,
            "intermediate_size": shapes["image_proj.layers.0.1.1.weight"][0],
            "num_hidden_layers": count(projection, r"layers\.(\d+)\."),
            "num_attention_heads": heads,
        }
    numbers = sorted({int(name.split(".")[1]) for name in weights if re.match(r"ip_adapter\.\d+\.", name)})
    if numbers != list(range(1, 2 * len(numbers), 2)):
        raise ValueError(f"its layers have the numbers {', '.join(map(str, numbers[:5]))}, not 1, 3, 5 and so on")
    widths = [shapes[f"ip_adapter.{number}.to_k_ip.weight"][0] for number in numbers]
    base = {"_class_name": "IPAdapter", "image_width": image_width, "cross_attention_dim": width}
    return {**base, **own, "layer_widths": widths}


def _state_width(config: dict[str, Any], encoder: ClipVisionConfig) -> int:
    """The width of what an image encoder has for an adapter of this kind."""
    return encoder.projection_dim if config["image_projection"] == "linear" else encoder.hidden_size


def _image_state(path: Path, config: dict[str, Any], encoder: ClipVisionConfig) -> str:
    """Return the output of the image encoder that an adapter reads: a Plus reads the last but one hidden state."""
    found, expected = _state_width(config, encoder), config["image_width"]
    if found != expected:
        raise ExportError(
            f"{path} reads an image embedding of width {expected}, the image encoder has {found}; give the one that "
            "it was trained with, with --image-encoder SRC"
        )
    linear = config["image_projection"] == "linear"
    return "image_embeds" if linear else f"hidden_states.{encoder.num_hidden_layers - 1}"


def _find_encoder(path: Path, config: dict[str, Any]) -> Part:
    """Find the image encoder beside an adapter's file."""
    folders = [(path.parent / each).resolve() for each in _BESIDE]
    present = [folder for folder in dict.fromkeys(folders) if (folder / "config.json").is_file()]
    for folder in present:
        if _state_width(config, ClipVisionConfig.from_dict(vision_config(folder))) == config["image_width"]:
            return read_image_encoder(str(folder))
    raise ExportError(f"{path} needs its image encoder{_others(present)}; give its directory with --image-encoder SRC")


def _others(folders: Sequence[Path]) -> str:
    return "" if not folders else f", which {' and '.join(map(str, folders))} is not"
