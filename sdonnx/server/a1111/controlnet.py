"""The ControlNet extension's API: units of a request, and ``/controlnet``."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from PIL import Image
from sdonnx_runtime.images.canny import canny
from sdonnx_runtime.images.preprocess import flatten_alpha, resize_to_fit

import sdonnx
from sdonnx.server.a1111.errors import Unprocessable
from sdonnx.server.a1111.fields import Detect, Unit, read_form
from sdonnx.server.images import decode_image, encode_image
from sdonnx.server.library import Library
from sdonnx.server.settings import Settings

_FITS: Mapping[Any, str] = {
    0: "stretch", "Just Resize": "stretch", "Resize": "stretch",
    1: "crop", "Crop and Resize": "crop", "Scale to Fit (Inner Fit)": "crop", "Inner Fit (Scale to Fit)": "crop",
    2: "pad", "Resize and Fill": "pad", "Envelope (Outer Fit)": "pad", "Outer Fit (Shrink to Fit)": "pad",
}  # fmt: skip

_MODES: Mapping[Any, bool] = {0: False, "Balanced": False, 2: True, "ControlNet is more important": True}
"""Whether a control mode is the guess mode; "My prompt is more important" is not supported."""

MODULES: Mapping[str, Callable[[Image.Image, float, float], Image.Image]] = {
    "none": lambda image, low, high: image,
    "canny": lambda image, low, high: canny(image, _threshold(low, 100), _threshold(high, 200)),
}
"""The preprocessors, by name: of an image and its thresholds."""

IMAGE_PROMPTS = (
    "ip-adapter-auto", "ip-adapter_clip_h", "ip-adapter_clip_g", "ip-adapter_clip_sd15", "ip-adapter_clip_sdxl",
    "ip-adapter_clip_sdxl_plus_vith",
)  # fmt: skip
"""The extension's names for the image encoders of IP-Adapters; a package has its own."""


@dataclass(frozen=True, kw_only=True)
class Controls:
    """The controls of a request."""

    names: tuple[str, ...] = ()
    """Served names of their packages."""
    controls: tuple[sdonnx.Control, ...] = field(default=(), repr=False)
    guess: bool = False
    adapter_names: tuple[str, ...] = ()
    """Served names of the packages of IP-Adapters."""
    ip_adapters: tuple[sdonnx.IPAdapter, ...] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What control images are resized to."""

    size: tuple[int, int] | None
    """Width and height of the image to be; None leaves them to the model."""
    fit: str
    """How the request's image is resized."""
    image: Image.Image | None
    """The request's own, which stands for a unit's that is missing."""
    is_crop: bool
    """Whether only a part of the image is generated: control images then have the image's size."""
    max_pixels: int


def read_units(args: Sequence[Any], library: Library, target: Target) -> Controls:
    """Read the units of a request.

    Raises:
        NotFound: there is no such model.
        RequestError: a unit asks for what is not supported, or its image is not one.
    """
    forms = [read_form(Unit, cast("dict[str, Any]", each), "args.") for each in args if isinstance(each, dict)]
    units = [each for each in forms if each.enabled]
    if len(units) > (most := library.settings.max_controls):
        raise sdonnx.RequestError(f"{len(units)} ControlNet units are too many; give up to {most}")
    units, prompts = _split(units, library)
    modes = {_is_guess(unit) for unit in units}
    if len(modes) > 1:
        raise sdonnx.RequestError("the ControlNet units have different control modes; give all the same")
    return Controls(
        names=tuple(_model(unit, library) for unit in units),
        controls=tuple(_control(unit, target) for unit in units),
        guess=modes == {True},
        adapter_names=tuple(_model(unit, library) for unit in prompts),
        ip_adapters=tuple(_ip_adapter(unit, target) for unit in prompts),
    )


def _split(units: Sequence[Unit], library: Library) -> tuple[list[Unit], list[Unit]]:
    """Split units into those of controls and those whose model is an IP-Adapter."""
    adapters = {each.name for each in library.ip_adapters}
    controls, prompts = list[Unit](), list[Unit]()
    for unit in units:
        module, is_prompt = unit.module.strip().lower() or "none", _model(unit, library) in adapters
        (prompts if is_prompt else controls).append(unit)
        if is_prompt and module not in ("none", *IMAGE_PROMPTS):
            raise sdonnx.RequestError(
                f"the ControlNet module {module[:80]!r} is not for IP-Adapters; choose {', '.join(IMAGE_PROMPTS)}"
            )
        if module in IMAGE_PROMPTS and not is_prompt:
            raise sdonnx.RequestError(f"the ControlNet module {module!r} requires the model of an IP-Adapter; give one")
    return controls, prompts


def _ip_adapter(unit: Unit, target: Target) -> sdonnx.IPAdapter:
    _check(unit)
    return sdonnx.IPAdapter(image=_image(unit, target), scale=unit.weight, start=unit.guidance_start, end=_end(unit))


def _check(unit: Unit) -> None:
    if unit.effective_region_mask:
        raise sdonnx.RequestError("effective_region_mask is not supported; leave it out")
    if unit.hr_option not in ("Both", 0):
        raise sdonnx.RequestError("a ControlNet unit's hr_option is not supported; give Both")


def _end(unit: Unit) -> float:
    return unit.guidance_end if unit.guidance is None or "guidance_end" in unit.given else unit.guidance


