"""Read small JSON files of others: configs and indexes; and JSON that others send."""

import json
import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, cast

_MAX_BYTES, _MAX_DEPTH = 10_000_000, 64
"""Of a file, which takes up to thirty times its size when it is parsed; and of lists and objects in one another."""


def load_json(path: Path) -> Any:
    """Read a JSON file of UTF-8.

    Raises:
        OSError: it can't be read.
        ValueError: it is not JSON, too large, or nested too deep.
    """
    with path.open("rb") as stream:
        data = stream.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES} bytes")
    return parse_json(data)


def parse_json(data: bytes, *, finite: bool = False) -> Any:
    """Parse JSON of UTF-8.

    Args:
        data: the JSON.
        finite: whether NaN, Infinity and numbers that are too large for a float are refused.

    Raises:
        ValueError: it is not JSON, nested too deep, or has such a number.
    """
    options: dict[str, Any] = {"parse_float": _finite, "parse_constant": _finite} if finite else {}
    try:
        value = json.loads(data.decode("utf-8"), **options)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        objects = [cast("dict[str, Any]", each).values() for each in level if isinstance(each, dict)]
        arrays = [cast("list[Any]", each) for each in level if isinstance(each, list)]
        level = list(chain(*objects, *arrays))
    if level:
        raise ValueError("it is nested too deep")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def whole_numbers(value: Any) -> Any:
    """Return JSON data with 8.0 as 8, which Python's JSON tells apart and diffusers' arithmetic doesn't."""
    if isinstance(value, Mapping):
        return {key: whole_numbers(item) for key, item in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [whole_numbers(item) for item in cast("list[Any]", value)]
    return int(value) if isinstance(value, float) and value.is_integer() else value
