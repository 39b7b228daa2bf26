"""The fields of AUTOMATIC1111's requests, with its names, types and defaults; unknown ones are ignored."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import sdonnx
from sdonnx.server.a1111.errors import Unprocessable
from sdonnx.server.errors import TooLarge
from sdonnx.server.requests import parse_object

F = TypeVar("F", bound="Form")


@dataclass(frozen=True, kw_only=True)
class Form:
    """A request's body; a field that is left out or null has its default."""

    given: frozenset[str] = frozenset()
    """The fields that are not left out."""

    @property
    def values(self) -> dict[str, Any]:
        """Every field of the body, for JSON."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "given"}


@dataclass(frozen=True, kw_only=True)
class Generate(Form):
    """The fields that ``txt2img`` and ``img2img`` share; None is the package's default."""

    prompt: str = ""
    negative_prompt: str = ""
    styles: list[Any] = field(default_factory=list[Any])
    seed: int = -1
    subseed: int = -1
    subseed_strength: float = 0.0
    seed_resize_from_h: int = -1
    seed_resize_from_w: int = -1
    batch_size: int = 1
    n_iter: int = 1
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    eta: float | None = None
    s_churn: float | None = None
    s_tmin: float | None = None
    s_tmax: float | None = None
    s_noise: float | None = None
    denoising_strength: float = 0.75
    clip_skip: int | None = None
    refiner_checkpoint: str | None = None
    refiner_switch_at: float | None = None
    restore_faces: bool = False
    tiling: bool = False
    override_settings: dict[str, Any] = field(default_factory=dict[str, Any])
    override_settings_restore_afterwards: bool = True
    script_name: str | None = None
    script_args: list[Any] = field(default_factory=list[Any])
    alwayson_scripts: dict[str, Any] = field(default_factory=dict[str, Any])
    lora: list[Any] = field(default_factory=list[Any])
    """stable-diffusion.cpp's."""
    send_images: bool = True
    save_images: bool = False
    infotext: str | None = None
    force_task_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class TextToImage(Generate):
    """The body of ``txt2img``."""

    enable_hr: bool = False
    hr_scale: float = 2.0
    hr_upscaler: str | None = None
    hr_second_pass_steps: int = 0
    hr_resize_x: int = 0
    hr_resize_y: int = 0
    hr_checkpoint_name: str | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str = ""
    hr_negative_prompt: str = ""
    hr_cfg: float | None = None
    firstphase_width: int = 0
    firstphase_height: int = 0


@dataclass(frozen=True, kw_only=True)
class ImageToImage(Generate):
    """The body of ``img2img``."""

    init_images: list[Any] | None = None
    include_init_images: bool = False
    resize_mode: int = 0
    image_cfg_scale: float | None = None
    initial_noise_multiplier: float | None = None
    mask: str | None = None
    mask_blur: int = 4
    inpainting_fill: int = 0
    inpaint_full_res: bool = True
    inpaint_full_res_padding: int = 0
    inpainting_mask_invert: int = 0


@dataclass(frozen=True, kw_only=True)
class Extras(Form):
    """The body of ``extra-single-image`` and ``extra-batch-images``."""

    image: str = ""
    imageList: list[Any] = field(default_factory=list[Any])  # noqa: N815 — their names
    image_list: list[Any] = field(default_factory=list[Any])
    """The npm client's name of it."""
    resize_mode: int = 0
    upscaling_resize: float = 2.0
    upscaling_resize_w: int = 512
    upscaling_resize_h: int = 512
    upscaling_crop: bool = True
    upscaler_1: str = "None"
    upscaler_2: str = "None"
    extras_upscaler_2_visibility: float = 0.0
    gfpgan_visibility: float = 0.0
    codeformer_visibility: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PngInfo(Form):
    """The body of ``png-info``."""

    image: str = ""


