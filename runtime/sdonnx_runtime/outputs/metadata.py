"""PNG files that carry the parameters of their image."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.errors import SafetyError
from sdonnx_runtime.images.grid import make_grid
from sdonnx_runtime.images.preprocess import UPSCALERS, open_image
from sdonnx_runtime.outputs.atomic import write_file
from sdonnx_runtime.outputs.provenance import XMP_KEY, read_xmp, xmp_packet
from sdonnx_runtime.request import (
    FIELDS,
    PACKAGE_FIELDS,
    CompleteRequest,
    Control,
    IPAdapter,
    generation_parameters,
)
from sdonnx_runtime.result import Result
from sdonnx_runtime.sampling.registry import A1111_NAMES

_TEXT_CHUNKS = ("parameters", "sdonnx")
"""A1111's infotext, and JSON."""

_COMPRESS_LEVEL = 4
"""Of zlib. At 6, Pillow's default, three photographs of 512x512 took 63, 89 and 119 ms instead of 39, 58 and 47, and
were up to 1.3 % smaller; drawings up to 3 % (Pillow 13.0 with zlib-ng on a Xeon)."""


def parameters_text(
    request: CompleteRequest,
    model: str,
    *,
    vae: str | None = None,
    refiner: str | None = None,
    loras: Sequence[Lora] = (),
    controls: Sequence[str] = (),
    ip_adapters: Sequence[str] = (),
    compute: str = "f32",
) -> str:
    """Write AUTOMATIC1111's ``parameters`` text (infotext), which has the LoRAs in the prompt."""
    values = _settings(request)
    settings = {
        FIELDS[key].infotext if key in FIELDS else key: each for key, each in values.items() if each is not None
    }
    settings |= {"Model": _quote(model)}
    settings |= {} if vae is None else {"VAE": _quote(vae)}
    if refiner is not None and request.refiner_start is not None:
        settings |= {"Refiner": _quote(refiner), FIELDS["refiner_start"].infotext: request.refiner_start}
    named = [*zip(controls, request.controls, strict=True), *zip(ip_adapters, request.ip_adapters, strict=True)]
    for index, (name, each) in enumerate(named):  # as A1111's extension
        module = "Module: ip-adapter-auto, " if index >= len(controls) else ""
        strength = f"Weight: {each.scale:g}, Guidance Start: {each.start:g}, Guidance End: {each.end:g}"
        settings[f"ControlNet {index}"] = _quote(f"{module}Model: {name}, {strength}")
    settings |= {} if compute == "f32" else {"Compute": compute}
    settings["Version"] = "sdonnx"
    lines = [" ".join([request.prompt, *(lora.tag for lora in loras)])]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    texts = {name: f"{value:g}" if isinstance(value, float) else value for name, value in settings.items()}
    lines.append(", ".join(f"{name}: {text}" for name, text in texts.items()))
    return "\n".join(lines)


def infotext(result: Result, index: int) -> str:
    """Write the ``parameters`` text of an image of a result."""
    return parameters_text(
        result.request.for_image(index),
        result.model,
        vae=result.vae,
        refiner=result.refiner,
        loras=result.loras,
        controls=result.controls,
        ip_adapters=result.ip_adapters,
        compute=result.compute,
    )


def _describe_lora(lora: Lora) -> dict[str, Any]:
    te = {} if lora.text_encoder_scale is None else {"text_encoder_scale": lora.text_encoder_scale}
    return {"name": lora.path.stem, "scale": lora.scale, **te}


def _describe_packages(names: Sequence[str], given: Sequence[Control | IPAdapter]) -> list[dict[str, Any]]:
    """Describe controls or IP-Adapters, without their images."""
    return [
        {"name": name, "scale": each.scale, "start": each.start, "end": each.end}
        for name, each in zip(names, given, strict=True)
    ]


def _quote(name: str) -> str:
    return json.dumps(name, ensure_ascii=False) if set(name) & set(',:"\n') else name


UPSCALER_SUFFIXES = (".pth", ".safetensors")
"""Ends of the names of upscalers' files, which AUTOMATIC1111 leaves out."""


