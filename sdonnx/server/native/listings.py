"""What may be chosen: packages, fields, samplers, schedules, LoRAs, styles, embeddings."""

import asyncio
import dataclasses
from importlib.metadata import version
from typing import Any

from sdonnx_runtime.adapters.textual_inversion import read_embedding
from sdonnx_runtime.denoising.control import describe_control
from sdonnx_runtime.denoising.ip_adapter import describe_ip_adapter
from sdonnx_runtime.images.preprocess import UPSCALERS
from sdonnx_runtime.outputs.metadata import A1111_SCHEDULES
from sdonnx_runtime.packages.concat import CONCAT
from sdonnx_runtime.packages.manifest import Manifest
from sdonnx_runtime.packages.upscaler_config import UpscalerConfig
from sdonnx_runtime.request import FIELDS
from sdonnx_runtime.sampling.registry import A1111_NAMES, SAMPLERS
from sdonnx_runtime.sampling.sigmas import SCHEDULES
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import sdonnx
from sdonnx.server.context import context_of
from sdonnx.server.library import Library, ServedPackage


async def models(request: Request) -> Response:
    """List the packages after reading the folders again: ``{"version", "models": [model…], "vaes", "controls",
    "ip_adapters", "upscalers"}``.

    A model has ``name``, ``title`` (the name with its digest), ``family``, ``default`` and ``loaded`` (booleans),
    ``defaults`` (width, height, num_inference_steps, guidance_scale, sampler, and enlarge, the factor by which the
    command line saves its images larger), ``fast`` (fields of a job that trade quality for speed), ``preview`` (whether
    it has them), ``multiple`` (of its sides, pixels), ``tasks`` and ``requires`` (image fields). A VAE has ``name`` and
    ``title``, a control also ``kind`` and ``description``, an IP-Adapter ``description``, an upscaler ``scale``.
    """
    context = context_of(request)
    await asyncio.to_thread(context.library.refresh)
    return JSONResponse(await asyncio.to_thread(_describe_packages, context.library))


async def fields(request: Request) -> Response:
    """List a job's fields and this server's limits: ``{"fields": {name: field}, "limits"}``.

    A field has ``help``, ``default``, ``range`` (``[low, high]`` of a number) and ``choices`` (of a text); each of them
    may be null. The limits are ``steps``, ``images``, ``pixels``, ``prompt`` (characters) and ``body`` (bytes).
    """
    settings = context_of(request).settings
    limits = {
        "steps": settings.max_steps,
        "images": settings.max_images,
        "pixels": settings.max_pixels,
        "prompt": settings.max_prompt,
        "body": settings.max_body,
    }
    described = {name: _describe_field(name) for name in FIELDS}
    upscalers = [each.name for each in context_of(request).library.upscalers]
    described["hires_upscaler"]["choices"] = [*UPSCALERS, *upscalers]
    return JSONResponse({"fields": described, "limits": limits})


async def samplers(_: Request) -> Response:
    """List the samplers: ``{"samplers": [{"name", "title"}…]}``, the title as AUTOMATIC1111 has it."""
    return JSONResponse({"samplers": [{"name": each, "title": A1111_NAMES[each]} for each in SAMPLERS]})


async def schedules(_: Request) -> Response:
    """List the sigma schedules: ``{"schedules": [{"name", "title"}…]}``, the title as AUTOMATIC1111 has it."""
    return JSONResponse({"schedules": [{"name": each, "title": A1111_SCHEDULES[each]} for each in SCHEDULES]})


async def loras(request: Request) -> Response:
    """List the LoRAs that prompts may name: ``{"loras": [{"name", "tag"}…]}``, the tag for a prompt."""
    context = context_of(request)
    paths = await asyncio.to_thread(context.library.loras)
    return JSONResponse({"loras": [{"name": each.stem, "tag": f"<lora:{each.stem}:1>"} for each in paths]})


async def styles(request: Request) -> Response:
    """List the styles that jobs may name: ``{"styles": [{"name", "prompt", "negative_prompt"}…]}``."""
    found = await asyncio.to_thread(context_of(request).library.styles)
    return JSONResponse({"styles": [dataclasses.asdict(each) for each in found]})


async def embeddings(request: Request) -> Response:
    """List the textual inversions: ``{"embeddings": [{"name", "word"}…]}``, the word for a prompt."""
    context = context_of(request)
    return JSONResponse({"embeddings": await asyncio.to_thread(_describe_embeddings, context.library)})


def _describe_packages(library: Library) -> dict[str, Any]:
    return {
        "version": version("sdonnx"),
        "models": [_describe_model(each, library) for each in library.models],
        "vaes": [{"name": each.name, "title": each.title} for each in library.vaes],
        "controls": [
            {
                "name": each.name,
                "title": each.title,
                "kind": each.package.kind.value,
                "description": describe_control(each.package),
            }
            for each in library.controls
        ],
        "ip_adapters": [
            {"name": each.name, "title": each.title, "description": describe_ip_adapter(each.package)}
            for each in library.ip_adapters
        ],
        "upscalers": [
            {"name": each.name, "title": each.title, "scale": UpscalerConfig.read(each.package.root).scale}
            for each in library.upscalers
        ],
    }


def _describe_model(model: ServedPackage, library: Library) -> dict[str, Any]:
    manifest, loaded = model.package.manifest, library.loaded
    defaults, concat = manifest.defaults, manifest.conditions.concat
    required = [] if concat is None or CONCAT[concat].repaints_all else list(CONCAT[concat].images)
    return {
        "name": model.name,
        "title": model.title,
        "family": model.package.title,
        "default": model == library.default,
        "loaded": loaded is not None and loaded.model == model.name,
        "defaults": {
            "width": defaults.sides[0],
            "height": defaults.sides[1],
            "num_inference_steps": defaults.num_inference_steps,
            "guidance_scale": defaults.guidance_scale,
            "sampler": defaults.sampler,
            "enlarge": defaults.enlarge,
        },
        "fast": dict(model.fast),
        "preview": manifest.latents.preview is not None and library.settings.safety in ("off", "mark"),
        "multiple": manifest.latents.downscale,
        "tasks": _tasks(manifest),
        "requires": required,
    }


def _describe_field(name: str) -> dict[str, Any]:
    field, is_number = FIELDS[name], FIELDS[name].kind in (int, float) and not FIELDS[name].many
    return {
        "help": field.help,
        "default": _DEFAULTS[name],
        "range": field.ranges[0] if is_number and field.ranges else None,
        "choices": field.choices or None,
    }


_DEFAULTS = {each.name: each.default for each in dataclasses.fields(sdonnx.Request)} | {"prompt": ""}
"""A job without a prompt has an empty one."""


def _tasks(manifest: Manifest) -> list[str]:
    """Of ``text-to-image``, ``image-to-image``, ``inpainting``, and the kind of a model with extra input channels."""
    kind = manifest.conditions.concat
    concat = None if kind is None else CONCAT[kind]
    tasks = ["text-to-image"] if concat is None or concat.repaints_all else []
    if "vae_encoder" in manifest.components and (concat is None or concat.img2img is not None):
        tasks += ["image-to-image", "inpainting"]
    return tasks if kind is None or kind in tasks else [*tasks, kind]


def _describe_embeddings(library: Library) -> list[dict[str, str]]:
    found = list[dict[str, str]]()
    for path in library.embeddings():
        try:
            found.append({"name": path.stem, "word": read_embedding(path).word})
        except sdonnx.SdonnxError:
            continue
    return found
