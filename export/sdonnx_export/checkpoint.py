"""Checkpoints in every layout they are published in, read into one form: parts with configs and lazy weights."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import ExportError


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor of a checkpoint, read when it is asked for."""

    shape: tuple[int, ...]
    dtype: str
    """F32, F16, BF16, …: how the file stores it."""
    read: Callable[[], AnyArray]
    """Gives it as float32 or float16 (bfloat16 is widened), or whole numbers as stored."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One component of a checkpoint."""

    config: Mapping[str, Any]
    """diffusers' or transformers' config.json."""
    weights: Mapping[str, Weight]
    """By diffusers' (transformers') state-dict keys."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint."""

    source: str
    """Hub id, or the name (without the path) of a file or directory."""
    revision: str | None
    parts: Mapping[str, Part]
    """``text_encoder``, ``unet`` and ``vae``."""
    scheduler: Mapping[str, Any]
    """scheduler_config.json as published."""
    tokenizer: Path | None
    """Directory with the tokenizer's files; None stands for CLIP's own."""


PARTS = {
    "text_encoder": ("model", "pytorch_model"),
    "unet": ("diffusion_pytorch_model",) * 2,
    "vae": ("diffusion_pytorch_model",) * 2,
}
"""Each part's directory, and how its safetensors and its pickled files are called."""

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_SMALL = ("model_index.json", "config.json", "*/config.json", "scheduler/*.json", "tokenizer/*")
_HUB_WEIGHTS = (
    (
        "*/model.safetensors",
        "*/diffusion_pytorch_model.safetensors",
        "*.safetensors.index.json",
        "*-of-*.safetensors",
    ),
    ("*/*.fp16.safetensors", "*.safetensors.index.fp16.json"),
    ("*/*.safetensors",),
    ("*/pytorch_model.bin", "*/diffusion_pytorch_model.bin"),
)
"""What is fetched of a repository: the first of these that it has."""


def open_checkpoint(source: str, *, revision: str | None = None) -> Checkpoint:
    """Opens a diffusers directory, a Hub id, or one file in the original LDM layout.

    Raises:
        ExportError: there is none, it is damaged, or it is not of a family that can be exported.
    """
    from sdonnx_export.ldm import split_checkpoint

    path = Path(source)
    if path.is_file():
        return split_checkpoint(path, open_file(path))
    if path.is_dir():
        return _from_directory(path, path.resolve().name, None)
    return _from_directory(_from_hub(source, revision, tuple(PARTS)), source, revision)


def open_vae(source: str) -> Part:
    """Opens a VAE: its diffusers directory, a pipeline's, a Hub id of either, or a file in LDM layout.

    Raises:
        ExportError: as `open_checkpoint`.
    """
    from sdonnx_export.ldm import split_vae

    path = Path(source)
    if path.is_file():
        return split_vae(path, open_file(path))
    root = path if path.is_dir() else _from_hub(source, None, ("vae", "."))
    return _part(root / "vae" if (root / "vae").is_dir() else root, "vae")


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
    from sdonnx_export.torch_bridge import load_pickled

    if path.suffix not in (".ckpt", ".bin", ".pt", ".pth"):
        raise ExportError(f"{path} is no checkpoint: expected a directory, a .safetensors or a .ckpt file")
    return {
        name: Weight(shape=shape, dtype=dtype, read=read) for name, (shape, dtype, read) in load_pickled(path).items()
    }


def _plain(data: AnyArray) -> AnyArray:
    """Numpy knows no bfloat16 of its own; float32 holds all its values."""
    return data if data.dtype.kind in "iub" or data.dtype in (np.float16, np.float32) else data.astype(np.float32)


def _from_directory(root: Path, name: str, revision: str | None) -> Checkpoint:
    index = _json(root / "model_index.json", "expected a diffusers directory, a Hub id or a single file")
    pipeline = index.get("_class_name")
    if pipeline not in _PIPELINES:
        raise ExportError(f"{name} holds a {pipeline}; what can be exported is {', '.join(_PIPELINES)}")
    tokenizer = root / "tokenizer"
    if not tokenizer.is_dir():
        raise ExportError(f"{tokenizer} is missing; download the checkpoint again")
    return Checkpoint(
        source=name,
        revision=revision,
        parts={part: _part(root / part, part) for part in PARTS},
        scheduler=_json(root / "scheduler" / "scheduler_config.json", "download the checkpoint again"),
        tokenizer=tokenizer,
    )


