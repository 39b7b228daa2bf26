"""Opening a checkpoint in any layout that it is kept in: a diffusers directory, a Hub id, a single file, a package."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.packages.manifest import MANIFEST
from sdonnx_runtime.packages.optimum_layout import PIPELINES
from sdonnx_runtime.request import given

from sdonnx_export.checkpoint_model import Checkpoint, Part, Report, Weight
from sdonnx_export.checkpoints.few_steps import few_steps
from sdonnx_export.checkpoints.files import canonical_key, is_used_key, open_file
from sdonnx_export.checkpoints.from_package import open_package
from sdonnx_export.checkpoints.ldm.checkpoint import split_checkpoint, split_vae
from sdonnx_export.checkpoints.ldm.control import read_control
from sdonnx_export.models.components import VAES

PARTS = {
    "text_encoder": ("model", "pytorch_model"),
    "text_encoder_2": ("model", "pytorch_model"),
    "unet": ("diffusion_pytorch_model",) * 2,
    "vae": ("diffusion_pytorch_model",) * 2,
}
"""Each part's directory, and how its safetensors and its pickled files are called."""

CONTROLS = {"ControlNetModel": "controlnet", "T2IAdapter": "adapter"}
"""The part that each of diffusers' classes is which steer a U-Net."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_SMALL = ("model_index.json", "config.json", "*/config.json", "scheduler/*.json", "tokenizer/*", "tokenizer_2/*")
_HUB_WEIGHTS = (
    (
        "*/model.safetensors",
        "*/diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "*.safetensors.index.json",
        "*-of-*.safetensors",
    ),
    ("*/*.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors", "*.safetensors.index.fp16.json"),
    ("*/*.safetensors",),
    ("*/pytorch_model.bin", "*/diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin"),
)
"""What is fetched of a repository: the first of these that it has; a VAE's own has no directories."""


def open_checkpoint(source: str, *, revision: str | None = None) -> Checkpoint:
    """Opens a diffusers directory, a Hub id, one file in the original LDM layout, or a package of fp32 or fp16.

    It is a whole checkpoint, or a ControlNet or T2I-Adapter alone.

    Raises:
        ExportError: there is none, it is damaged, or it is not of a family that can be exported.
        PackageError: the package is damaged.
    """
    path = Path(source)
    if path.is_file():
        weights = open_file(path)
        control = read_control(path, weights)
        return _alone(path.name, None, control) if control else split_checkpoint(path, weights)
    if (path / MANIFEST).is_file():
        checkpoint = open_package(path)
        if "vae" in checkpoint.parts and "unet" not in checkpoint.parts:
            raise _vae_alone(source)
        return checkpoint
    if path.is_dir():
        return _from_directory(path, path.resolve().name, None)
    return _from_directory(
        _from_hub(source, revision, lambda root: _directories(root) or _control_in(root)), source, revision
    )


def open_vae(source: str, *, revision: str | None = None) -> Part:
    """Opens a VAE: its diffusers directory, a pipeline's, a Hub id of either, a file in LDM layout, or a package.

    Raises:
        ExportError: as `open_checkpoint`.
    """
    path = Path(source)
    if path.is_file():
        return split_vae(path, open_file(path))
    if (path / MANIFEST).is_file():
        found = open_package(path).parts
        if "vae" not in found:
            raise ExportError(f"{source} has no VAE; give a package of one")
        return found["vae"]
    root = path if path.is_dir() else _from_hub(source, revision, lambda root: {"vae": _vae_in(root)})
    return _part(_vae_in(root), "vae")


def open_vae_alone(source: str, *, revision: str | None = None) -> Checkpoint:
    """What `open_vae` opens, as a checkpoint that has nothing else.

    Raises:
        ExportError: as `open_checkpoint`.
    """
    path = Path(source)
    name = path.resolve().name if path.exists() else source
    return _alone(name, revision, {"vae": open_vae(source, revision=revision)})


def _alone(name: str, revision: str | None, parts: Mapping[str, Part]) -> Checkpoint:
    """A checkpoint of what makes no pictures by itself."""
    return Checkpoint(source=name, revision=revision, parts=parts, scheduler={}, tokenizers={}, settings={})


def _control_in(root: Path) -> dict[str, Path]:
    """The directory of a ControlNet or a T2I-Adapter, by the part's name, if it is one."""
    config = root / "config.json"
    kind = _json(config, "download the checkpoint again").get("_class_name") if config.is_file() else None
    return {CONTROLS[kind]: root} if kind in CONTROLS else {}


def _directories(root: Path) -> dict[str, Path]:
    return {part: root / part for part in PARTS if (root / part).is_dir()}


def _vae_in(root: Path) -> Path:
    return root / "vae" if (root / "vae").is_dir() else root


def _vae_alone(name: str) -> ExportError:
    return ExportError(f"{name} is a VAE alone; give it with --vae, beside a checkpoint or for a package of its own")


