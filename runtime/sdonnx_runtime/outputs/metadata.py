"""Pictures: from the decoder's values to PIL, and to a file that carries its recipe."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.outputs.atomic import replacing
from sdonnx_runtime.request import Request, for_image, generation_parameters
from sdonnx_runtime.result import Result
from sdonnx_runtime.sampling.registry import A1111_NAMES


def parameters_text(
    request: Request,
    model: str,
    *,
    vae: str | None = None,
    refiner: str | None = None,
    loras: Sequence[Lora] = (),
    controls: Sequence[str] = (),
) -> str:
    """The recipe in AUTOMATIC1111's ``parameters`` format, where adapters are told in the prompt."""
    sampler = request.sampler or ""
    settings = {
        "Steps": request.num_inference_steps,
        "Sampler": A1111_NAMES.get(sampler, sampler),
        **({} if request.schedule is None else {"Schedule type": _A1111_SCHEDULES[request.schedule]}),
        "CFG scale": f"{request.guidance_scale:g}",
        **_edited(request),
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        **_read(request),
        **_varied(request),
        **_reworked(request),
        **_masked(request),
        "Model": _quoted(model),
        **({} if vae is None else {"VAE": _quoted(vae)}),
        **({} if refiner is None else {"Refiner": _quoted(refiner), "Refiner switch at": request.refiner_start}),
        **_controlled(request, controls),
        "Version": "sdonnx",
    }
    lines = [" ".join([request.prompt, *(f"<lora:{lora.path.stem}:{lora.scale:g}>" for lora in loras)])]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return "\n".join(lines)


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False) if set(name) & set(',:"\n') else name


def _read(request: Request) -> dict[str, str | int]:
    """How the prompts were read; what AUTOMATIC1111 would do is left out."""
    settings: dict[str, str | int] = {} if request.clip_skip is None else {"Clip skip": request.clip_skip}
    if request.prompt_syntax == "plain":
        settings["Emphasis"] = "None"
    if request.weighting != "a1111":
        settings["Weighting"] = request.weighting
    return settings


def _controlled(request: Request, names: Sequence[str]) -> dict[str, str]:
    """As A1111's extension for ControlNets writes them."""
    return {
        f"ControlNet {index}": _quoted(
            f"Model: {name}, Weight: {control.scale:g}, "
            f"Guidance Start: {control.start:g}, Guidance End: {control.end:g}"
        )
        for index, (name, control) in enumerate(zip(names, request.controls, strict=True))
    }


def _varied(request: Request) -> dict[str, str]:
    if request.variation is None:
        return {}
    seed, strength = request.variation
    return {"Variation seed": str(seed), "Variation seed strength": f"{strength:g}"}


def _edited(request: Request) -> dict[str, str]:
    scale = request.image_guidance_scale
    return {} if scale is None else {"Image CFG scale": f"{scale:g}"}


def _masked(request: Request) -> dict[str, str | int]:
    if request.mask_image is None:
        return {}
    settings: dict[str, str | int] = {"Mask blur": request.mask_blur}
    if request.padding_mask_crop is not None:
        settings |= {"Inpaint area": "Only masked", "Masked area padding": request.padding_mask_crop}
    return settings


def _reworked(request: Request) -> dict[str, str | int]:
    """A text's second pass has its strength where a picture's first has it."""
    strength = request.hires_strength if request.strength is None else request.strength
    settings: dict[str, str | int] = {} if strength is None else {"Denoising strength": f"{strength:g}"}
    if request.hires_scale is None:
        return settings
    return {
        **settings,
        "Hires upscale": f"{request.hires_scale:g}",
        "Hires steps": request.hires_steps or request.num_inference_steps or 0,
        "Hires upscaler": (request.hires_upscaler or "").capitalize(),
    }


_A1111_SCHEDULES = {
    "ays": "Align Your Steps",
    "ays_sdxl": "Align Your Steps",
    "beta": "Beta",
    "exponential": "Exponential",
    "karras": "Karras",
    "lu": "Lu",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
}


def save_png(result: Result, index: int, path: Path, *, enlarge: int = 1) -> None:
    """Writes image ``index`` of a result, with its recipe as ``parameters`` (A1111) and ``sdonnx`` (JSON) chunks.

    The file appears whole or not at all.

    Args:
        result: what a generation gave.
        index: which of its images.
        path: the file, a .png.
        enlarge: how many times wider and higher to save it (Lanczos); the recipe keeps the size it was made in.

    Raises:
        SdonnxError: the place can't be written to.
    """
    info = PngInfo()
    request = for_image(result.request, index)
    named = {"vae": result.vae, "refiner": result.refiner}
    text = parameters_text(request, result.model, **named, loras=result.loras, controls=result.controls)
    info.add_text("parameters", text)
    others = {
        **named,
        "loras": [{"name": lora.path.stem, "scale": lora.scale} for lora in result.loras],
        "controls": [
            {"name": name, "scale": each.scale, "start": each.start, "end": each.end}
            for name, each in zip(result.controls, request.controls, strict=True)
        ],
    }
    data = {
        **generation_parameters(request),
        "model": result.model,
        **{kind: name for kind, name in others.items() if name},
    }
    info.add_text("sdonnx", json.dumps(data, ensure_ascii=False))
    with replacing(path) as stream:
        image = result.images[index]
        if enlarge > 1:
            image = image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.LANCZOS)
        image.save(stream, format="PNG", pnginfo=info)


def save_preview(path: Path, preview: Image.Image, size: tuple[int, int]) -> None:
    """Writes what `Progress.preview` gave, in the size that is worked in; whole or not at all.

    Args:
        path: the file, a .png.
        preview: in that size, or one pixel for each latent cell.
        size: width and height, pixels.

    Raises:
        SdonnxError: the place can't be written to.
    """
    shown = preview.resize(size)
    with replacing(path) as stream:
        shown.save(stream, format="PNG")
