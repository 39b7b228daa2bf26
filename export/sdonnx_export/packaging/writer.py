"""Write a package's files: the components' graphs and weights, the small files around them, and the manifest."""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.packages.manifest import Component, File, Manifest, Source, drop_non_finite
from sdonnx_runtime.packages.optimum_layout import infer_manifest
from sdonnx_runtime.packages.variant import PLAIN
from sdonnx_runtime.text.tokenizer_files import is_fast

from sdonnx_export.checkpoint_model import Checkpoint, Report
from sdonnx_export.models.components import components_in
from sdonnx_export.operators.partition import strip_names
from sdonnx_export.operators.precision import PrecisionSpec, precision_label
from sdonnx_export.packaging.clip_tokenizer import copy_tokenizer, read_tokenizer, write_clip_tokenizer

GRAPH, WEIGHTS = "model.onnx", "model.onnx_data"
"""Optimum's file names."""

_ALIGNMENT = 65536
"""Windows maps files at multiples of this."""

_MIN_EXTERNAL_BYTES = 64
"""Larger tensors go into the weights file, where a session can replace them."""


def write_components(
    directory: Path, checkpoint: Checkpoint, make: Callable[[str], Mapping[str, ir.Model]], report: Report
) -> dict[str, dict[str, File]]:
    """Write all of a package but its manifest; ``make`` builds a component's variants when they are written."""
    _write_configs(directory, checkpoint)
    with ThreadPoolExecutor(max_workers=1) as pool:
        digests: dict[str, Future[dict[str, File]]] = {}
        for name in components_in(checkpoint):
            graphs = dict(make(name))
            write_graph(graphs.pop(PLAIN), directory / name, lambda done, name=name: report(f"writing {name}", done))
            _save_variants(graphs, directory / name)
            digests[name] = pool.submit(hash_files, directory, name)
        report("checksums", 1.0)
        return {name: digest.result() for name, digest in digests.items()}


def make_manifest(
    directory: Path,
    files: Mapping[str, dict[str, File]],
    precision: PrecisionSpec,
    source: Source,
    *,
    target: str = "generic",
) -> Manifest:
    """Make the manifest of the components in ``directory``."""
    components = {
        name: Component(graphs=_list_graphs(listed), files=listed, precision=precision_label(precision, name))
        for name, listed in files.items()
    }
    return replace(infer_manifest(directory, source=source), components=components, target=target)


def _list_graphs(files: Mapping[str, File]) -> dict[str, str]:
    paths = [Path(file) for file in files if file.endswith(".onnx")]
    return {PLAIN if path.name == GRAPH else path.stem: path.as_posix() for path in paths}


def _write_configs(directory: Path, checkpoint: Checkpoint) -> None:
    """Write the small files of optimum's layout, without the ``_name_or_path`` of their configs."""
    for name, component in components_in(checkpoint).items():
        _write_json(directory / name / "config.json", checkpoint.parts[component.part].config)
    if "unet" not in checkpoint.parts:
        return
    _write_json(directory / "scheduler" / "scheduler_config.json", checkpoint.scheduler)
    _write_json(directory / "model_index.json", _model_index(checkpoint))
    for name, tokenizer in checkpoint.tokenizers.items():
        if isinstance(tokenizer, str):
            write_clip_tokenizer(directory / name, tokenizer)
        else:
            copy_tokenizer(tokenizer, directory / name)
        _check_embeddings(directory / name, checkpoint, name.replace("tokenizer", "text_encoder"))


def _check_embeddings(tokenizer: Path, checkpoint: Checkpoint, encoder: str) -> None:
    """Raise ExportError if a tokenizer has ids beyond the embeddings of its text encoder."""
    size, rows = read_tokenizer(tokenizer).size, checkpoint.parts[encoder].config.get("vocab_size", 49408)
    if size > rows:
        raise ExportError(
            f"the {tokenizer.name} of {checkpoint.source} has ids up to {size - 1}, its {encoder} {rows} embeddings; "
            "a text encoder that was trained with this tokenizer is required"
        )


def _model_index(checkpoint: Checkpoint) -> dict[str, Any]:
    """model_index.json as diffusers writes it, so that optimum opens the package."""
    components = {
        "scheduler": ("diffusers", checkpoint.scheduler.get("_class_name", "PNDMScheduler")),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        **{name: ("transformers", _tokenizer_class(source)) for name, source in checkpoint.tokenizers.items()},
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", checkpoint.parts["vae"].config.get("_class_name", "AutoencoderKL")),
    }
    optional = ("feature_extractor", "image_encoder", "safety_checker", "text_encoder", "tokenizer")
    present = {"scheduler", *checkpoint.parts, *checkpoint.tokenizers}
    return {
        **checkpoint.settings,
        **{name: [None, None] for name in optional},
        **{name: list(kind) for name, kind in components.items() if name in present},
        **({} if "text_encoder_2" in checkpoint.parts else {"requires_safety_checker": False}),
    }


def _tokenizer_class(source: Path | str) -> str:
    return "CLIPTokenizerFast" if isinstance(source, Path) and is_fast(source) else "CLIPTokenizer"


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    content = {key: value for key, value in data.items() if key != "_name_or_path"}
    path.write_text(json.dumps(drop_non_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_graph(model: ir.Model, folder: Path, done: Callable[[float], None] = lambda _done: None) -> Path:
    """Write a graph and its weights to a folder; each weight is read, converted and written before the next."""
    written = 0

    def count(_tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        nonlocal written
        written += 1
        done(written / info.total)

    strip_names(model.graph)
    ir.save(
        model,
        folder / GRAPH,
        external_data=WEIGHTS,
        size_threshold_bytes=_MIN_EXTERNAL_BYTES,
        alignment=_ALIGNMENT,
        callback=count,
    )
    return folder / GRAPH


def _save_variants(graphs: Mapping[str, ir.Model], folder: Path) -> None:
    """Write a component's other graphs, over the weights file of its plain one, without names of operators."""
    stored = ir.load(folder / GRAPH).graph.initializers
    for variant, model in graphs.items():
        for name, value in model.graph.initializers.items():
            if name in stored and isinstance(stored[name].const_value, ir.ExternalTensor):
                value.const_value = stored[name].const_value
        strip_names(model.graph)
        for node in model.graph:
            node.name = None
        ir.save(model, folder / f"{variant}.onnx")


def hash_files(directory: Path, component: str) -> dict[str, File]:
    """Measure size and SHA-256 of a component's graphs and weights."""
    files = {}
    for path in sorted((directory / component).glob("*.onnx*")):
        with path.open("rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
        files[f"{component}/{path.name}"] = File(size=path.stat().st_size, sha256=digest.hexdigest())
    return files
