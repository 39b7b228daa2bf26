"""The manifest of a directory that optimum exported, inferred from the config files it carries."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.manifest import Component, Defaults, File, Latents, Manifest, Source, TextEncoder, read_json

T = TypeVar("T")

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
    channels = cast("list[Any]", _value(vae, "block_out_channels", None, list))
    downscale = 2 ** (len(channels) - 1)
    return Manifest(
        family="sd1",
        target="generic",
        defaults=Defaults(size=_value(unet, "sample_size", 64, int) * downscale),
        scheduler={**read_json(root / "scheduler" / "scheduler_config.json"), **_AS_PIPELINES_READ_IT},
        latents=Latents(
            channels=_value(vae, "latent_channels", 4, int),
            downscale=downscale,
            scaling_factor=_value(vae, "scaling_factor", 0.18215, float),
            shift_factor=_value(vae, "shift_factor", 0.0, float),
        ),
        text_encoders=(
            TextEncoder(
                component="text_encoder",
                tokenizer="tokenizer",
                length=_value(text, "max_position_embeddings", 77, int),
                output="last_hidden_state",
            ),
        ),
        components={name: _component(root, name) for name in _COMPONENTS if (root / name).is_dir()},
        source=source,
    )


def _value(config: Mapping[str, Any], key: str, default: T | None, kind: type[T]) -> T:
    """The value under ``key``, or the default where it is absent or null."""
    found = config.get(key)
    found = default if found is None else found
    if kind is float and type(found) is int:
        return kind(found)
    if not isinstance(found, kind) or isinstance(found, bool):
        raise PackageError(f"the package's configs have {found!r} for '{key}'; expected {kind.__name__}; export again")
    return found


def _component(root: Path, name: str) -> Component:
    files = {
        f"{name}/{path.name}": File(size=path.stat().st_size, sha256="")
        for path in sorted((root / name).iterdir())
        if path.name.startswith("model.onnx")
    }
    return Component(graphs={"plain": f"{name}/model.onnx"}, files=files, precision="unknown")
