"""A package's files: components from models, the small files around them, and the manifest that lists them."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from sdonnx_runtime.packages.manifest import CONTROLS, Component, File, Manifest, Source, finite
from sdonnx_runtime.packages.optimum_layout import manifest_of_control, manifest_of_layout, manifest_of_vae

from sdonnx_export.checkpoint_model import Checkpoint, Report
from sdonnx_export.models.components import components_of
from sdonnx_export.operators.partition import strip_names
from sdonnx_export.operators.precision import PrecisionSpec, label
from sdonnx_export.packaging.clip_tokenizer import write_clip_tokenizer

GRAPH, WEIGHTS = "model.onnx", "model.onnx_data"
"""What optimum calls them."""

_ALIGNMENT = 65536
"""Windows maps files at multiples of this."""

_SMALLEST = 64
"""Bytes; what is larger goes into the weights file, where a session can be told to take it from elsewhere."""


def write_components(
    directory: Path, checkpoint: Checkpoint, make: Callable[[str], Mapping[str, ir.Model]], report: Report
) -> dict[str, dict[str, File]]:
    """Writes all of a package but its manifest; ``make`` gives a component's variants when its turn has come."""
    _write_configs(directory, checkpoint)
    with ThreadPoolExecutor(max_workers=1) as pool:
        digests: dict[str, Future[dict[str, File]]] = {}
        for name in components_of(checkpoint):
            graphs = dict(make(name))
            _save(graphs.pop("plain"), directory / name, lambda done, name=name: report(f"writing {name}", done))
            _save_variants(graphs, directory / name)
            digests[name] = pool.submit(files_of, directory, name)
        report("checksums", 1.0)
        return {name: digest.result() for name, digest in digests.items()}


def manifest_of(
    directory: Path, files: Mapping[str, dict[str, File]], precision: PrecisionSpec, source: Source
) -> Manifest:
    """The manifest of what is written in ``directory``."""
    components = {
        name: Component(graphs=_graphs_among(listed), files=listed, precision=label(precision, name))
        for name, listed in files.items()
    }
    family = next((each for each in CONTROLS if each in components), None)
    if family is not None:
        return replace(manifest_of_control(directory, family, source=source), components=components)
    infer = manifest_of_layout if "unet" in components else manifest_of_vae
    return replace(infer(directory, source=source), components=components)


def _graphs_among(files: Mapping[str, File]) -> dict[str, str]:
    paths = [Path(file) for file in files if file.endswith(".onnx")]
    return {"plain" if path.name == GRAPH else path.stem: path.as_posix() for path in paths}


def _write_configs(directory: Path, checkpoint: Checkpoint) -> None:
    """The small files of optimum's layout, without the names and paths that configs collect."""
    for name, component in components_of(checkpoint).items():
        _write_json(directory / name / "config.json", checkpoint.parts[component.part].config)
    if "unet" not in checkpoint.parts:
        return
    _write_json(directory / "scheduler" / "scheduler_config.json", checkpoint.scheduler)
    _write_json(directory / "model_index.json", _model_index(checkpoint))
    for name, tokenizer in checkpoint.tokenizers.items():
        (directory / name).mkdir()
        if isinstance(tokenizer, str):
            write_clip_tokenizer(directory / name, tokenizer)
            continue
        for path in tokenizer.iterdir():
            if path.name in _TOKENIZER_FILES:
                shutil.copyfile(path, directory / name / path.name)


def _model_index(checkpoint: Checkpoint) -> dict[str, Any]:
    """As diffusers has it, for whoever opens the package with optimum."""
    components = {
        "scheduler": ("diffusers", checkpoint.scheduler.get("_class_name", "PNDMScheduler")),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", checkpoint.parts["vae"].config.get("_class_name", "AutoencoderKL")),
    }
    optional = ("feature_extractor", "image_encoder", "safety_checker", "text_encoder", "tokenizer")
    there = {"scheduler", *checkpoint.parts, *checkpoint.tokenizers}
    return {
        **checkpoint.settings,
        **{name: [None, None] for name in optional},
        **{name: list(kind) for name, kind in components.items() if name in there},
        **({} if "text_encoder_2" in checkpoint.parts else {"requires_safety_checker": False}),
    }


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

    strip_names(model.graph)
    ir.save(
        model,
        folder / GRAPH,
        external_data=WEIGHTS,
        size_threshold_bytes=_SMALLEST,
        alignment=_ALIGNMENT,
        callback=count,
    )


def _save_variants(graphs: Mapping[str, ir.Model], folder: Path) -> None:
    """Writes more graphs beside a component's plain one, over the same weights file, without their operators' names."""
    stored = ir.load(folder / GRAPH).graph.initializers
    for variant, model in graphs.items():
        for name, value in model.graph.initializers.items():
            if name in stored and isinstance(stored[name].const_value, ir.ExternalTensor):
                value.const_value = stored[name].const_value
        strip_names(model.graph)
        for node in model.graph:
            node.name = None
        ir.save(model, folder / f"{variant}.onnx")


def files_of(directory: Path, component: str) -> dict[str, File]:
    """Size and SHA-256 of a component's graphs and weights."""
    found = {}
    for path in sorted((directory / component).glob("*.onnx*")):
        with path.open("rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
        found[f"{component}/{path.name}"] = File(size=path.stat().st_size, sha256=digest.hexdigest())
    return found
