"""The declaration of a request's field: its range, its names elsewhere and its help."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType, NoneType
from typing import Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """The one source for checks, PNG text, batch files, the command line and docs.

    Fields that one option sets (``--size WxH``) all name it; the first has its metavar and help, and a parser in
    `sdonnx.cli.parsing` returns the values by field. An option with a slash, ``--paste/--no-paste``, is a flag.
    """

    help: str
    """One sentence for the command line."""
    ranges: tuple[tuple[float, float], ...] = ()
    """The lowest and highest value: of the number, or of each number of a tuple."""
    choices: tuple[str, ...] = ()
    """The values of a str; empty where it is free."""
    infotext: str | None = None
    """Its name in AUTOMATIC1111's ``parameters`` text; None leaves it out."""
    option: str | None = None
    """The command-line option; None where there is none."""
    metavar: str | None = None
    """The placeholder of the option's value."""
    panel: str | None = None
    """The panel of ``--help``; None is the general one."""
    kind: type = str
    """The type of the value, or of the numbers in a tuple of any length."""
    items: tuple[type, ...] = ()
    """The types of the values in a tuple of fixed length."""
    many: bool = False
    """Whether it is a tuple of any length."""
    optional: bool = False
    """Whether it may be None."""


def spec(
    text: str,
    *ranges: tuple[float, float],
    choices: tuple[str, ...] = (),
    infotext: str | None = None,
    cli: str = "",
    panel: str | None = None,
) -> Mapping[str, FieldSpec]:
    """Make the metadata of a `dataclasses.field`; ``text`` is the help, ``cli`` the option and its metavar."""
    name, _, metavar = cli.partition(" ")
    metavar = metavar or "|".join(choices)
    names: dict[str, Any] = {"infotext": infotext, "option": name or None, "metavar": metavar or None, "panel": panel}
    return {"spec": FieldSpec(help=text, ranges=ranges, choices=choices, **names)}


def option(default: Any, text: str, *ranges: tuple[float, float], **names: Any) -> Any:
    """Declare a field with a default and a `spec`."""
    return field(default=default, metadata=spec(text, *ranges, **names))


def field_specs(data: type[Any]) -> Mapping[str, FieldSpec]:
    """The `FieldSpec` of each field of a dataclass, by name, in its order."""
    hints = get_type_hints(data)
    return MappingProxyType({item.name: _set_type(item.metadata["spec"], hints[item.name]) for item in fields(data)})


def _set_type(each: FieldSpec, hint: Any) -> FieldSpec:
    optional = NoneType in get_args(hint)
    kind = next(arg for arg in get_args(hint) if arg is not NoneType) if optional else hint
    if get_origin(kind) is not tuple:
        return replace(each, kind=kind, optional=optional)
    items = get_args(kind)
    if Ellipsis in items:
        return replace(each, kind=items[0], many=True, optional=optional)
    return replace(each, kind=tuple, items=items, optional=optional)
