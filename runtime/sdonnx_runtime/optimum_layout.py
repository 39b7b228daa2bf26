"""The manifest of a directory that optimum exported, inferred from the config files it carries."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.manifest import Component, File, Latents, Manifest, Source, TextEncoder, read_json

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
_AS_PIPELINES_READ_IT = {"clip_sample": False, "steps_offset": 1}
"""What diffusers' Stable Diffusion pipelines set in any scheduler config, for old ones said otherwise."""

_COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


def infer_manifest(root: Path) -> Manifest:
    """What ``sdonnx.json`` would say of the optimum export in ``root``.

    Raises:
        PackageError: it is no ONNX export, or one of a family that this version can't run.
    """
    index = read_json(root / "model_index.json")
    pipeline = str(index.get("_class_name", ""))
    if pipeline.removeprefix("ORT").removeprefix("Onnx") not in _PIPELINES:
        raise PackageError(f"{root} holds a {pipeline}; this version runs {', '.join(_PIPELINES)}")
    if not (root / "unet" / "model.onnx").is_file():
        raise PackageError(f"{root} has no unet/model.onnx: it is a checkpoint; run 'sdonnx export' on it first")
    return manifest_of_layout(root, source=Source(name=root.resolve().name, exporter="optimum"))


def manifest_of_layout(root: Path, *, source: Source) -> Manifest:
    """The manifest that the config files of optimum's layout lead to."""
    unet = read_json(root / "unet" / "config.json")
    vae = read_json(root / "vae_decoder" / "config.json")
    text = read_json(root / "text_encoder" / "config.json")
    downscale = 2 ** (len(_number_list(vae, "block_out_channels", root)) - 1)
    return Manifest(
        family="sd1",
        target="generic",
        default_size=int(unet.get("sample_size") or 64) * downscale,
        scheduler={**read_json(root / "scheduler" / "scheduler_config.json"), **_AS_PIPELINES_READ_IT},
        latents=Latents(
            channels=int(vae.get("latent_channels", 4)),
            downscale=downscale,
            scaling_factor=float(vae.get("scaling_factor") or 0.18215),
            shift_factor=float(vae.get("shift_factor") or 0.0),
        ),
        text_encoders=(
            TextEncoder(
                component="text_encoder",
                tokenizer="tokenizer",
                length=int(text.get("max_position_embeddings", 77)),
                output="last_hidden_state",
            ),
        ),
        components={name: _component(root, name) for name in _COMPONENTS if (root / name).is_dir()},
        source=source,
    )


def _number_list(config: Mapping[str, Any], key: str, root: Path) -> list[Any]:
    found = config.get(key)
    if not isinstance(found, list) or not found:
        raise PackageError(f"{root / 'vae_decoder' / 'config.json'} has no list '{key}'; export the checkpoint again")
    return found  # pyright: ignore[reportUnknownVariableType]


def _component(root: Path, name: str) -> Component:
    files = {
        f"{name}/{path.name}": File(size=path.stat().st_size, sha256="")
        for path in sorted((root / name).iterdir())
        if path.name.startswith("model.onnx")
    }
    return Component(graphs={"plain": f"{name}/model.onnx"}, files=files, precision="unknown")
