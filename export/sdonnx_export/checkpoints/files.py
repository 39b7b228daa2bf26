"""The form that every checkpoint is read into: parts with configs and lazy weights, and the files they are read of."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import ExportError

from sdonnx_export.checkpoint_model import Weight
from sdonnx_export.torch_bridge import load_pickled


def open_file(path: Path) -> dict[str, Weight]:
    """All tensors of a ``.safetensors`` or, through torch, a pickled file.

    The file is opened anew for each tensor: a map kept open would keep gigabytes of it resident.

    Raises:
        ExportError: it is damaged or of another kind.
    """
    if path.suffix != ".safetensors":
        return _open_pickled(path)
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 — it is no dict
            found = {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path} is damaged or no safetensors file ({error}); download it again") from None

    def reader(name: str) -> Callable[[], AnyArray]:
        def read() -> AnyArray:
            with safe_open(path, "np") as file:
                return _plain(file.get_tensor(name))

        return read

    return {name: Weight(shape=shape, dtype=dtype, read=reader(name)) for name, (shape, dtype) in found.items()}


def _open_pickled(path: Path) -> dict[str, Weight]:
    if path.suffix not in (".ckpt", ".bin", ".pt", ".pth"):
        raise ExportError(f"{path} is no checkpoint: expected a directory, a .safetensors or a .ckpt file")
    return {
        name: Weight(shape=shape, dtype=dtype, read=read) for name, (shape, dtype, read) in load_pickled(path).items()
    }


def _plain(data: AnyArray) -> AnyArray:
    """Numpy knows no bfloat16 of its own; float32 holds all its values."""
    return data if data.dtype.kind in "iub" or data.dtype in (np.float16, np.float32) else data.astype(np.float32)


def is_used_key(name: str, part: str) -> bool:
    """Whether a weight is one; old transformers wrote positions among them, and whole CLIP models have more parts.

    Of the text's projection only ``text_encoder_2`` is read.
    """
    rest = _CLIP_REST if part == "text_encoder_2" else (*_CLIP_REST, "text_projection.")
    return not name.endswith("position_ids") and not name.startswith(rest)


_CLIP_REST = ("logit_scale", "vision_model.", "visual_projection.")


def canonical_key(name: str) -> str:
    """A weight's name in today's diffusers and transformers."""
    for old, new in _RENAMED.items():
        name = re.sub(old, new, name)
    return name


_RENAMED = {
    r"(mid_block\.attentions\.\d+)\.query\.": r"\1.to_q.",
    r"(mid_block\.attentions\.\d+)\.key\.": r"\1.to_k.",
    r"(mid_block\.attentions\.\d+)\.value\.": r"\1.to_v.",
    r"(mid_block\.attentions\.\d+)\.proj_attn\.": r"\1.to_out.0.",
    r"^(embeddings\.|encoder\.layers\.\d+\.(?:self_attn|mlp|layer_norm)|final_layer_norm\.)": r"text_model.\1",
}