def _upscaler_name(upscaler: str) -> str:
    if upscaler in UPSCALERS:
        return upscaler.capitalize()
    suffix = next((each for each in UPSCALER_SUFFIXES if upscaler.endswith(each)), "")
    return _quote(upscaler.removesuffix(suffix))


def _settings(request: CompleteRequest) -> dict[str, Any]:
    """Values by field, else by infotext name; None, also for AUTOMATIC1111's defaults, is left out."""
    seed, strength = request.variation or (None, None)
    hires, masked = request.hires_scale is not None, request.mask_image is not None
    padding = request.padding_mask_crop if masked else None
    values = {
        "num_inference_steps": request.num_inference_steps,
        "sampler": A1111_NAMES.get(request.sampler, request.sampler),
        "schedule": None if request.schedule is None else A1111_SCHEDULES[request.schedule],
        "guidance_scale": request.guidance_scale,
        "image_guidance_scale": request.image_guidance_scale,
        "seed": request.seed,
        "width": f"{request.width}x{request.height}",
        "tiling": "True" if request.tiling == "xy" else request.tiling,
        "clip_skip": request.clip_skip,
        "Emphasis": "None" if request.prompt_syntax == "plain" else None,
        "weighting": None if request.weighting == "a1111" else request.weighting,
        "variation": seed,
        "Variation seed strength": strength,
        "strength": request.hires_strength if request.strength is None else request.strength,
        "hires_scale": request.hires_scale,
        "hires_steps": request.hires_steps or request.num_inference_steps if hires else None,
        "hires_upscaler": None if request.hires_upscaler is None else _upscaler_name(request.hires_upscaler),
        "mask_blur": request.mask_blur if masked else None,
        "Inpaint area": None if padding is None else "Only masked",
        "padding_mask_crop": padding,
        "refiner_start": None,  # `parameters_text` has it
    }
    others = [name for name, each in FIELDS.items() if each.infotext is not None and name not in values]
    return values | {name: getattr(request, name) for name in others}


A1111_SCHEDULES = {
    "ays": "Align Your Steps", "ays_sdxl": "Align Your Steps", "beta": "Beta", "exponential": "Exponential",
    "karras": "Karras", "lu": "Lu", "sgm_uniform": "SGM Uniform", "simple": "Simple",
}  # fmt: skip
"""AUTOMATIC1111's names of the schedules."""


def save_png(
    result: Result, index: int, path: Path, *, enlarge: int = 1, overwrite: bool = True, provenance: bool = True
) -> Path:
    """Write an image of a result as PNG, with text chunks ``parameters`` (A1111's infotext) and ``sdonnx`` (JSON).

    The file appears whole or not at all.

    Args:
        result: the result.
        index: of the image.
        path: the file.
        enlarge: upscale the saved image so many times (Lanczos); the parameters keep the generated size.
        overwrite: replace an existing file; otherwise it stays and a number is appended to the name, also if other
            processes save at the same time.
        provenance: say in XMP that the image is AI-generated, see `provenance`.

    Returns:
        The file's path.

    Raises:
        SafetyError: the safety checker refuses the image.
        SdonnxError: the file can't be written.
    """
    info = _describe_image(result, index, provenance=provenance)
    image = _enlarge(result.images[index], enlarge)
    return write_file(path, lambda stream: _write_png(stream, image, info), overwrite=overwrite)


def encode_png(result: Result, index: int, *, enlarge: int = 1, provenance: bool = True) -> bytes:
    """Encode an image of a result as the content of a file of `save_png`; raises SafetyError as it does."""
    info = _describe_image(result, index, provenance=provenance)
    return _encode_image(_enlarge(result.images[index], enlarge), info)


def _encode_image(image: Image.Image, info: PngInfo) -> bytes:
    content = io.BytesIO()
    _write_png(content, image, info)
    return content.getvalue()


def _write_png(stream: IO[bytes], image: Image.Image, info: PngInfo | None = None) -> None:
    image.save(stream, format="PNG", pnginfo=info, compress_level=_COMPRESS_LEVEL)


