"""Options that commands share, and options made from the metadata of the request's fields."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import typer
from PIL.Image import Image
from rich.markup import escape
from sdonnx_runtime.execution.devices.table import DEVICES, check_name
from sdonnx_runtime.images.preprocess import open_image
from sdonnx_runtime.request import FIELDS, Request

from sdonnx.cli.parsing import decode_argument, parse_hires, parse_interval, parse_numbers, parse_size, parse_variation


def _check_device(name: str) -> str:
    check_name(name)
    return name


Device: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="|".join(("auto", *DEVICES)),
        callback=_check_device,
        help="Execution device; auto: the first that can run the package; cuda:1: a second GPU. sdonnx info lists all.",
    ),
]
Compute: TypeAlias = Annotated[
    Literal["auto", "f32", "bf16", "f16"],
    typer.Option(
        help="What the device computes in: f32 gives diffusers' image; openvino also has bf16 or f16, which are faster."
    ),
]
Cache: TypeAlias = Annotated[
    bool,
    typer.Option("--cache/--no-cache", help="Keep the graphs that openvino compiles on disk; they open faster then."),
]
Threads: TypeAlias = Annotated[
    int | None, typer.Option(metavar="N", help="CPU threads. Default: number of physical cores.")
]
Memory: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="SIZE|auto|max|min",
        help="Memory limit, e.g. 2GB; auto: the free memory; max: keep everything loaded; min: as little as possible.",
    ),
]
Vae: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="PACKAGE", help="Use the VAE of this package (a VAE-only package works too)."),
]
Provenance: TypeAlias = Annotated[
    bool,
    typer.Option("--provenance/--no-provenance", help="Say in XMP (IPTC) that the image is AI-generated."),
]
SafetyMode: TypeAlias = Annotated[
    Literal["off", "mark", "blur", "refuse"],
    typer.Option(
        help="What is done with images that a safety checker flags, see docs/safety.md; blur and refuse hide previews."
    ),
]

SERVERS = "Other machines"
"""A panel of the help."""

_PARSERS: Mapping[str, Callable[[str], Mapping[str, Any]]] = {
    "size": parse_size,
    "variation": parse_variation,
    "hires": parse_hires,
    "guidance_interval": parse_interval,
}
"""Options that are parsed to several values, by parameter name."""


def _parameter_name(option: str) -> str:
    """Return the parameter of ``--paste/--no-paste``: paste."""
    return option.partition("/")[0].removeprefix("--").replace("-", "_")


def _option_fields() -> dict[str, str]:
    """Return the first field that each option sets, by parameter name."""
    names: dict[str, str] = {}
    for name, spec in FIELDS.items():
        if spec.option is not None:
            names.setdefault(_parameter_name(spec.option), name)
    return names


_FIELDS = _option_fields()


def request_option(name: str) -> Any:
    """Make the typer option of a field of `Request`, for ``Annotated``; its default is to be None."""
    spec, (default,) = FIELDS[name], (item.default for item in fields(Request) if item.name == name)
    shown = default not in (None, False, "", ())
    text = f"{spec.help} Default: {'on' if default is True else default}." if shown else spec.help
    return typer.Option(spec.option, metavar=spec.metavar, help=escape(text), rich_help_panel=spec.panel)


def _parameter(parameter: str, name: str) -> inspect.Parameter:
    spec = FIELDS[name]
    kind: Any = str if parameter in _PARSERS or spec.many else Path if spec.kind is Image else spec.kind
    annotation = Annotated[kind | None, request_option(name)]
    return inspect.Parameter(parameter, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)


Command = TypeVar("Command", bound=Callable[..., None])


def add_request_options(*, after: str) -> Callable[[Command], Command]:
    """Decorate a command with the options of all fields of `Request` that it does not declare itself.

    The command takes them as ``**options``, by parameter name; an option that is not given is None.
    ``--help`` lists them after the parameter ``after``.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        index = list(signature.parameters).index(after) + 1
        added = [_parameter(each, _FIELDS[each]) for each in _FIELDS if each not in signature.parameters]
        command.__signature__ = signature.replace(  # pyright: ignore[reportFunctionMemberAccess]
            parameters=[*own[:index], *added, *own[index:]]
        )
        return command

    return decorate


def parse_request(options: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the options of `add_request_options` to fields of `Request`, and open the image files.

    Raises:
        RequestError: an option has another form, or an image can't be read.
    """
    values: dict[str, Any] = {}
    for parameter, value in options.items():
        name = _FIELDS[parameter]
        if value is None:
            continue
        if parameter in _PARSERS:
            values |= _PARSERS[parameter](value)
        elif FIELDS[name].many:
            values[name] = parse_numbers(parameter, value)
        elif FIELDS[name].kind is Image:
            values[name] = open_image(value)
        else:
            values[name] = decode_argument(value) if isinstance(value, str) else value
    return values
