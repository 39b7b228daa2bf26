"""The parameters of OpenAI's images API: their types and ranges, and the `Request` fields that they set."""

import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sdonnx_runtime.files.json_file import whole_numbers
from sdonnx_runtime.request import FIELDS
from sdonnx_runtime.sampling.registry import resolve_sampler

import sdonnx
from sdonnx.server.errors import TooLarge
from sdonnx.server.images import FORMATS
from sdonnx.server.openai.errors import ApiError
from sdonnx.server.requests import parse_object

_MAX_PROMPT = 32_000
"""Characters, as at OpenAI."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter, in JSON or as the text of a form."""

    kind: type
    default: Any = None
    limits: tuple[float, float] = (0, 0)
    """The lowest and highest value of a number."""
    choices: tuple[str, ...] = ()
    """The values of a text; empty where it is free."""
    field: str | None = None
    """The field of `Request` that it sets."""


def _of(field: str) -> Parameter:
    spec = FIELDS[field]
    return Parameter(kind=spec.kind, limits=spec.ranges[0] if spec.ranges else (0, 0), field=field)


_QUALITIES = ("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd")

PARAMETERS: Mapping[str, Parameter] = {
    "prompt": _of("prompt"),
    "model": Parameter(kind=str),
    "n": Parameter(kind=int, default=1, limits=(1, 10), field="num_images"),
    "size": Parameter(kind=str, default="auto"),
    "quality": Parameter(kind=str, default="auto", choices=_QUALITIES),
    "background": Parameter(kind=str, default="auto", choices=("auto", "opaque", "transparent")),
    "response_format": Parameter(kind=str, choices=("b64_json", "url")),
    "output_format": Parameter(kind=str, default="png", choices=tuple(FORMATS)),
    "output_compression": Parameter(kind=int, default=100, limits=(0, 100)),
    "moderation": Parameter(kind=str, default="auto", choices=("auto", "low")),
    "stream": Parameter(kind=bool, default=False),
    "partial_images": Parameter(kind=int, default=0, limits=(0, 3)),
    "seed": _of("seed"),
    "steps": _of("num_inference_steps"),
    "cfg_scale": _of("guidance_scale"),
    "negative_prompt": _of("negative_prompt"),
    "sampler": _of("sampler"),
    "strength": _of("strength"),
}
"""What is read; the last six are not OpenAI's. ``moderation`` has no effect: the server's --safety decides."""

_NAMES = {each.field: name for name, each in PARAMETERS.items()} | {"width": "size", "height": "size"}
"""The parameters by the fields of `Request` that they set."""


class FormText(str):
    """A text of a form, which stands for a number or a boolean too."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class ImageParameters:
    """The checked parameters of a request."""

    model: str | None
    fields: Mapping[str, Any] = field(repr=False)
    """Of the `Request`."""
    quality: str
    response_format: str
    output_format: str
    output_compression: int
    stream: bool
    partial_images: int


def parse_body(body: bytes) -> dict[str, Any]:
    """Parse a body that is a JSON object; raises ApiError, or TooLarge."""
    try:
        return parse_object(body)
    except TooLarge:
        raise
    except sdonnx.RequestError as error:
        raise ApiError(str(error), code="invalid_json") from None


def read_parameters(data: Mapping[str, Any], *, needs_prompt: bool = True) -> ImageParameters:
    """Read the parameters of a JSON object, or of a form's texts; unknown ones are ignored.

    Raises:
        ApiError: one is missing, of a wrong type or out of its range.
    """
    if needs_prompt and data.get("prompt") is None:
        raise ApiError("prompt is missing; give a text", param="prompt", code="missing_required_parameter")
    values = {name: _read(name, data.get(name)) for name in PARAMETERS}
    if values["background"] == "transparent":
        raise ApiError("background transparent is not supported; choose opaque or auto", param="background")
    if values["sampler"] is not None:
        with naming("sampler"):
            resolve_sampler(values["sampler"])
    fields = {each.field: values[name] for name, each in PARAMETERS.items() if each.field and values[name] is not None}
    return ImageParameters(
        model=values["model"],
        fields={"prompt": "", **fields, **_read_size(values["size"])},
        quality=values["quality"],
        response_format=values["response_format"] or _default_response_format(values["model"]),
        output_format=values["output_format"],
        output_compression=values["output_compression"],
        stream=values["stream"],
        partial_images=values["partial_images"],
    )


@contextmanager
def naming(param: str | None = None) -> Generator[None, None, None]:
    """Name the parameter in a `RequestError`: this one, or that of the field with which the message begins."""
    try:
        yield
    except sdonnx.RequestError as error:
        if type(error) is not sdonnx.RequestError:  # one that has a status of its own
            raise
        raise ApiError(str(error), param=param or _NAMES.get(str(error).partition(" ")[0])) from None


def _read(name: str, value: Any) -> Any:
    parameter = PARAMETERS[name]
    if value is None or (value == "" and parameter.field not in ("prompt", "negative_prompt")):
        return parameter.default
    return _READERS[parameter.kind](name, value, parameter)


def _read_text(name: str, value: Any, parameter: Parameter) -> str:
    if not isinstance(value, str):
        raise ApiError(f"{name} is {value!r:.80}; give a text", param=name, code="invalid_type")
    if parameter.choices and value not in parameter.choices:
        raise ApiError(f"{name} is {value!r:.80}; choose {', '.join(parameter.choices)}", param=name)
    if len(value) > _MAX_PROMPT:
        raise ApiError(f"{name} has {len(value)} characters; the maximum is {_MAX_PROMPT}", param=name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ApiError(f"{name} is not valid Unicode; give UTF-8", param=name) from None
    return str(value)


def _read_boolean(name: str, value: Any, _: Parameter) -> bool:
    if isinstance(value, FormText):
        value = {"true": True, "false": False}.get(value.lower(), value)
    if not isinstance(value, bool):
        raise ApiError(f"{name} is {value!r:.80}; give true or false", param=name, code="invalid_type")
    return value


def _read_number(name: str, value: Any, parameter: Parameter) -> int | float:
    if isinstance(value, FormText):
        value = _parse_number(value)
    number = whole_numbers(value) if isinstance(value, float) else value
    low, high = parameter.limits
    is_number = isinstance(number, (int, parameter.kind)) and not isinstance(number, bool)
    if not is_number or not low <= number <= high:
        whole = "whole " * (parameter.kind is int)
        code = "invalid_value" if is_number else "invalid_type"
        raise ApiError(f"{name} is {value!r:.80}; give a {whole}number from {low} to {high}", param=name, code=code)
    return number


def _parse_number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _default_response_format(model: str | None) -> str:
    """As at OpenAI: DALL-E's was url, and tools for it read nothing else; all others have base64."""
    return "url" if model is not None and model.lower().startswith("dall-e-") else "b64_json"


_READERS: Mapping[type, Callable[[str, Any, Parameter], Any]] = {
    str: _read_text,
    bool: _read_boolean,
    int: _read_number,
    float: _read_number,
}


def _read_size(text: str) -> dict[str, int]:
    """Width and height; neither where the package chooses them."""
    if text == "auto":
        return {}
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if match is None:
        raise ApiError(f"size is {text!r:.80}; give WIDTHxHEIGHT, such as 512x512, or auto", param="size")
    return {"width": int(match[1]), "height": int(match[2])}
