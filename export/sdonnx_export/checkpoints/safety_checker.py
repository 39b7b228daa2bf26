"""Read the safety checker that a pipeline in diffusers' layout has."""

from dataclasses import replace
from pathlib import Path

from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.packages.manifest import read_json
from sdonnx_runtime.safety.checkers import SAFETY_CHECKER

from sdonnx_export.checkpoint_model import Checkpoint, Part
from sdonnx_export.checkpoints.files import open_file
from sdonnx_export.hub import download

_FILES = ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "pytorch_model.fp16.bin")
"""Names of its weights, in order of preference."""


def add_safety_checker(checkpoint: Checkpoint, source: str, revision: str | None) -> Checkpoint:
    """Return a checkpoint with the safety checker of its source, a directory or a Hub id.

    Raises:
        ExportError: the source generates no images, has no safety checker, or has a damaged one.
    """
    if "unet" not in checkpoint.parts:
        raise ExportError(f"{source} generates no images, so that --safety-checker is of no use; leave it out")
    if SAFETY_CHECKER in checkpoint.parts:  # of a package
        return checkpoint
    root = Path(source)
    if not root.exists():
        wanted = tuple(f"{SAFETY_CHECKER}/{name}" for name in ("config.json", *_FILES))
        root = download(source, wanted, revision=revision, error=ExportError)
    folder = root / SAFETY_CHECKER
    weights = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if weights is None or not (folder / "config.json").is_file():
        raise ExportError(
            f"{source} has no {SAFETY_CHECKER}/ with a config.json and {_FILES[0]}; leave out --safety-checker, "
            "or give the checkpoint as the directory that diffusers reads"
        )
    own = {name: weight for name, weight in open_file(weights).items() if not name.endswith("position_ids")}
    part = Part(config=read_json(folder / "config.json"), weights=own)
    return replace(checkpoint, parts={**checkpoint.parts, SAFETY_CHECKER: part})
