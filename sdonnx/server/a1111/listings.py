"""What can be chosen: models, VAEs, LoRAs, embeddings, upscalers; and the machine's memory."""

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdonnx_runtime.adapters.textual_inversion import read_embedding
from sdonnx_runtime.execution.process_memory import available_memory, resident_memory
from sdonnx_runtime.files.safetensors import open_safetensors
from sdonnx_runtime.packages.upscaler_config import UpscalerConfig
from starlette.requests import Request
from starlette.responses import Response

import sdonnx
from sdonnx.server.a1111.controlnet import IMAGE_PROMPTS, MODULES, control_types, model_list
from sdonnx.server.a1111.errors import AsciiJson, Handler
from sdonnx.server.a1111.options import current_options
from sdonnx.server.a1111.samplers import samplers, schedulers
from sdonnx.server.context import context_of
from sdonnx.server.library import Library, Selection
from sdonnx.server.upscaling import FILTERS

_SCRIPTS = ["controlnet", "controlnet m2m"]
"""webuiapi forgets the last call's ControlNet only where ``controlnet m2m`` is listed."""


def constant(content: Any) -> Handler:
    """A handler that always answers with the same."""

    async def handler(_: Request) -> Response:
        return AsciiJson(content)

    return handler


async def sd_models(request: Request) -> Response:
    """``GET /sd-models``."""
    models = _library(request).models
    return AsciiJson(
        [
            {
                "title": each.title,
                "model_name": each.name,
                "hash": each.digest[:10],
                "sha256": each.digest,
                "filename": each.name,
                "config": None,
            }
            for each in models
        ]
    )


async def sd_vaes(request: Request) -> Response:
    """``GET /sd-vae``."""
    return AsciiJson([{"model_name": each.name, "filename": each.name} for each in _library(request).vaes])


async def sd_modules(request: Request) -> Response:
    """``GET /sd-modules``: the same in Forge."""
    return await sd_vaes(request)


async def loras(request: Request) -> Response:
    """``GET /loras``."""
    return AsciiJson(await asyncio.to_thread(lambda: [_lora(path) for path in _library(request).loras()]))


async def prompt_styles(request: Request) -> Response:
    """``GET /prompt-styles``."""
    return AsciiJson([asdict(each) for each in await asyncio.to_thread(_library(request).styles)])


async def embeddings(request: Request) -> Response:
    """``GET /embeddings``: those that fit the current model, and the others."""
    library = _library(request)
    model = current_options(request).package(library).name
    return AsciiJson(await asyncio.to_thread(_embeddings, library, model))


async def upscalers(request: Request) -> Response:
    """``GET /upscalers``: of images, in extras and in hires fix."""
    packages = {each.name: each.package for each in _library(request).upscalers}
    scales = {name: UpscalerConfig.read(package.root).scale for name, package in packages.items()}
    return AsciiJson(
        [
            {
                "name": name,
                "model_name": packages[name].name if name in packages else None,
                "model_path": None,
                "model_url": None,
                "scale": float(scales.get(name, 4)),
            }
            for name in upscaler_names(_library(request))
        ]
    )


def upscaler_names(library: Library) -> list[str]:
    """The names of upscalers of images; ``None`` comes first, where SillyTavern looks for it."""
    return ["None", *(name.capitalize() for name in FILTERS), *(each.name for each in library.upscalers)]


async def memory(_: Request) -> Response:
    """``GET /memory``, in bytes."""
    free, used = available_memory() or 0, resident_memory()
    ram = {"free": free, "used": used, "total": free + used}
    return AsciiJson({"ram": ram, "cuda": {"error": "unavailable"}})


async def refresh(request: Request) -> Response:
    """``POST /refresh-…``: read the folders again."""
    await asyncio.to_thread(_library(request).refresh)
    return AsciiJson(None)


async def control_models(request: Request) -> Response:
    """``GET /controlnet/model_list``."""
    return AsciiJson({"model_list": model_list(_library(request))})


async def control_type_list(request: Request) -> Response:
    """``GET /controlnet/control_types``."""
    return AsciiJson({"control_types": control_types(_library(request))})


SCRIPTS: Any = {"txt2img": _SCRIPTS, "img2img": _SCRIPTS}

SCRIPT_INFO: Any = [
    {"name": "controlnet", "is_alwayson": True, "is_img2img": is_img2img, "args": []} for is_img2img in (False, True)
]

CONTROL_MODULES: Any = {"module_list": [*MODULES, *IMAGE_PROMPTS]}

SAMPLERS: Any = samplers()

SCHEDULERS: Any = schedulers()


def _library(request: Request) -> Library:
    return context_of(request).library


def _lora(path: Path) -> dict[str, Any]:
    try:
        metadata = dict(open_safetensors(path).metadata)
    except sdonnx.SdonnxError:
        metadata = {}
    return {
        "name": path.stem,
        "alias": metadata.get("ss_output_name", path.stem),
        "path": path.name,
        "metadata": metadata,
    }


def _embeddings(library: Library, model: str) -> dict[str, Any]:
    fitting = library.fitting_embeddings(library.planner(Selection(model=model)))
    found: dict[str, dict[str, Any]] = {"loaded": {}, "skipped": {}}
    for path in library.embeddings():
        try:
            embedding = read_embedding(path)
        except sdonnx.SdonnxError:
            continue
        vectors = next(iter(embedding.vectors.values()))
        found["loaded" if path in fitting else "skipped"][embedding.word] = {
            "step": None,
            "sd_checkpoint": None,
            "sd_checkpoint_name": None,
            "shape": vectors.shape[1],
            "vectors": vectors.shape[0],
        }
    return found
