"""Open a checkpoint in any published layout: a diffusers directory, a Hub id, a single file, a package."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.packages.manifest import MANIFEST

from sdonnx_export.checkpoint_model import Checkpoint, Part, Report
from sdonnx_export.checkpoints.companions import ALONE, BASE_MODEL, MISSING, Companions, complete, lend
from sdonnx_export.checkpoints.diffusers_directory import (
    alone_in,
    part_directories,
    read_directory,
    read_model_index,
    read_part,
    single_part_checkpoint,
    vae_alone_error,
    weight_files,
)
from sdonnx_export.checkpoints.files import open_file, read_metadata
from sdonnx_export.checkpoints.from_package import open_package
from sdonnx_export.checkpoints.ip_adapter import is_ip_adapter, read_ip_adapter
from sdonnx_export.checkpoints.ldm.checkpoint import split_checkpoint, split_vae
from sdonnx_export.checkpoints.ldm.control import read_control
from sdonnx_export.checkpoints.ldm.file_settings import SingleFile, read_original_config
from sdonnx_export.checkpoints.ldm.keys import original_prefixes
from sdonnx_export.checkpoints.ldm.relative_control import stored_relative
from sdonnx_export.checkpoints.text_encoders import (
    FIRST,
    SECOND,
    TextEncoder,
    text_encoder,
    text_encoders_of_checkpoint,
    text_encoders_of_file,
)
from sdonnx_export.checkpoints.upscaler import read_upscaler
from sdonnx_export.hub import download

NOTHING = (
    "there is nothing to export; give SRC, or --unet SRC with the other parts, "
    "or --vae SRC alone for a package of a VAE"
)
"""The message of an export without a source."""

_SMALL_FILES = ("model_index.json", "config.json", "*/config.json", "scheduler/*.json", "tokenizer/*", "tokenizer_2/*")
_WEIGHT_FILES = (
    (
        "*/model.safetensors",
        "model.safetensors",
        "*/diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "*.safetensors.index.json",
        "*-of-*.safetensors",
    ),
    ("*/*.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors", "*.safetensors.index.fp16.json"),
    ("*/*.safetensors",),
    (
        "*/pytorch_model.bin",
        "pytorch_model.bin",
        "*/diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.bin",
        "*.bin.index.json",
        "*-of-*.bin",
    ),
    ("*/*.bin",),
)
"""Patterns in order of preference; the own repository of a VAE or a text encoder has no directories."""


def open_checkpoint(source: str, *, revision: str | None = None, companions: Companions = ALONE) -> Checkpoint:
    """Open a diffusers directory, a Hub id, a single file in the original LDM layout, or a package of fp32 or fp16.

    It is a whole checkpoint with the companions, or a ControlNet, T2I-Adapter, IP-Adapter or upscaler.

    Raises:
        ExportError: it does not exist, is damaged, is not of a family that can be exported, or lacks a component.
        PackageError: the package is damaged.
    """
    return complete(_open(source, revision, companions), companions, source)


def _open(source: str, revision: str | None, companions: Companions) -> Checkpoint:
    """Open a checkpoint; components that it lacks are `MISSING`."""
    path = Path(source)
    if path.is_file():
        return _open_single_file(path, companions)
    if (path / MANIFEST).is_file():
        checkpoint = open_package(path)
        if "vae" in checkpoint.parts and "unet" not in checkpoint.parts:
            raise vae_alone_error(source)
        return checkpoint
    if path.is_dir():
        return read_directory(path, path.resolve().name, None, companions)
    root = _download_checkpoint(source, revision, lambda root: part_directories(root) or alone_in(root))
    return read_directory(root, source, revision, companions)


def _open_single_file(path: Path, companions: Companions) -> Checkpoint:
    file = _read_single_file(path)
    if is_ip_adapter(file.weights):
        return single_part_checkpoint(path.name, None, read_ip_adapter(path, file.weights, companions.image_encoder))
    upscaler = read_upscaler(path, file.weights)
    if upscaler is not None:
        return single_part_checkpoint(path.name, None, {"upscaler": upscaler})
    control = read_control(path, file.weights, companions.base)
    if not control:
        return split_checkpoint(file, companions)
    checkpoint = single_part_checkpoint(path.name, None, control)
    if companions.base is None or stored_relative(file.weights) is None:
        return checkpoint
    return replace(checkpoint, stated={BASE_MODEL: companions.base.source})


def _read_single_file(path: Path) -> SingleFile:
    weights, metadata = original_prefixes(open_file(path)), read_metadata(path)
    return SingleFile(path=path, weights=weights, metadata=metadata, original=read_original_config(path))


def _download_checkpoint(source: str, revision: str | None, parts: Callable[[Path], Mapping[str, Path]]) -> Path:
    """Download the weights that a repository has in the best format; ``parts`` finds their directories in it.

    Raises:
        ExportError: there is no such repository, or none of its weights can be read.
    """
    missing = ExportError(f"'{source}' on the Hub has no weights that can be read")
    for patterns in _WEIGHT_FILES:
        root = download(source, (*_SMALL_FILES, *patterns), revision=revision, error=ExportError)
        try:
            for part, directory in parts(root).items():
                weight_files(directory, part)
        except ExportError as error:
            missing = error
            continue
        return root
    raise missing


def open_vae(source: str, *, revision: str | None = None) -> Part:
    """Open a VAE: its diffusers directory, a pipeline's, a Hub id of either, a file in LDM layout, or a package.

    Raises:
        ExportError: as `open_checkpoint`.
    """
    path = Path(source)
    if path.is_file():
        return split_vae(_read_single_file(path))
    if (path / MANIFEST).is_file():
        parts = open_package(path).parts
        if "vae" not in parts:
            raise ExportError(f"{source} has no VAE; give a package with one")
        return parts["vae"]
    root = path if path.is_dir() else _download_checkpoint(source, revision, lambda root: {"vae": _vae_directory(root)})
    return read_part(_vae_directory(root), "vae")


def _vae_directory(root: Path) -> Path:
    return root / "vae" if (root / "vae").is_dir() else root


def open_vae_alone(source: str, *, revision: str | None = None) -> Checkpoint:
    """Open a VAE as a checkpoint of nothing else.

    Raises:
        ExportError: as `open_checkpoint`.
    """
    path = Path(source)
    name = path.resolve().name if path.exists() else source
    return single_part_checkpoint(name, revision, {"vae": open_vae(source, revision=revision)})


def check_pipeline(source: str, revision: str | None) -> None:
    """Check, before anything large is read, that a directory's or a Hub id's pipeline can be exported.

    Raises:
        ExportError: it can't, or does not exist.
    """
    path = Path(source)
    root = path if path.exists() else download(source, ("model_index.json",), revision=revision, error=ExportError)
    read_model_index(root, source, expected="a diffusers directory or a Hub id")


def open_text_encoders(source: str) -> list[TextEncoder]:
    """Open the text encoders of anything that `open_checkpoint` opens, or one in a directory or a file of its own.

    Raises:
        ExportError: as `open_checkpoint`, or there is none.
    """
    path = Path(source)
    if path.is_file():
        return text_encoders_of_file(source, original_prefixes(open_file(path)))
    if (path / MANIFEST).is_file():
        return text_encoders_of_checkpoint(source, open_package(path))
    root = path if path.is_dir() else _download_checkpoint(source, None, _text_encoder_directories)
    found = _text_encoder_directories(root)
    parts = {name: read_part(directory, SECOND) for name, directory in found.items()}
    tokenizers = {name: root / name.replace("text_encoder", "tokenizer") for name in found}
    return [
        text_encoder(
            source,
            found[name] / "config.json",
            part.weights,
            part.config,
            tokenizers[name] if tokenizers[name].is_dir() else None,
        )
        for name, part in parts.items()
    ]


def _text_encoder_directories(root: Path) -> dict[str, Path]:
    """Return the directories of a pipeline's text encoders, or that of one alone."""
    return {part: root / part for part in (FIRST, SECOND) if (root / part).is_dir()} or {FIRST: root}


