"""Fuzzed parsers of checkpoints: the configs of a diffusers directory, single files' keys, original configs."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml
from sdonnx_export.checkpoint_model import Weight
from sdonnx_export.checkpoints.companions import ALONE, Companions, complete
from sdonnx_export.checkpoints.ldm.checkpoint import split_checkpoint
from sdonnx_export.checkpoints.ldm.file_settings import SingleFile, read_original_config
from sdonnx_export.checkpoints.open import open_checkpoint
from sdonnx_export.checkpoints.text_encoders import text_encoders_of_file
from sdonnx_export.checkpoints.upscaler import read_upscaler
from sdonnx_export.models.components import COMPONENTS, components_in
from sdonnx_export.operators.layouts import sizes

from support import families, ldm
from support.fuzz.campaign import Target
from support.fuzz.mutators import mutate_files, mutate_json, mutate_text, pack_files, unpack_files
from support.paths import ROOT

_CHECKPOINT = ROOT / "models" / "pictogram" / "checkpoint"


def directory(folder: Path) -> Target:
    """The configs of a diffusers directory, up to the modules of its components."""
    configs = [path.relative_to(_CHECKPOINT).as_posix() for path in _CHECKPOINT.rglob("*config.json")]
    names = ["model_index.json", *(name for name in configs if not name.startswith("tokenizer"))]
    for path in _CHECKPOINT.rglob("*"):
        place = folder / path.relative_to(_CHECKPOINT)
        if path.is_dir():
            place.mkdir()
        elif path.relative_to(_CHECKPOINT).as_posix() not in names:
            place.symlink_to(path)
    files = {name: (_CHECKPOINT / name).read_bytes() for name in names}
    known = {part: json.loads(files[f"{part}/config.json"]) for part in ("unet", "vae", "text_encoder")}

    def read(data: bytes) -> None:
        for name, content in unpack_files(data).items():
            (folder / name).write_bytes(content)
        checkpoint = open_checkpoint(str(folder))
        for name, spec in components_in(checkpoint).items():
            config = checkpoint.parts[spec.part].config
            if config != known[spec.part]:
                COMPONENTS[name].module(config)

    return Target(seeds=[pack_files(files)], mutate=mutate_files({".json": mutate_json}), read=read)


def single_file(folder: Path) -> Target:
    """The keys and shapes of single files, up to the modules of their components."""
    pipelines = (families.sd1(), families.sd2(), families.sdxl())
    states = [{name: [*value.shape] for name, value in ldm.ldm_state(pipe).items()} for pipe in pipelines]
    states += [_upscaler_state(config) for config in _UPSCALERS]

    def read(data: bytes) -> None:
        try:
            shapes = json.loads(data)
        except (ValueError, RecursionError):
            return
        if isinstance(shapes, dict):
            _use(folder / "model.safetensors", {name: tuple(s) for name, s in shapes.items() if _is_shape(s)})

    return Target(seeds=[json.dumps(state).encode() for state in states], mutate=mutate_json, read=read)


_UPSCALERS = (
    {"_class_name": "RRDBNet", "num_block": 1, "scale": 2, "multiple": 2},
    {"_class_name": "SRVGGNetCompact", "num_conv": 2, "scale": 4, "act_type": "prelu"},
)


def _upscaler_state(config: Mapping[str, object]) -> dict[str, list[int]]:
    module, _ = COMPONENTS["upscaler"].module(config)
    return {name: [*sizes(parameter)] for name, parameter in module.named_parameters()}


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 40 for size in value)


def _use(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    def zero() -> np.ndarray:
        return np.zeros(1, np.float32)

    weights = {name: Weight(shape=shape, dtype="F32", read=zero) for name, shape in shapes.items()}
    if read_upscaler(path, weights) is not None:
        return
    file = SingleFile(path=path, weights=weights, original=read_original_config(path))
    checkpoint = complete(split_checkpoint(file), ALONE, path.name)
    given = Companions(text_encoders=text_encoders_of_file(path.name, weights))
    complete(split_checkpoint(file, given), given, path.name)
    for name, spec in components_in(checkpoint).items():
        COMPONENTS[name].module(checkpoint.parts[spec.part].config)


def original_config(folder: Path) -> Target:
    """``model.yaml`` beside a single file."""
    pipe = families.sd1()
    shapes = {name: tuple(value.shape) for name, value in ldm.ldm_state(pipe).items()}
    text = yaml.safe_dump({"model": {"params": ldm.original_config(pipe)}})

    def read(data: bytes) -> None:
        (folder / "model.yaml").write_bytes(data)
        _use(folder / "model.safetensors", shapes)

    words = (
        ":",
        "- ",
        "\n",
        "  ",
        "&a ",
        "*a",
        "[",
        "]",
        "{",
        "}",
        "!!python/object:os.system ",
        "null",
        "1e9",
        "-1",
        "'",
    )
    return Target(seeds=[text.encode()], mutate=mutate_text(words), read=read)
