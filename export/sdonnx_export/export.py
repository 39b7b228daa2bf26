"""The export: a checkpoint in, a package out, whole or not at all."""

import hashlib
import json
import shutil
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
from sdonnx_runtime.errors import ExportError, SdonnxError
from sdonnx_runtime.manifest import Component, File, Manifest, Source, finite, write_manifest
from sdonnx_runtime.optimum_layout import manifest_of_layout

from sdonnx_export.checkpoint import open_checkpoint, open_vae
from sdonnx_export.clip_vocabulary import write_clip_tokenizer
from sdonnx_export.graph import COMPONENTS, build
from sdonnx_export.operators import PRECISIONS, Precision
from sdonnx_export.parts import Checkpoint
from sdonnx_export.preview import fit_preview
from sdonnx_export.verify import verify

Report = Callable[[str, float], None]
"""Told what is being done and how much of it is, 0 to 1."""

GRAPH, WEIGHTS = "model.onnx", "model.onnx_data"
"""What optimum calls them."""

_NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})

_ALIGNMENT = 65536
"""Windows maps files at multiples of this."""


def export(
    source: str,
    output: Path | None = None,
    *,
    precision: Precision = "fp32",
    vae: str | None = None,
    revision: str | None = None,
    via: str = "native",
    defaults: Mapping[str, Any] = _NO_DEFAULTS,
    force: bool = False,
    report: Report = lambda _what, _done: None,
) -> Path:
    """Turns a checkpoint into a package and returns its directory.

    Args:
        source: a diffusers directory, a Hub id, or a single ``.safetensors`` or ``.ckpt`` file.
        output: the package's directory; None is the source's name with ``-onnx`` in the working directory.
        precision: fp32, or fp16 for weights of half the size (the arithmetic stays float32).
        vae: where to take the VAE from instead of ``source``.
        revision: branch, tag or commit of a Hub id.
        via: ``native`` (written graphs, no torch) or ``optimum`` (traced by optimum-onnx).
        defaults: fields of `Defaults` that suit the model and that its configs don't say.
        force: replaces ``output`` if it exists.
        report: told of the progress.

    Raises:
        ExportError: the source can't be read or honoured, or the output can't be written.
    """
    if precision not in PRECISIONS:
        raise ExportError(f"precision '{precision}' is unknown; choose {' or '.join(PRECISIONS)}")
    output = output if output is not None else Path(f"{Path(source.rstrip('/')).stem}-onnx")
    with _finished_at(output, replacing=force) as directory:
        if via == "native":
            manifest = _export_native(source, directory, precision, vae, revision, report)
        elif via == "optimum":
            manifest = _export_optimum(source, directory, precision, vae, revision, report)
        else:
            raise ExportError(f"via '{via}' is unknown; choose native or optimum")
        manifest = replace(
            manifest,
            defaults=replace(manifest.defaults, **defaults),
            latents=replace(manifest.latents, preview=fit_preview(directory, manifest)),
        )
        write_manifest(directory, manifest)
        verify(directory, manifest, report)
    return output


def _export_native(
    source: str, directory: Path, precision: Precision, vae: str | None, revision: str | None, report: Report
) -> Manifest:
    report("reading the checkpoint", 0.0)
    checkpoint = open_checkpoint(source, revision=revision)
    if vae is not None:
        checkpoint = replace(checkpoint, parts={**checkpoint.parts, "vae": open_vae(vae)})
    models = {name: build(name, checkpoint.parts[component.part], precision) for name, component in COMPONENTS.items()}
    _write_configs(directory, checkpoint)
    with ThreadPoolExecutor(max_workers=1) as pool:
        digests: dict[str, Future[dict[str, File]]] = {}
        for name, model in models.items():
            _save(model, directory / name, lambda done, name=name: report(f"writing {name}", done))
            digests[name] = pool.submit(_files, directory, name)
        report("checksums", 1.0)
        files = {name: digest.result() for name, digest in digests.items()}
    return _manifest(directory, files, precision, _source(checkpoint))