def _describe_image(result: Result, index: int, *, provenance: bool) -> PngInfo:
    """The text chunks of an image of a result; raises SafetyError."""
    if index in result.refused:
        raise SafetyError(f"image {index + 1} of {len(result.images)} {result.safety[index]}; it is not saved")
    xmp = xmp_packet(result.request.for_image(index)) if provenance else None
    data = json.dumps(_image_json(result, index), ensure_ascii=False)
    return png_text({"parameters": infotext(result, index), "sdonnx": data}, xmp)


def _image_json(result: Result, index: int) -> dict[str, Any]:
    """What made an image of a result."""
    request = result.request.for_image(index)
    loras = [_describe_lora(lora) for lora in result.loras]
    packages = {field: _describe_packages(getattr(result, field), getattr(request, field)) for field in PACKAGE_FIELDS}
    others = {"vae": result.vae, "refiner": result.refiner, "loras": loras, **packages}
    others |= {"compute": None if result.compute == "f32" else result.compute}
    others |= {"safety": asdict(result.safety[index])} if result.safety else {}
    data = {**generation_parameters(request), "model": result.model}
    data |= {key: each for key, each in others.items() if each}
    return data | ({} if request.template is None else {"template": asdict(request.template)})


def png_text(texts: Mapping[str, str], xmp: str | None = None) -> PngInfo:
    """Make a PNG's text chunks, and its XMP packet."""
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    if xmp is not None:
        info.add_itxt(XMP_KEY, xmp)
    return info


def save_upscaled(
    image: Image.Image, path: Path, source: Image.Image, *, scale: float, model: str, compute: str = "f32",
    overwrite: bool = True,
) -> Path:  # fmt: skip
    """Write an upscaled image as PNG, with the text chunks of `save_png` that its source has.

    A chunk ``postprocessing`` says what was done, as A1111's. The file appears whole or not at all. Without
    ``overwrite``, an existing file stays and a number is appended to the name. Returns the path.

    Raises:
        SdonnxError: the file can't be written.
    """
    png = encode_upscaled(image, source, scale=scale, model=model, compute=compute)
    return write_file(path, lambda stream: stream.write(png), overwrite=overwrite)


def encode_upscaled(
    image: Image.Image, source: Image.Image, *, scale: float, model: str, compute: str = "f32"
) -> bytes:
    """Encode an upscaled image as the content of a file of `save_upscaled`."""
    info = _copy_texts(source)
    done = f"Postprocess upscale by: {scale:g}, Postprocess upscaler: {_quote(model)}"
    info.add_text("postprocessing", done if compute == "f32" else f"{done}, Postprocess compute: {compute}")
    return _encode_image(image, info)


def enlarge_png(png: bytes, factor: int) -> bytes:
    """Upscale the content of a file of `save_png`, which becomes what it would be with ``enlarge``."""
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        return _encode_image(_enlarge(image, factor), _copy_texts(image))


def save_grid(paths: Sequence[Path], path: Path, *, overwrite: bool = True) -> Path:
    """Write the grid of files of `save_png` as PNG, with the texts of the first; returns its path.

    Raises:
        RequestError: as `make_grid` does.
        SdonnxError: the file can't be written.
    """
    images = [open_image(each, formats=("PNG",)) for each in paths]
    grid, info = make_grid(images), _copy_texts(images[0])
    return write_file(path, lambda stream: _write_png(stream, grid, info), overwrite=overwrite)


def _copy_texts(image: Image.Image) -> PngInfo:
    """The texts of `save_png` that an image has, and its XMP packet."""
    texts = {key: text for key in _TEXT_CHUNKS if isinstance(text := image.info.get(key), str)}
    return png_text(texts, read_xmp(image))


def _enlarge(image: Image.Image, factor: int) -> Image.Image:
    if factor == 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)


def save_preview(path: Path, preview: Image.Image, size: tuple[int, int]) -> None:
    """Write a preview, resized to (width, height), as PNG; raises SdonnxError if the file can't be written."""
    write_file(path, lambda stream: _write_png(stream, preview.resize(size)))