def _from_directory(root: Path, name: str, revision: str | None) -> Checkpoint:
    config = root / "config.json"
    if config.is_file() and _json(config, "download the checkpoint again").get("_class_name") in VAES:
        raise _vae_alone(name)
    control = _control_in(root)
    if control:
        return _alone(name, revision, {part: _part(directory, part) for part, directory in control.items()})
    index = _json(root / "model_index.json", "expected a diffusers directory, a Hub id or a single file")
    _refuse_others(name, index.get("_class_name"))
    parts = [part for part in PARTS if part in ("unet", "vae") or _names_one(index.get(part))]
    tokenizers = {part.replace("text_encoder", "tokenizer"): part for part in parts if part.startswith("text_encoder")}
    if not tokenizers:
        raise ExportError(f"{name} has no text encoder; download the checkpoint again")
    for tokenizer in tokenizers:
        if not (root / tokenizer).is_dir():
            raise ExportError(f"{root / tokenizer} is missing; download the checkpoint again")
    return Checkpoint(
        source=name,
        revision=revision,
        parts={part: _part(root / part, part) for part in parts},
        scheduler=_json(root / "scheduler" / "scheduler_config.json", "download the checkpoint again"),
        tokenizers={tokenizer: root / tokenizer for tokenizer in tokenizers},
        settings={key: value for key, value in index.items() if not isinstance(value, list)},
        defaults=few_steps(name),
    )


def _names_one(entry: Any) -> bool:
    """Whether model_index.json names a component's library and class; [null, null] is none."""
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def _part(directory: Path, part: str) -> Part:
    config = _json(directory / "config.json", "download the checkpoint again")
    weights: dict[str, Weight] = {}
    for path in weight_files(directory, part):
        weights.update(open_file(path))
    return Part(
        config=config,
        weights={canonical_key(name): weight for name, weight in weights.items() if is_used_key(name, part)},
    )


def weight_files(directory: Path, part: str) -> list[Path]:
    """The files with a part's weights: whole before variants such as fp16, safetensors before pickles.

    Raises:
        ExportError: there are none, or an index names one that is missing.
    """
    safe, pickled = PARTS.get(part, PARTS["unet"])
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
    except (OSError, RecursionError, ValueError):
        raise ExportError(f"{path} is not readable JSON; {remedy}") from None
    if not isinstance(found, dict):
        raise ExportError(f"{path} holds no JSON object; {remedy}")
    return found


def check_pipeline(source: str, revision: str | None) -> None:
    """Finds out, before anything large is read, whether a directory's or a Hub id's pipeline is one that can be run.

    Raises:
        ExportError: it is not, or there is none.
    """
    path = Path(source)
    root = path if path.exists() else _downloaded(source, revision, ("model_index.json",))
    index = _json(root / "model_index.json", "expected a diffusers directory or a Hub id")
    _refuse_others(source, index.get("_class_name"))


def _refuse_others(name: str, pipeline: Any) -> None:
    if pipeline not in PIPELINES:
        raise ExportError(f"{name} holds a {pipeline}; what can be exported is {', '.join(PIPELINES)}")


def _from_hub(source: str, revision: str | None, parts: Callable[[Path], Mapping[str, Path]]) -> Path:
    """Downloads what is needed of a repository, or takes it from the Hub's cache; ``parts`` finds their directories."""
    missing = ExportError(f"'{source}' on the Hub has no weights that can be read")
    for patterns in _HUB_WEIGHTS:
        root = _downloaded(source, revision, (*_HUB_SMALL, *patterns))
        try:
            for part, directory in parts(root).items():
                weight_files(directory, part)
        except ExportError as error:
            missing = error
            continue
        return root
    raise missing


def _downloaded(source: str, revision: str | None, patterns: Sequence[str]) -> Path:
    if not _HUB_ID.fullmatch(source):
        raise ExportError(f"'{source}' does not exist: expected a directory, a file or a Hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"'{source}' is no path here, and the Hub did not give it: {reason}") from None


def open_source(source: str | None, vae: str | None, revision: str | None, report: Report) -> Checkpoint:
    """A checkpoint, with another VAE where one is named, or that alone; arguments and errors are those of `export`."""
    report("reading the checkpoint", 0.0)
    if source is None:
        return open_vae_alone(given(vae), revision=revision)
    checkpoint = open_checkpoint(source, revision=revision)
    if vae is None:
        return checkpoint
    if "vae" not in checkpoint.parts:
        raise ExportError(f"{source} is a ControlNet or a T2I-Adapter, which has no VAE; leave out --vae")
    return replace(checkpoint, parts={**checkpoint.parts, "vae": _scaled(open_vae(vae), checkpoint.parts["vae"])})


def _scaled(vae: Part, before: Part) -> Part:
    """A VAE whose config says no scaling factor has that of the one in its place: what the U-Net was trained with."""
    factor = before.config.get("scaling_factor")
    if factor is None or before.config.get("_class_name") != vae.config.get("_class_name"):
        return vae
    return replace(vae, config={"scaling_factor": factor, **vae.config})
