"""Read a diffusers directory: a pipeline, a VAE, a ControlNet or a T2I-Adapter."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.packages.optimum_layout import PIPELINES

from sdonnx_export.checkpoint_model import Checkpoint, Part, Weight
from sdonnx_export.checkpoints.few_steps import few_steps
from sdonnx_export.checkpoints.files import canonical_key, is_used_key, open_file
from sdonnx_export.models.components import VAES

PARTS = {
    "text_encoder": ("model", "pytorch_model"),
    "text_encoder_2": ("model", "pytorch_model"),
    "unet": ("diffusion_pytorch_model",) * 2,
    "vae": ("diffusion_pytorch_model",) * 2,
}
"""Each part's directory, and the stems of its safetensors and pickled files."""

CONTROLS = {"ControlNetModel": "controlnet", "T2IAdapter": "adapter"}
"""diffusers' class of a control, and the name of its part."""

_DOWNLOAD_AGAIN = "download the checkpoint again"


def read_directory(root: Path, name: str, revision: str | None) -> Checkpoint:
    """Open a pipeline, or a ControlNet or T2I-Adapter, as the checkpoint ``name``.

    Raises:
        ExportError: it is damaged, or can't be exported.
    """
    if _class_name(root) in VAES:
        raise vae_alone_error(name)
    control = control_in(root)
    if control:
        parts = {part: read_part(directory, part) for part, directory in control.items()}
        return single_part_checkpoint(name, revision, parts)
    index = read_model_index(root, name)
    parts = [part for part in PARTS if part in ("unet", "vae") or _is_component(index.get(part))]
    tokenizers = {part.replace("text_encoder", "tokenizer"): part for part in parts if part.startswith("text_encoder")}
    if not tokenizers:
        raise ExportError(f"{name} has no text encoder; {_DOWNLOAD_AGAIN}")
    for tokenizer in tokenizers:
        if not (root / tokenizer).is_dir():
            raise ExportError(f"{root / tokenizer} is missing; {_DOWNLOAD_AGAIN}")
    return Checkpoint(
        source=name,
        revision=revision,
        parts={part: read_part(root / part, part) for part in parts},
        scheduler=_read_json(root / "scheduler" / "scheduler_config.json"),
        tokenizers={tokenizer: root / tokenizer for tokenizer in tokenizers},
        settings={key: value for key, value in index.items() if not isinstance(value, list)},
        defaults=few_steps(name),
    )


def single_part_checkpoint(name: str, revision: str | None, parts: Mapping[str, Part]) -> Checkpoint:
    """Return the checkpoint of a VAE or a control, which generates no images by itself."""
    return Checkpoint(source=name, revision=revision, parts=parts, scheduler={}, tokenizers={}, settings={})


def vae_alone_error(name: str) -> ExportError:
    """Return the error for a VAE where a checkpoint is expected."""
    return ExportError(
        f"{name} is a VAE alone; give it with --vae, together with a checkpoint or for a package of its own"
    )


def read_model_index(
    root: Path, name: str, *, expected: str = "a diffusers directory, a Hub id or a single file"
) -> dict[str, Any]:
    """Read model_index.json.

    Raises:
        ExportError: it is missing or damaged, or names a pipeline that can't be exported.
    """
    index = _read_json(root / "model_index.json", f"expected {expected}")
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise ExportError(f"{name} holds a {pipeline}; supported: {', '.join(PIPELINES)}")
    return index


def control_in(root: Path) -> dict[str, Path]:
    """Return the directory of a ControlNet or a T2I-Adapter by the part's name; empty if ``root`` is neither."""
    name = _class_name(root)
    return {CONTROLS[name]: root} if name in CONTROLS else {}


def part_directories(root: Path) -> dict[str, Path]:
    """Return the directories of a pipeline's parts."""
    return {part: root / part for part in PARTS if (root / part).is_dir()}


def _class_name(root: Path) -> Any:
    """Return the class that config.json names; None if there is no such file."""
    config = root / "config.json"
    return _read_json(config).get("_class_name") if config.is_file() else None


def _is_component(entry: Any) -> bool:
    """Whether an entry of model_index.json is a component's library and class; [null, null] is none."""
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def read_part(directory: Path, part: str) -> Part:
    """Open a part's config and weights.

    Raises:
        ExportError: a file is missing or damaged.
    """
    config = _read_json(directory / "config.json")
    weights: dict[str, Weight] = {}
    for path in weight_files(directory, part):
        weights.update(open_file(path))
    return Part(
        config=config,
        weights={canonical_key(name): weight for name, weight in weights.items() if is_used_key(name, part)},
    )


def weight_files(directory: Path, part: str) -> list[Path]:
    """Return the files with a part's weights: unsuffixed before variants such as fp16, safetensors before pickles.

    Raises:
        ExportError: there are none, or an index names one that is missing.
    """
    safe, pickled = PARTS.get(part, PARTS["unet"])
    unsuffixed = [directory / f"{safe}.safetensors", directory / f"{safe}.safetensors.index.json"]
    patterns = (f"{safe}.fp16.safetensors", f"{safe}.safetensors.index.*.json", f"{safe}.*.safetensors")
    matches = (path for pattern in patterns for path in sorted(directory.glob(pattern)))
    variants = [path for path in matches if "-of-" not in path.name]
    for path in [*unsuffixed, *variants, directory / f"{pickled}.bin"]:
        if path.is_file():
            return _shards(path) if path.suffix == ".json" else [path]
    raise ExportError(f"{directory} has no weights ({safe}.safetensors or a variant of it); download them again")


def _shards(index: Path) -> list[Path]:
    mapping = _read_json(index).get("weight_map")
    if not isinstance(mapping, dict):
        raise ExportError(f"{index} has no 'weight_map'; {_DOWNLOAD_AGAIN}")
    paths = []
    for name in sorted({str(value) for value in mapping.values()}):
        if Path(name).name != name or "\\" in name:
            raise ExportError(f"{index} names '{name}', which lies outside its directory; don't trust this checkpoint")
        if not (index.parent / name).is_file():
            raise ExportError(f"{index.parent / name} is missing, but {index.name} names it; download it again")
        paths.append(index.parent / name)
    return paths


def _read_json(path: Path, remedy: str = _DOWNLOAD_AGAIN) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{path} is missing; {remedy}") from None
    except (OSError, RecursionError, ValueError):
        raise ExportError(f"{path} is not readable JSON; {remedy}") from None
    if not isinstance(data, dict):
        raise ExportError(f"{path} is not a JSON object; {remedy}")
    return data
