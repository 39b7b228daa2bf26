"""The manifest of a directory in optimum's layout, inferred from its config files: of an optimum export, or of ours."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.files.json_file import whole_numbers
from sdonnx_runtime.packages.concat import CONCAT
from sdonnx_runtime.packages.families import COMPONENT_NAMES, FAMILIES, REQUIRED_COMPONENTS, PackageKind
from sdonnx_runtime.packages.manifest import (
    Component,
    ConditioningSpec,
    Defaults,
    File,
    Latents,
    Manifest,
    Source,
    TextEncoder,
    check_manifest,
    parse,
    read_json,
)
from sdonnx_runtime.packages.variant import PLAIN

T = TypeVar("T")

PIPELINES = (
    *(f"StableDiffusion{task}Pipeline" for task in ("", "Img2Img", "Inpaint", "InstructPix2Pix", "Depth2Img")),
    *(f"StableDiffusionXL{task}Pipeline" for task in ("", "Img2Img", "Inpaint")),
    *(f"LatentConsistencyModel{task}Pipeline" for task in ("", "Img2Img")),
)
"""Classes of diffusers whose components this version runs."""

_SCHEDULER_OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "StableDiffusionPipeline": {"clip_sample": False, "steps_offset": 1},
    "StableDiffusionImg2ImgPipeline": {"clip_sample": False, "steps_offset": 1},
    "StableDiffusionInpaintPipeline": {"skip_prk_steps": True, "steps_offset": 1},
}
"""What a pipeline of diffusers sets in its scheduler config, for old configs; the others leave theirs as it is."""

_MAX_LEVELS = 8
"""Of a VAE: each halves the image."""

_RAISES_SAMPLE_SIZE = (*_SCHEDULER_OVERRIDES, "StableDiffusionDepth2ImgPipeline")
"""Pipelines of diffusers that take a ``sample_size`` below 64 for a mistake of diffusers before 0.9."""

_LCM_DEFAULTS: Mapping[str, Any] = {"num_inference_steps": 4, "guidance_scale": 8.5}
"""Of a latent consistency model, whatever its family."""


def infer_optimum_manifest(root: Path) -> Manifest:
    """Infer the manifest of an optimum export.

    Raises:
        PackageError: ``root`` is not an ONNX export, or one of a family that this version does not support.
    """
    pipeline = str(read_json(root / "model_index.json").get("_class_name", ""))
    if _diffusers_class(pipeline) not in PIPELINES:
        raise PackageError(f"{root} holds a {pipeline}; supported: {', '.join(PIPELINES)}")
    if not (root / "unet" / "model.onnx").is_file():
        raise PackageError(f"{root} has no unet/model.onnx: it is a checkpoint; run 'sdonnx export' on it first")
    return infer_manifest(root, source=Source(name=root.resolve().name, exporter="optimum"))


def infer_manifest(root: Path, *, source: Source) -> Manifest:
    """Infer the manifest of a package of any kind from the config files of its components.

    Raises:
        PackageError: a config lacks something, or is of a family that this version does not support.
    """
    components = {name: _component(root, name) for name in COMPONENT_NAMES if (root / name).is_dir()}
    kinds = (kind for kind, (main, *_) in REQUIRED_COMPONENTS.items() if main in components)
    kind = next(kinds, PackageKind.VAE)
    unused = Latents(channels=4, downscale=8, scaling_factor=1.0)
    manifest = Manifest(
        family=kind.value,
        target="generic",
        defaults=Defaults(size=512),
        scheduler={},
        latents=_latents(root) if kind.has_latents else unused,
        text_encoders=(),
        components=components,
        source=source,
    )
    manifest = _infer_model(root, manifest) if kind is PackageKind.MODEL else manifest
    return check_manifest(parse(Manifest, json.loads(json.dumps(asdict(manifest))), str(root)), str(root))


def _infer_model(root: Path, manifest: Manifest) -> Manifest:
    """Fill in what only the manifest of a model has."""
    latents, components = manifest.latents, manifest.components
    index, unet = (read_json(root / name) for name in ("model_index.json", "unet/config.json"))
    encoders = {name: read_json(root / name / "config.json") for name in COMPONENT_NAMES[:2] if name in components}
    family = _family(root, index, unet, encoders)
    pipeline = _diffusers_class(str(index.get("_class_name", "")))
    width, height = _sample_size(unet, pipeline, FAMILIES[family].sample_sizes["epsilon"])
    scheduler = as_loaded(read_json(root / "scheduler" / "scheduler_config.json"), index)
    suggested = {name: getattr(FAMILIES[family], name) for name in _LCM_DEFAULTS}
    distilled = unet.get("time_cond_proj_dim") is not None
    return replace(
        manifest,
        family=family,
        defaults=Defaults(
            size=width * latents.downscale,
            height=None if height == width else height * latents.downscale,
            **(_LCM_DEFAULTS if distilled else suggested),
        ),
        scheduler={**_unclipped(scheduler), **_SCHEDULER_OVERRIDES.get(pipeline, {})},
        conditions=ConditioningSpec(
            concat=_concat(root, _value(unet, "in_channels", 4, int) - latents.channels, latents.channels),
            guidance_width=_value(unet, "time_cond_proj_dim", None, int) if distilled else None,
            # In SDXL's pipelines a key that is absent is true.
            zero_negative=bool(index.get("force_zeros_for_empty_prompt", FAMILIES[family].time_ids > 0)),
        ),
        text_encoders=tuple(
            _encoder(name, config, penultimate=unet.get("addition_embed_type") is not None)
            for name, config in encoders.items()
        ),
    )


def _diffusers_class(pipeline: str) -> str:
    """The class of diffusers that one of optimum wraps."""
    return pipeline.removeprefix("ORT").removeprefix("Onnx")


def as_loaded(scheduler: Mapping[str, Any], index: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler config with the class that model_index.json names, which is the one that diffusers loads."""
    entry = index.get("scheduler")
    named = cast("list[Any]", entry)[-1] if isinstance(entry, list) and entry else None
    return {**scheduler, "_class_name": named} if isinstance(named, str) else {**scheduler}