@dataclass(frozen=True, kw_only=True)
class TaskProgress(Form):
    """The body of ``/internal/progress``."""

    id_task: str = ""
    id_live_preview: int = -1
    live_preview: bool = True


@dataclass(frozen=True, kw_only=True)
class Detect(Form):
    """The body of ``/controlnet/detect``."""

    controlnet_module: str = "none"
    controlnet_input_images: list[Any] = field(default_factory=list[Any])
    controlnet_images: list[Any] = field(default_factory=list[Any])
    """webuiapi's name of it."""
    controlnet_processor_res: int = 512
    controlnet_threshold_a: float = -1.0
    controlnet_threshold_b: float = -1.0


@dataclass(frozen=True, kw_only=True)
class Unit(Form):
    """A unit of ControlNet: one entry of its script's ``args``."""

    enabled: bool = True
    image: Any = None
    input_image: Any = None
    model: str = "None"
    module: str = "none"
    weight: float = 1.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    guidance: float | None = None
    """An older name of ``guidance_end``."""
    resize_mode: Any = 1
    control_mode: Any = 0
    guessmode: bool = False
    pixel_perfect: bool = False
    processor_res: int = -1
    threshold_a: float = -1.0
    threshold_b: float = -1.0
    hr_option: Any = "Both"
    effective_region_mask: Any = None


def parse_body(body: bytes) -> dict[str, Any]:
    """Parse a body that is a JSON object; raises Unprocessable, or TooLarge."""
    try:
        return parse_object(body)
    except TooLarge:
        raise
    except sdonnx.RequestError as error:
        raise Unprocessable(str(error)) from None


def read_form(kind: type[F], data: Mapping[str, Any], where: str = "") -> F:
    """Read a form's fields, with pydantic's kind conversions: ``"20"`` and 20.0 are an int.

    Args:
        kind: the form.
        data: a JSON object.
        where: begins the fields' names in errors.

    Raises:
        Unprocessable: a field has another type; the error names all such.
    """
    hints, values, wrong = get_type_hints(kind), dict[str, Any](), dict[str, str]()
    for each in fields(kind):
        if each.name == "given" or data.get(each.name) is None:
            continue
        expected = _plain_type(hints[each.name])
        try:
            values[each.name] = _CONVERT[expected](data[each.name])
        except (ValueError, TypeError, KeyError, OverflowError):
            wrong[f"{where}{each.name}"] = f"the value is not {_DESCRIBED[expected]}"
    if wrong:
        raise Unprocessable("; ".join(f"{name}: {text}" for name, text in wrong.items()), fields=wrong)
    return kind(given=frozenset(values), **values)


def _plain_type(hint: Any) -> Any:
    hint = next((each for each in get_args(hint) if each is not NoneType), hint) if NoneType in get_args(hint) else hint
    return get_origin(hint) or hint


def _to_int(value: Any) -> int:
    number = float(value) if isinstance(value, str) else value
    if not isinstance(number, (int, float)) or number != int(number) or abs(number) > _MAX_INT:
        raise TypeError
    return int(value) if isinstance(value, str) and value.strip().lstrip("+-").isdecimal() else int(number)


def _to_float(value: Any) -> float:
    if not isinstance(value, (int, float, str)):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _to_bool(value: Any) -> bool:
    return _BOOLS[value.strip().lower() if isinstance(value, str) else value]


def _only(kind: type) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value

    return convert


_MAX_INT = 2**63

_BOOLS: Mapping[Any, bool] = {
    **dict.fromkeys((True, "true", "on", "yes", "1"), True),
    **dict.fromkeys((False, "false", "off", "no", "0"), False),
}

_CONVERT: Mapping[Any, Callable[[Any], Any]] = {
    str: _only(str), int: _to_int, float: _to_float, bool: _to_bool, list: _only(list), dict: _only(dict),
    Any: lambda value: value,
}  # fmt: skip

_DESCRIBED: Mapping[Any, str] = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "an object"
}  # fmt: skip
