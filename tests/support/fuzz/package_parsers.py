"""Fuzzed parsers of packages: manifest, optimum's configs, scheduler config, graphs, tokenizer files."""

import json
import zlib
from pathlib import Path

from sdonnx_models import bundled
from sdonnx_runtime.graphs.initializers import read_initializers
from sdonnx_runtime.graphs.partition import read_stages
from sdonnx_runtime.graphs.shape_inference import TensorInfo, UnsupportedGraph
from sdonnx_runtime.memory.estimates import Graph, estimate_stages
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.pipeline import Pipeline
from sdonnx_runtime.sampling.registry import SAMPLERS
from sdonnx_runtime.text.tokenizer import Tokenizer

from support.fuzz.campaign import Target
from support.fuzz.mutators import mutate_bytes, mutate_files, mutate_json, mutate_text, pack_files, unpack_files

PACKAGE = bundled()["pictogram"]
_PROMPT = "a (red:1.2) [apple:pear:0.5]"


def manifest(folder: Path) -> Target:
    """``sdonnx.json``, up to a resolved request."""
    _link(PACKAGE, folder, without=("sdonnx.json",))
    return Target(
        seeds=[(PACKAGE / "sdonnx.json").read_bytes()],
        mutate=mutate_json,
        read=lambda data: _use(folder, {"sdonnx.json": data}),
    )


def optimum(folder: Path) -> Target:
    """The configs of an optimum export, up to a resolved request."""
    names = ("model_index.json", *(f"{name}/config.json" for name in ("unet", "vae_decoder", "text_encoder")))
    names = (*names, "scheduler/scheduler_config.json")
    _link(PACKAGE, folder, without=("sdonnx.json", *names))
    files = {name: (PACKAGE / name).read_bytes() for name in names}
    return Target(
        seeds=[pack_files(files)],
        mutate=mutate_files({".json": mutate_json}),
        read=lambda data: _use(folder, unpack_files(data)),
    )


def scheduler(folder: Path) -> Target:
    """A scheduler config, up to the schedule of its own sampler and of another."""
    _link(PACKAGE, folder, without=("sdonnx.json",))
    whole = json.loads((PACKAGE / "sdonnx.json").read_bytes())
    classes = ("DDIMScheduler", "LCMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
    common = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "trained_betas": None}
    keys = {
        "num_train_timesteps": 1000, "steps_offset": 1, "timestep_spacing": "leading", "prediction_type": "epsilon",
        "clip_sample": False, "clip_sample_range": 1.0, "thresholding": False, "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0, "solver_order": 2, "solver_type": "midpoint", "algorithm_type": "dpmsolver++",
        "use_karras_sigmas": False, "rescale_betas_zero_snr": False, "final_sigmas_type": "zero",
        "original_inference_steps": 50, "set_alpha_to_one": False, "sigma_min": None, "timestep_scaling": 10.0,
    }  # fmt: skip
    seeds = [json.dumps({"_class_name": name, **common, **keys}).encode() for name in classes]
    seeds.append((PACKAGE / "scheduler" / "scheduler_config.json").read_bytes())

    def read(data: bytes) -> None:
        try:
            config = json.loads(data)
        except (ValueError, RecursionError):
            return
        text = json.dumps({**whole, "scheduler": config})
        _use(folder, {"sdonnx.json": text.encode()}, sampler=[*SAMPLERS][zlib.crc32(data) % len(SAMPLERS)])

    return Target(seeds=seeds, mutate=mutate_json, read=read)


def _use(root: Path, files: "dict[str, bytes]", sampler: str | None = None) -> None:
    for name, data in files.items():
        (root / name).write_bytes(data)
    for name in {path.name for path in root.iterdir()} & {"sdonnx.json", "model_index.json"} - files.keys():
        (root / name).unlink(missing_ok=True)
    pipeline = Pipeline(Package.open(root), device="cpu")
    assert pipeline.package.title
    assert pipeline.package.precision
    request = {"width": 64, "height": 64, "num_inference_steps": 3, "sampler": sampler}
    pipeline.resolve(_PROMPT, **request)


def _link(package: Path, folder: Path, without: "tuple[str, ...]") -> None:
    for path in package.rglob("*"):
        place = folder / path.relative_to(package)
        if path.is_dir():
            place.mkdir()
        elif path.relative_to(package).as_posix() not in without:
            place.symlink_to(path)


def onnx(folder: Path) -> Target:
    """A graph, up to the memory of its stages."""
    names = ("unet/cached.onnx", "text_encoder/embedded.onnx", "vae_encoder/model.onnx")
    (folder / "model.onnx_data").symlink_to(PACKAGE / "unet" / "model.onnx_data")  # the largest, so for all of them
    path = folder / "model.onnx"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for each in read_initializers(path).values():
            if not each.external:
                each.read()
        shapes = {name: each.shape for name, each in read_stages(path).inputs.items()}
        sized = {name: tuple(8 if isinstance(size, str) else size for size in shape) for name, shape in shapes.items()}
        inputs = tuple((name, TensorInfo(shape)) for name, shape in sized.items())
        try:
            estimate_stages(Graph(path=path, inputs=inputs), cut=bool(len(data) % 2))
        except UnsupportedGraph:
            return  # it runs, unplanned

    return Target(seeds=[(PACKAGE / name).read_bytes() for name in names], mutate=mutate_bytes, read=read)


def tokenizer(folder: Path) -> Target:
    """The files of a tokenizer, and the ids of some texts."""
    source = PACKAGE / "tokenizer"
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    texts = ("a photo of an astronaut, 8k (best)", "<|endoftext|> İstanbul \U0001f680 don't", "漢字 \x00 a" * 5)

    def read(data: bytes) -> None:
        for old in folder.iterdir():
            old.unlink()
        for name, content in unpack_files(data).items():
            (folder / name).write_bytes(content)
        opened = Tokenizer.open(folder, length=32)
        for text in texts:
            opened.encode(text)

    words = ("</w>", " ", "\n", "a", "th", "#version: 0.2\n", "Ġ", "é")
    return Target(
        seeds=[pack_files(files)],
        mutate=mutate_files({".json": mutate_json, ".txt": mutate_text(words)}),
        read=read,
    )