def _unclipped(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a class that doesn't clip, so that DDIM or DDPM, which clip by default, don't in its place."""
    clips = scheduler.get("_class_name") in ("DDIMScheduler", "DDPMScheduler")
    return {**scheduler} if clips else {"clip_sample": False, **scheduler}


def _sample_size(unet: Mapping[str, Any], pipeline: str, default: int) -> tuple[int, int]:
    """Return the width and height of the latents that suit a U-Net: one number, or diffusers' (height, width)."""
    found = unet.get("sample_size")
    sides: list[Any] = cast("list[Any]", found) if isinstance(found, list) else [found, found]
    height, width = (_value({"sample_size": side}, "sample_size", default, int) for side in (sides * 2)[:2] or [0, 0])
    if len(sides) != 2 or min(height, width) < 1:
        raise PackageError(
            f"the U-Net's config has {found!r} for 'sample_size'; expected a number, or height and width; {_REMEDY}"
        )
    is_old = re.match(r"0\.[0-8](\D|$)", str(unet.get("_diffusers_version", "1"))) is not None
    if is_old and pipeline in _RAISES_SAMPLE_SIZE and isinstance(found, (int, float)):
        return max(width, 64), max(height, 64)
    return width, height


def _family(root: Path, index: Mapping[str, Any], unet: Mapping[str, Any], encoders: Mapping[str, Any]) -> str:
    added = unet.get("addition_embed_type")
    if added == "text_time" and "text_encoder_2" in encoders:
        return "sdxl-refiner" if index.get("requires_aesthetics_score") is True else "sdxl"
    if added is not None or list(encoders) != ["text_encoder"]:
        raise PackageError(f"{root} has a U-Net of addition_embed_type {added!r}; supported: none, text_time")
    return "sd2" if encoders["text_encoder"].get("hidden_act") == "gelu" else "sd1"


def _encoder(name: str, config: Mapping[str, Any], *, penultimate: bool) -> TextEncoder:
    """A text encoder, of which the U-Net reads the last layer but one, as in SDXL, or the normalized last one."""
    layers = _value(config, "num_hidden_layers", 12, int)
    return TextEncoder(
        component=name,
        tokenizer=name.replace("text_encoder", "tokenizer"),
        length=_value(config, "max_position_embeddings", 77, int),
        output=f"hidden_states.{layers - 1}" if penultimate else "last_hidden_state",
        pooled="text_embeds" if name == "text_encoder_2" else None,
    )


def _latents(root: Path) -> Latents:
    vae = read_json(root / "vae_decoder" / "config.json")
    tiny = vae.get("_class_name") == "AutoencoderTiny"
    key = "decoder_block_out_channels" if tiny else "block_out_channels"
    channels = cast("list[Any]", _value(vae, key, None, list))
    if not 1 <= len(channels) <= _MAX_LEVELS:
        raise PackageError(f"{root} has a VAE of {len(channels)} levels; expected 1 to {_MAX_LEVELS}; export again")
    return Latents(
        channels=_value(vae, "latent_channels", 4, int),
        downscale=2 ** (len(channels) - 1),
        scaling_factor=_value(vae, "scaling_factor", 1.0 if tiny else FAMILIES["sd1"].scaling_factor, float),
        shift_factor=_value(vae, "shift_factor", 0.0, float),
    )


def _concat(root: Path, extra: int, channels: int) -> str | None:
    """The kind of concat conditioning with ``extra`` input channels, for latents of ``channels``."""
    kinds: dict[int, str | None] = {each.channels(channels): kind for kind, each in CONCAT.items()} | {0: None}
    if extra not in kinds:
        raise PackageError(
            f"{root} has a U-Net of {channels + extra} input channels over latents of {channels}; supported: "
            f"{', '.join(str(channels + each) for each in sorted(kinds))}"
        )
    return kinds[extra]


_KINDS: Mapping[type, str] = {int: "a whole number", float: "a number", list: "a list"}

_REMEDY = "correct it, or download the model again"


def _value(config: Mapping[str, Any], key: str, default: T | None, kind: type[T]) -> T:
    """The value under ``key``, or the default where it is absent or null."""
    found = whole_numbers(config.get(key)) if kind is int else config.get(key)
    found = default if found is None else found
    if kind is float and type(found) is int:
        return cast("T", float(found))
    if not isinstance(found, kind) or isinstance(found, bool):
        raise PackageError(f"a config has {found!r} for '{key}'; expected {_KINDS[kind]}; {_REMEDY}")
    return cast("T", found)


def _component(root: Path, name: str) -> Component:
    files = {
        f"{name}/{path.name}": File(size=path.stat().st_size, sha256="")
        for path in sorted((root / name).iterdir())
        if path.name.startswith("model.onnx") and path.is_file()
    }
    return Component(graphs={PLAIN: f"{name}/model.onnx"}, files=files, precision="unknown")
