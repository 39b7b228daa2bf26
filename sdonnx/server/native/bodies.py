"""What handlers read of the JSON that clients send: known keys, of the right types."""

import asyncio
from collections.abc import Collection, Mapping
from typing import Any, TypeVar, cast

from starlette.requests import Request

import sdonnx
from sdonnx.server.requests import parse_object

T = TypeVar("T")


async def read_object(request: Request, keys: Collection[str]) -> dict[str, Any]:
    """Read a JSON object that has no other keys than these; those that are null are left out.

    Raises:
        RequestError: it is something else, or has an unknown key.
        TooLarge: it has too many values.
    """
    body = await request.body()
    return check_keys(await asyncio.to_thread(parse_object, body), "the body", keys)


def check_keys(value: Any, name: str, keys: Collection[str]) -> dict[str, Any]:
    """Check that a value is an object without unknown keys, and leave out what is null; raises RequestError."""
    if not isinstance(value, dict):
        raise sdonnx.RequestError(f"{name} is not a JSON object; its keys are {', '.join(keys)}")
    data = cast("dict[str, Any]", value)
    for key in data:
        if key not in keys:
            raise sdonnx.RequestError(f"{name} has an unknown key '{key[:100]}'; its keys are {', '.join(keys)}")
    return {key: each for key, each in data.items() if each is not None}


def take(data: Mapping[str, Any], key: str, kind: type[T], default: T) -> T:
    """Get a value of a type; raises RequestError if it is of another one."""
    value = data.get(key, default)
    if type(value) is not kind:
        raise sdonnx.RequestError(f"{key} is {value!r:.100}; give {_KINDS[kind]}")
    return value


_KINDS: Mapping[type, str] = {str: "a text", int: "a whole number", list: "a list"}
