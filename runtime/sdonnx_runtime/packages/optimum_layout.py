"""The manifest of a directory that optimum exported, inferred from the config files it carries."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.packages.manifest import (
    BESIDE,
    VAE_ALONE,
    Component,
    ConditioningSpec,
    Defaults,
    File,
    Latents,
    Manifest,
    Source,
    TextEncoder,
    channels_beside,
    read_json,
)

T = TypeVar("T")

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
"""Classes of diffusers whose components this version runs."""

_AS_PIPELINES_READ_IT = {"clip_sample": False, "steps_offset": 1}
"""What diffusers' Stable Diffusion pipelines set in any scheduler config, for old ones said otherwise."""

_COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder")


def infer_manifest(root: Path) -> Manifest:
    """What ``sdonnx.json`` would say of the optimum export in ``root``.

    Raises:
        PackageError: it is no ONNX export, or one of a family that this version can't run.
    """
    pipeline = str(read_json(root / "model_index.json").get("_class_name", ""))
    if pipeline.removeprefix("ORT").removeprefix("Onnx") not in PIPELINES:
        raise PackageError(f"{root} holds a {pipeline}; this version runs {', '.join(PIPELINES)}")
    if not (root / "unet" / "model.onnx").is_file():
        raise PackageError(f"{root} has no unet/model.onnx: it is a checkpoint; run 'sdonnx export' on it first")
    return manifest_of_layout(root, source=Source(name=root.resolve().name, exporter="optimum"))


def manifest_of_layout(root: Path, *, source: Source) -> Manifest:
    """The manifest that the config files of optimum's layout lead to.

    Raises:
        PackageError: a config lacks something, or is of a family that this version can't run.
    """
    index, unet = (read_json(root / name) for name in ("model_index.json", "unet/config.json"))
    encoders = {name: read_json(root / name / "config.json") for name in _COMPONENTS[:2] if (root / name).is_dir()}
    latents, family = _latents(root), _family(root, index, unet, encoders)
    beside = _beside(root, _value(unet, "in_channels", 4, int) - latents.channels, latents.channels)
    embedded = unet.get("time_cond_proj_dim")
    defaults = _DEFAULTS["lcm" if embedded is not None else family]
    scheduler = root / "scheduler" / "scheduler_config.json"
    return Manifest(
        family=family,
        target="generic",
        defaults=Defaults(size=_value(unet, "sample_size", 64, int) * latents.downscale, **defaults),
        scheduler={**read_json(scheduler), **_AS_PIPELINES_READ_IT},
        latents=latents,
        conditions=ConditioningSpec(
            beside=beside,
            guidance_width=None if embedded is None else _value(unet, "time_cond_proj_dim", None, int),
            zero_negative=index.get("force_zeros_for_empty_prompt") is True,
        ),
        text_encoders=tuple(
            _encoder(name, config, penultimate=unet.get("addition_embed_type") is not None)
            for name, config in encoders.items()
        ),
        components={name: _component(root, name) for name in _COMPONENTS if (root / name).is_dir()},
        source=source,
    )


def manifest_of_vae(root: Path, *, source: Source) -> Manifest:
    """The manifest of a VAE alone, in the layout of a package without the rest.

    Raises:
        PackageError: its config lacks something.
    """
    latents = _latents(root)
    return Manifest(
        family=VAE_ALONE,
        target="generic",
        defaults=Defaults(size=64 * latents.downscale),
        scheduler={},
        latents=latents,
        text_encoders=(),
        components={name: _component(root, name) for name in _COMPONENTS if (root / name).is_dir()},
        source=source,
    )


def manifest_of_control(root: Path, family: str, *, source: Source) -> Manifest:
    """The manifest of a ControlNet or a T2I-Adapter, in the layout of a package without the rest; one of CONTROLS."""
    return Manifest(
        family=family,
        target="generic",
        defaults=Defaults(size=512),
        scheduler={},
        latents=Latents(channels=4, downscale=8, scaling_factor=1.0),
        text_encoders=(),
        components={family: _component(root, family)},
        source=source,
    )


_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "sd1": {},
    "sd2": {},
    "sdxl": {"num_inference_steps": 30, "guidance_scale": 5.0},
    "sdxl-refiner": {"num_inference_steps": 30, "guidance_scale": 5.0},
    "lcm": {"num_inference_steps": 4, "guidance_scale": 8.5},
}
"""Fields of `Defaults` as diffusers' pipelines suggest them, with fewer steps."""


def _family(root: Path, index: Mapping[str, Any], unet: Mapping[str, Any], encoders: Mapping[str, Any]) -> str:
    added = unet.get("addition_embed_type")
    if added == "text_time" and "text_encoder_2" in encoders:
        return "sdxl-refiner" if index.get("requires_aesthetics_score") is True else "sdxl"
    if added is not None or list(encoders) != ["text_encoder"]:
        raise PackageError(f"{root} has a U-Net with {added!r} added to the time; this version runs none, or text_time")
    return "sd2" if encoders["text_encoder"].get("hidden_act") == "gelu" else "sd1"


def _encoder(name: str, config: Mapping[str, Any], *, penultimate: bool) -> TextEncoder:
    """What is read of it: the last layer but one, as SDXL does, or what is behind the norm that ends the encoder."""
    layers = _value(config, "num_hidden_layers", 12, int)
    output = f"hidden_states.{layers - 1}" if penultimate else "last_hidden_state"
    return TextEncoder(
        component=name,
        tokenizer=name.replace("text_encoder", "tokenizer"),
        length=_value(config, "max_position_embeddings", 77, int),
        output=output,
        pooled="text_embeds" if name == "text_encoder_2" else None,
    )


def _latents(root: Path) -> Latents:
    vae = read_json(root / "vae_decoder" / "config.json")
    tiny = vae.get("_class_name") == "AutoencoderTiny"
    channels = cast(
        "list[Any]", _value(vae, "decoder_block_out_channels" if tiny else "block_out_channels", None, list)
    )
    return Latents(
        channels=_value(vae, "latent_channels", 4, int),
        downscale=2 ** (len(channels) - 1),
        scaling_factor=_value(vae, "scaling_factor", 1.0 if tiny else 0.18215, float),
        shift_factor=_value(vae, "shift_factor", 0.0, float),
    )


def _beside(root: Path, more: int, channels: int) -> str | None:
    known = {channels_beside(kind, channels): kind for kind in (None, *BESIDE)}
    if more not in known:
        raise PackageError(
            f"{root} has a U-Net of {channels + more} channels over latents of {channels}; this version runs "
            f"{', '.join(str(channels + each) for each in sorted(known))}"
        )
    return known[more]


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