def open_source(
    source: str | None,
    vae: str | None,
    revision: str | None,
    report: Report,
    *,
    base: str | None = None,
    unet: str | None = None,
    text_encoders: Sequence[str] = (),
    prediction_type: str | None = None,
    image_encoder: str | None = None,
) -> Checkpoint:
    """Open a checkpoint with its companions, or a VAE alone; arguments and errors are those of `export`."""
    report("reading the checkpoint", 0.0)
    if source is None and unet is None:
        others = (base, prediction_type, image_encoder)
        if vae is None or text_encoders or any(each is not None for each in others):
            raise ExportError(NOTHING)
        return open_vae_alone(vae, revision=revision)
    lender = None if base is None else _open_base(base)
    if unet is not None and source is not None:
        lender = lend(_open_base(source, revision, "whose other parts go with that of --unet"), lender)
    companions = Companions(
        vae=None if vae is None else open_vae(vae),
        text_encoders=[encoder for each in text_encoders for encoder in open_text_encoders(each)],
        base=lender,
        prediction_type=prediction_type,
        image_encoder=image_encoder,
    )
    if unet is None:
        assert source is not None  # noqa: S101 — for the type checker
        return open_checkpoint(source, revision=revision, companions=companions)
    opened = complete(_open_unet(unet, None if source is not None else revision, companions), companions, unet)
    if lender is None or source is None:
        return opened
    stated = {"U-Net": f"from {opened.source}", **opened.stated}
    return replace(opened, source=lender.source, revision=lender.revision, stated=stated)


def _open_unet(source: str, revision: str | None, companions: Companions) -> Checkpoint:
    """Open a checkpoint of which only the U-Net, its scheduler and its settings count."""
    opened = _open(source, revision, companions)
    if not opened.parts.get("unet", MISSING).weights:
        raise ExportError(f"{source} has no U-Net; give a checkpoint, a package or a file with one")
    scaling = {
        key: value
        for key, value in opened.parts.get("vae", MISSING).config.items()
        if key in ("_class_name", "scaling_factor")
    }
    empty = {name: replace(MISSING, config=scaling if name == "vae" else {}) for name in opened.parts}
    return replace(opened, parts={**empty, "unet": opened.parts["unet"]}, tokenizers={})


def _open_base(source: str, revision: str | None = None, use: str = "with --base") -> Checkpoint:
    """Open the checkpoint that lends what a source lacks; it may lack something itself."""
    base = _open(source, revision, ALONE)
    if not base.parts.get("unet", MISSING).weights:
        raise ExportError(f"{source} has no U-Net; give a checkpoint of Stable Diffusion {use}")
    return base