def _part(directory: Path, part: str) -> Part:
    config = _json(directory / "config.json", "download the checkpoint again")
    weights: dict[str, Weight] = {}
    for path in weight_files(directory, part):
        weights.update(open_file(path))
    return Part(config=config, weights={current_name(name): weight for name, weight in _wanted(weights)})


def _wanted(weights: Mapping[str, Weight]) -> Iterable[tuple[str, Weight]]:
    """Without the positions that old versions of transformers wrote among the weights."""
    return ((name, weight) for name, weight in weights.items() if not name.endswith("position_ids"))


def current_name(name: str) -> str:
    """A weight's name in today's diffusers and transformers."""
    for old, new in _RENAMED.items():
        name = re.sub(old, new, name)
    return name


_RENAMED = {
    r"(mid_block\.attentions\.\d+)\.query\.": r"\1.to_q.",
    r"(mid_block\.attentions\.\d+)\.key\.": r"\1.to_k.",
    r"(mid_block\.attentions\.\d+)\.value\.": r"\1.to_v.",
    r"(mid_block\.attentions\.\d+)\.proj_attn\.": r"\1.to_out.0.",
    r"^(embeddings|encoder\.layers|final_layer_norm)\.": r"text_model.\1.",
}


def weight_files(directory: Path, part: str) -> list[Path]:
    """The files with a part's weights: whole before variants such as fp16, safetensors before pickles.

    Raises:
        ExportError: there are none, or an index names one that is missing.
    """
    safe, pickled = PARTS[part]
    whole = [directory / f"{safe}.safetensors", directory / f"{safe}.safetensors.index.json"]
    variants = [
        path
        for pattern in (
            f"{safe}.fp16.safetensors",
            f"{safe}.safetensors.index.*.json",
            f"{safe}.*.safetensors",
        )
        for path in sorted(directory.glob(pattern))
        if "-of-" not in path.name
    ]
    for path in [*whole, *variants, directory / f"{pickled}.bin"]:
        if path.is_file():
            return _shards(path) if path.suffix == ".json" else [path]
    raise ExportError(f"{directory} has no weights ({safe}.safetensors or a variant of it); download them again")


def _shards(index: Path) -> list[Path]:
    mapping = _json(index, "download the checkpoint again").get("weight_map")
    if not isinstance(mapping, dict):
        raise ExportError(f"{index} has no 'weight_map'; download the checkpoint again")
    paths = []
    for name in sorted({str(value) for value in mapping.values()}):
        if Path(name).name != name or "\\" in name:
            raise ExportError(
                f"{index} names '{name}', which lies outside of its directory; don't trust this checkpoint"
            )
        if not (index.parent / name).is_file():
            raise ExportError(f"{index.parent / name} is missing, though {index.name} names it; download it again")
        paths.append(index.parent / name)
    return paths


def _json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{path} is missing; {remedy}") from None
    except (OSError, ValueError):
        raise ExportError(f"{path} is not readable JSON; {remedy}") from None
    if not isinstance(found, dict):
        raise ExportError(f"{path} holds no JSON object; {remedy}")
    return found


def _from_hub(source: str, revision: str | None, parts: Sequence[str]) -> Path:
    """Downloads what is needed of a repository, or takes it from the Hub's cache."""
    if not _HUB_ID.fullmatch(source):
        raise ExportError(f"'{source}' does not exist: expected a directory, a file or a Hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    missing = ExportError(f"'{source}' on the Hub has no weights that can be read")
    for patterns in _HUB_WEIGHTS:
        try:
            root = Path(snapshot_download(source, revision=revision, allow_patterns=[*_HUB_SMALL, *patterns]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ExportError(f"'{source}' is no path here, and the Hub did not give it: {reason}") from None
        try:
            for part in parts:
                if part in PARTS and (root / part).is_dir():
                    weight_files(root / part, part)
        except ExportError as error:
            missing = error
            continue
        return root
    raise missing
