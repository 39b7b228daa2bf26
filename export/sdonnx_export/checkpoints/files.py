"""Open a file's tensors as lazy weights, and know which of its keys count and under which names."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import ExportError, RequestError
from sdonnx_runtime.files.tensor_file import TensorFile
from sdonnx_runtime.files.tensors import open_tensors

from sdonnx_export.checkpoint_model import Weight
from sdonnx_export.checkpoints.gguf.reader import is_gguf, open_gguf
from sdonnx_export.checkpoints.scaled_weights import apply_scales


def open_file(path: Path) -> dict[str, Weight]:
    """Open all tensors of a ``.safetensors`` file, of torch's ``.ckpt``, ``.pt`` or ``.bin``, or of a GGUF file.

    Each is read from the file on demand. ``global_step`` of a checkpoint of PyTorch Lightning is a weight, too.

    Raises:
        ExportError: the file is damaged, hostile or of another kind.
    """
    file = _open(path)
    weights = {
        name: Weight(shape=shape, dtype=file.dtypes[name], read=_reader(file, name))
        for name, shape in file.shapes.items()
    }
    step = file.metadata.get("global_step", "")
    if step.isdecimal() and "global_step" not in weights:
        weights["global_step"] = Weight(shape=(), dtype="I64", read=lambda: np.array(int(step)))
    return apply_scales(path, weights)


def read_metadata(path: Path) -> Mapping[str, str]:
    """Read the ``__metadata__`` of a file that `open_file` opens, or what others have besides their tensors."""
    return _open(path).metadata


def _open(path: Path) -> TensorFile:
    if is_gguf(path):
        return open_gguf(path)
    try:
        return open_tensors(path)
    except RequestError as error:
        raise ExportError(str(error)) from None


def _reader(file: TensorFile, name: str) -> Callable[[], AnyArray]:
    def read() -> AnyArray:
        try:
            return file.load(name)
        except RequestError as error:
            raise ExportError(str(error)) from None

    return read


def is_used_key(name: str, part: str) -> bool:
    """Whether a key of a part is a weight that its graphs use.

    Old transformers stored position ids among the weights, and whole CLIP models have more components. Only
    ``text_encoder_2`` uses the text projection.
    """
    unused = _UNUSED_CLIP if part == "text_encoder_2" else (*_UNUSED_CLIP, "text_projection")
    return not name.endswith("position_ids") and not name.startswith(unused)


_UNUSED_CLIP = ("logit_scale", "logit_bias", "vision_model.", "visual_projection.", "visual.")


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
    r"^clip\.text_model\.": "text_model.",
    r"^text_model\.text_projection$": "text_projection",
    r"^(embeddings\.|encoder\.layers\.\d+\.(?:self_attn|mlp|layer_norm)|final_layer_norm\.)": r"text_model.\1",
}
"""Pattern of an old key, and its replacement."""
