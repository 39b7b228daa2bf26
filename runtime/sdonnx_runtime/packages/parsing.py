"""JSON to frozen dataclasses, with errors that name the place: the files we read come from strangers."""

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from sdonnx_runtime.errors import PackageError

T = TypeVar("T")


def parse(kind: type[T], data: Any, place: str) -> T:
    """``data`` as an instance of the dataclass ``kind``; ``place`` begins every message.

    Fields may be str, int, float, Any, dataclasses, ``X | None``, ``Mapping[str, X]`` and ``tuple[X, ...]``.

    Raises:
        PackageError: a key is missing or unknown, or a value has another type.
    """
    return cast("T", _value(kind, data, place))


def _value(kind: Any, data: Any, place: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if is_dataclass(kind):
        return _dataclass(cast("type[Any]", kind), data, place)
    if origin in (types.UnionType, Union):
        return None if data is None else _value(arguments[0], data, place)
    if origin is tuple:
        items = cast("list[Any]", _typed(list, data, place))
        return tuple(_value(arguments[0], item, f"{place}: {index}") for index, item in enumerate(items))
    if origin is Mapping:
        entries = cast("dict[str, Any]", _typed(dict, data, place))
        return {key: _value(arguments[1], item, f"{place}: '{key}'") for key, item in entries.items()}
    if kind is float and type(data) is int:
        return float(data)
    return _typed(kind, data, place)


def _dataclass(kind: type[Any], data: Any, place: str) -> Any:
    entries = cast("dict[str, Any]", _typed(dict, data, place))
    hints = get_type_hints(kind)
    known = {item.name: item for item in fields(kind)}
    for name, item in known.items():
        if name not in entries and item.default is MISSING and item.default_factory is MISSING:
            raise PackageError(f"{place} has no '{name}'; export the checkpoint again")
    for name in entries:
        if name not in known:
            raise PackageError(f"{place} has an unknown key '{name}'; update sdonnx, or export the checkpoint again")
    return kind(**{name: _value(hints[name], item, f"{place}: '{name}'") for name, item in entries.items()})


def _typed(kind: type[Any], data: Any, place: str) -> Any:
    if type(data) is not kind:
        raise PackageError(f"{place} is {type(data).__name__} instead of {kind.__name__}; export the checkpoint again")
    return data
