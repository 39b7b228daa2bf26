"""Open a file's tensors as lazy weights, and know which of its keys count and under which names."""

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
    """Open all tensors of a ``.safetensors`` or, through torch, a pickled file.

    The file is opened again for each tensor: a memory map that stays open keeps gigabytes resident.

    Raises:
        ExportError: the file is damaged or of another kind.
    """
    if path.suffix != ".safetensors":
        return _open_pickled(path)
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 — not a dict
            headers = {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path} is damaged or not a safetensors file ({error}); download it again") from None

    def reader(name: str) -> Callable[[], AnyArray]:
        def read() -> AnyArray:
            with safe_open(path, "np") as file:
                return _widen_bfloat16(file.get_tensor(name))

        return read

    return {name: Weight(shape=shape, dtype=dtype, read=reader(name)) for name, (shape, dtype) in headers.items()}


def _open_pickled(path: Path) -> dict[str, Weight]:
    if path.suffix not in (".ckpt", ".bin", ".pt", ".pth"):
        raise ExportError(f"{path} is not a checkpoint: expected a directory, a .safetensors or a .ckpt file")
    return {
        name: Weight(shape=shape, dtype=dtype, read=read) for name, (shape, dtype, read) in load_pickled(path).items()
    }


def _widen_bfloat16(data: AnyArray) -> AnyArray:
    """Convert what numpy has no type for, bfloat16, to float32, which has all its values."""
    return data if data.dtype.kind in "iub" or data.dtype in (np.float16, np.float32) else data.astype(np.float32)


def is_used_key(name: str, part: str) -> bool:
    """Whether a key of a part is a weight that its graphs use.

    Old transformers stored position ids among the weights, and whole CLIP models have more components. Only
    ``text_encoder_2`` uses the text projection.
    """
    unused = _UNUSED_CLIP if part == "text_encoder_2" else (*_UNUSED_CLIP, "text_projection.")
    return not name.endswith("position_ids") and not name.startswith(unused)


_UNUSED_CLIP = ("logit_scale", "vision_model.", "visual_projection.")


def canonical_key(name: str) -> str:
    """Return a key's name in today's diffusers and transformers."""
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
"""Pattern of an old key, and its replacement."""