def _control(unit: Unit, target: Target) -> sdonnx.Control:
    _check(unit)
    module, image = _module(unit.module), _image(unit, target)
    if module is not MODULES["none"]:
        image = _shrink(image, unit.processor_res if not unit.pixel_perfect else _perfect(image, target))
    image = module(image, unit.threshold_a, unit.threshold_b)
    return sdonnx.Control(
        image=_resize(image, unit, target),
        scale=unit.weight,
        start=unit.guidance_start,
        end=_end(unit),
    )


def _image(unit: Unit, target: Target) -> Image.Image:
    given = unit.image or unit.input_image
    if isinstance(given, dict):
        given = cast("dict[str, Any]", given).get("image")
    if not given and target.image is not None:
        return target.image
    if not given or not isinstance(given, str):
        raise sdonnx.RequestError("a ControlNet unit has no image; give it in base64")
    return decode_image(given, "a ControlNet unit's image", max_pixels=target.max_pixels)


def _resize(image: Image.Image, unit: Unit, target: Target) -> Image.Image:
    """Resize a control image as its unit says, where the model's own way would differ."""
    fit = _choice(_FITS, "resize_mode", unit.resize_mode)
    if target.is_crop and target.image is not None:
        return resize_to_fit(image, target.image.size, fit)
    if target.size is None or fit == target.fit or min(target.size) < 1:
        return image
    width, height = target.size
    is_alike = image.width * height == image.height * width
    return image if is_alike else resize_to_fit(image, target.size, fit)


def _shrink(image: Image.Image, side: int) -> Image.Image:
    """Scale down an image whose shorter side is longer than this; the extension's own is 512."""
    scale = (side if side > 0 else 512) / min(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(each * scale)) for each in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _perfect(image: Image.Image, target: Target) -> int:
    """The shorter side at which an image has as many pixels as the image to be."""
    size = target.size or image.size
    return round(max(size[0] / image.width, size[1] / image.height) * min(image.size))


def _model(unit: Unit, library: Library) -> str:
    if unit.model.lower() in ("", "none"):
        raise sdonnx.RequestError("a ControlNet unit has no model; give one of /controlnet/model_list")
    return library.find(unit.model, [*library.controls, *library.ip_adapters]).name


def _is_guess(unit: Unit) -> bool:
    return unit.guessmode or _choice(_MODES, "control_mode", unit.control_mode)


def _choice(table: Mapping[Any, Any], name: str, value: Any) -> Any:
    if not isinstance(value, (int, str)) or value not in table:
        supported = ", ".join(each for each in table if isinstance(each, str))
        raise sdonnx.RequestError(f"a ControlNet unit's {name} is {value!r:.80}; supported: {supported}")
    return table[value]


def _module(name: str) -> Callable[[Image.Image, float, float], Image.Image]:
    found = MODULES.get(name.strip().lower() or "none")
    if found is None:
        raise Unprocessable(f"there is no ControlNet module {name[:80]!r}; choose {', '.join(MODULES)}")
    return found


def _threshold(value: float, default: int) -> int:
    """A threshold of Canny's; negative ones are its own."""
    return default if value < 0 else int(min(value, 10_000))


def detect(form: Detect, settings: Settings) -> dict[str, Any]:
    """Preprocess images, as ``/controlnet/detect`` does; raises RequestError."""
    module, encoded = _module(form.controlnet_module), list[str]()
    images = form.controlnet_input_images or form.controlnet_images
    if not images:
        raise Unprocessable("there is no image; give controlnet_input_images")
    if len(images) > settings.max_controls:
        raise sdonnx.RequestError(f"{len(images)} images are too many; give up to {settings.max_controls}")
    for each in images:
        if not isinstance(each, str):
            raise Unprocessable("an image of controlnet_input_images is not a text; give it in base64")
        image = decode_image(each, "controlnet_input_images", max_pixels=settings.max_pixels)
        image = _shrink(image, form.controlnet_processor_res)
        found = module(image, form.controlnet_threshold_a, form.controlnet_threshold_b)
        encoded.append(base64.b64encode(encode_image(flatten_alpha(found), "png")).decode())
    return {"images": encoded, "info": "Success"}


def model_list(library: Library) -> list[str]:
    """The titles of the ControlNets, T2I-Adapters and IP-Adapters."""
    return [each.title for each in (*library.controls, *library.ip_adapters)]


def control_types(library: Library) -> dict[str, Any]:
    """The modules and models for each type of control, as ``/controlnet/control_types`` has them."""
    models = ["None", *model_list(library)]
    edges = [each for each in models if "canny" in each.lower()]
    adapters = [each.title for each in library.ip_adapters]
    prompts = _control_type(list(IMAGE_PROMPTS), ["None", *adapters], IMAGE_PROMPTS[0], [*adapters, "None"][0])
    return {
        "All": _control_type([*MODULES, *IMAGE_PROMPTS], models, "none", "None"),
        "Canny": _control_type(["canny", "none"], ["None", *edges], "canny", edges[0] if edges else "None"),
        "IP-Adapter": prompts,
    }


def _control_type(modules: list[str], models: list[str], module: str, model: str) -> dict[str, Any]:
    return {"module_list": modules, "model_list": models, "default_option": module, "default_model": model}