def _export_optimum(
    source: str, directory: Path, precision: Precision, vae: str | None, revision: str | None, report: Report
) -> Manifest:
    from sdonnx_export.torch_bridge import export_with_optimum

    if precision != "fp32" or vae is not None:
        raise ExportError("--via optimum writes fp32 and the checkpoint's own VAE; leave out --precision and --vae")
    report("tracing with optimum", 0.0)
    export_with_optimum(source, directory, revision)
    files = {path.parent.name: _files(directory, path.parent.name) for path in directory.glob(f"*/{GRAPH}")}
    name = Path(source).name if Path(source).exists() else source
    exporter = f"optimum-onnx {version('optimum-onnx')}, sdonnx {version('sdonnx')}"
    return _manifest(directory, files, precision, Source(name=name, revision=revision, exporter=exporter))


def _source(checkpoint: Checkpoint) -> Source:
    exporter = f"sdonnx {version('sdonnx')}"
    return Source(name=checkpoint.source, revision=checkpoint.revision, exporter=exporter)


def _manifest(directory: Path, files: Mapping[str, dict[str, File]], precision: Precision, source: Source) -> Manifest:
    components = {
        name: Component(graphs={"plain": f"{name}/{GRAPH}"}, files=listed, precision=precision)
        for name, listed in files.items()
    }
    return replace(manifest_of_layout(directory, source=source), components=components)


def _write_configs(directory: Path, checkpoint: Checkpoint) -> None:
    """The small files of optimum's layout, without the names and paths that configs collect."""
    for name, component in COMPONENTS.items():
        _write_json(directory / name / "config.json", checkpoint.parts[component.part].config)
    _write_json(directory / "scheduler" / "scheduler_config.json", checkpoint.scheduler)
    scheduler = checkpoint.scheduler.get("_class_name", "PNDMScheduler")
    _write_json(
        directory / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", scheduler],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    tokenizer = directory / "tokenizer"
    if checkpoint.tokenizer is None:
        tokenizer.mkdir()
        write_clip_tokenizer(tokenizer)
        return
    tokenizer.mkdir()
    for path in checkpoint.tokenizer.iterdir():
        if path.name in _TOKENIZER_FILES:
            shutil.copyfile(path, tokenizer / path.name)


_TOKENIZER_FILES = (
    "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
)  # fmt: skip


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    kept = {key: value for key, value in data.items() if key != "_name_or_path"}
    path.write_text(json.dumps(finite(kept), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _save(model: ir.Model, folder: Path, done: Callable[[float], None]) -> None:
    """Writes graph and weights; each weight is read, converted and written before the next."""
    written = 0

    def count(_tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        nonlocal written
        written += 1
        done(written / info.total)

    ir.save(model, folder / GRAPH, external_data=WEIGHTS, alignment=_ALIGNMENT, callback=count)


def _files(directory: Path, component: str) -> dict[str, File]:
    """Size and SHA-256 of a component's graphs and weights."""
    found = {}
    for path in sorted((directory / component).glob(f"{GRAPH}*")):
        with path.open("rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
        found[f"{component}/{path.name}"] = File(size=path.stat().st_size, sha256=digest.hexdigest())
    return found


@contextmanager
def _finished_at(output: Path, *, replacing: bool) -> Generator[Path, None, None]:
    """A temporary sibling of ``output`` that takes its place at the end, or is gone after a failure."""
    if output.exists() and not replacing:
        raise ExportError(f"{output} exists; choose another directory with -o, or replace it with --force")
    if output.exists() and not (output.is_dir() and (_is_package(output) or not any(output.iterdir()))):
        raise ExportError(f"{output} is not a package, so --force won't replace it; choose another directory with -o")
    temporary = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _swap(temporary, output)
    except OSError as error:
        raise ExportError(
            f"{output} can't be written: {error.strerror or error}; free some space or choose another place with -o"
        ) from None
    except SdonnxError as error:
        raise error if isinstance(error, ExportError) else ExportError(str(error)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, place: Path) -> None:
    """Puts ``new`` at ``place``; what was there is deleted last."""
    if not place.exists():
        new.rename(place)
        return
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    place.rename(old)
    try:
        new.rename(place)
    except OSError:
        old.rename(place)
        raise
    shutil.rmtree(old)


def _is_package(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("sdonnx.json", "model_index.json"))
