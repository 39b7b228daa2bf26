"""Read a CLIP image encoder: transformers' directory of a CLIPVisionModelWithProjection, or of a whole CLIP model."""

from pathlib import Path
from typing import Any

from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.files.json_file import load_json

from sdonnx_export.checkpoint_model import Part
from sdonnx_export.checkpoints.files import open_file
from sdonnx_export.hub import download

_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of transformers' weights, in order of preference."""

_USED = ("vision_model.", "visual_projection.")


def read_image_encoder(source: str) -> Part:
    """Read the image encoder in a directory, or in its folder ``image_encoder``; or that of a Hub id.

    Raises:
        ExportError: there is none, or it is damaged.
    """
    root = Path(source)
    if not root.exists():
        root = download(source, ("config.json", *_FILES, "image_encoder/*"), error=ExportError)
    root = root / "image_encoder" if (root / "image_encoder").is_dir() else root
    config = vision_config(root)
    path = next((root / name for name in _FILES if (root / name).is_file()), None)
    if path is None:
        raise ExportError(f"{root} has no weights ({' or '.join(_FILES)}); download the image encoder again")
    weights = {name: weight for name, weight in open_file(path).items() if name.startswith(_USED)}
    used = {name: weight for name, weight in weights.items() if not name.endswith("position_ids")}
    if "visual_projection.weight" not in used:
        raise ExportError(f"{path} is not a CLIP image encoder with its projection; give one")
    return Part(config=config, weights=used)


def vision_config(root: Path) -> dict[str, Any]:
    """Read the config of an image encoder's directory.

    Raises:
        ExportError: it is missing or damaged.
    """
    path = root / "config.json"
    try:
        config = load_json(path)
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise ExportError(f"{root} is not the directory of an image encoder: it has no readable config.json; give one")
    return config
