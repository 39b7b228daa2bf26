"""The tensors in a pickle of torch: its calls that rebuild them, and the search for them by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from sdonnx_runtime.files.pickles import Global, Instance, PickleError, hashable

_STORAGES: Mapping[str, str] = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "UntypedStorage": "U8", "ComplexFloatStorage": "C64",
}  # fmt: skip
"""The dtypes of torch's storage classes."""

_DTYPES: Mapping[str, str] = {
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2", "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ", "torch.float8_e8m0fnu": "F8_E8M0", "torch.uint16": "U16",
    "torch.uint32": "U32", "torch.uint64": "U64",
}  # fmt: skip
"""Those of torch's dtypes that have no storage class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """A flat array of a file."""

    dtype: str
    """Of the safetensors format, or torch's name if that has no other."""
    key: str
    offset: int
    """Its first element in the storage of the key, of which it can be a view."""
    count: int
    """Elements."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """A view of a storage."""

    storage: Storage
    dtype: str
    offset: int
    """Elements of ``dtype`` before the first."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def make_storage(pid: Any) -> Storage:
    """Make the storage of torch's persistent id: ("storage", class, key, device, count), before torch 1.6 and a view.

    Raises:
        PickleError: it is anything else.
    """
    if not isinstance(pid, tuple):
        raise PickleError("a persistent id is not a storage's")
    kind, storage_class, key, _, count, *view = (*cast("tuple[Any, ...]", pid), *(None,) * 5)
    if kind != "storage" or not isinstance(storage_class, Global) or not isinstance(key, str):
        raise PickleError("a persistent id is not a storage's")
    name = storage_class.name.rpartition(".")[2]
    _, offset, count = view[0] if view[0] is not None else (None, 0, count)
    return Storage(dtype=_STORAGES.get(name, name), key=key, offset=_size(offset), count=_size(count))


def _size(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 2**63:
        raise PickleError("a size is not a number of 0 or more")
    return number


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *others: Any) -> Tensor | Instance:
    """Stand for torch's _rebuild_tensor and _rebuild_tensor_v2."""
    return _NEGATED if _is_negated(*others[2:]) else _make_tensor(storage, offset, size, stride, storage.dtype)


def _rebuild_tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, *others: Any) -> Tensor | Instance:
    """Stand for torch's _rebuild_tensor_v3, whose storages are bytes."""
    dtype = others[2]
    return (
        _NEGATED
        if _is_negated(*others[3:])
        else _make_tensor(storage, offset, size, stride, _DTYPES.get(dtype.name, dtype.name))
    )


_NEGATED = Instance("torch._utils._rebuild_negated_view")
"""Stands for a tensor whose stored values have the other sign."""


def _is_negated(metadata: Any = None, *_: Any) -> bool:
    return isinstance(metadata, dict) and bool(cast("dict[Any, Any]", metadata).get("neg"))


def _make_tensor(storage: Storage, offset: Any, size: Any, stride: Any, dtype: str) -> Tensor:
    shape, strides = tuple(_size(each) for each in size), tuple(_size(each) for each in stride)
    if len(shape) != len(strides):
        raise PickleError("a tensor's shape and strides don't fit")
    return Tensor(storage=storage, dtype=dtype, offset=_size(offset), shape=shape, strides=strides)


def _same(data: Any, *_: Any) -> Any:
    """Stand for _rebuild_parameter, _rebuild_parameter_with_state and torch.Size."""
    return data


def _rebuild_from_type(function: Any, _: Any, arguments: Any, *__: Any) -> Any:
    """Stand for _rebuild_from_type_v2: a tensor of a class of its own, or with attributes."""
    return CALLS[function.name](*arguments)


def _make_dict(pairs: Any = (), *_: Any) -> dict[Any, Any]:
    """Stand for OrderedDict, which Python 2 pickled with its items, and dict."""
    items = cast("list[Any]", pairs) if isinstance(pairs, (list, tuple)) else []
    two = [cast("list[Any]", each) for each in items if isinstance(each, (list, tuple))]
    return {hashable(each[0]): each[1] for each in two if len(each) == 2}


def _make_empty_dict(*_: Any) -> dict[Any, Any]:
    return {}


CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _make_dict,
    "builtins.dict": _make_dict,
    "__builtin__.dict": _make_dict,
    "collections.defaultdict": _make_empty_dict,
    "torch.Size": _same,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
}
"""What stands for the globals of tensors; all others become an `Instance`."""


_MAX_DEPTH = 32
_MAX_PATH = 1000
"""Dictionaries in dictionaries, and characters of their keys with dots."""

_MAX_WORK = 20_000_000
"""Characters of all paths that a search makes, and 50 for each key."""


def find_tensors(root: Any) -> dict[str, Tensor]:
    """Collect the tensors of a pickle by their keys joined by dots; those of its innermost "state_dict", if it has one.

    Raises:
        PickleError: it has none but an object, a tensor of another kind, or dictionaries without end.
    """
    items = _items(root)
    if items is None:
        name = root.name if isinstance(root, (Instance, Global)) else type(root).__name__
        raise PickleError(f"it holds {name!r:.80}, not a dictionary of tensors")
    for _ in range(_MAX_DEPTH):
        inner = _items(items.get("state_dict"))
        items = items if inner is None else inner
    tensors: dict[str, Tensor] = {}
    stack: list[tuple[str, int, Any]] = [("", 0, items)]
    work = 0
    while stack:
        path, depth, value = stack.pop()
        if isinstance(value, Tensor):
            tensors[path] = value
            continue
        inner = _check_kind(path, value) or {}
        work += 50 * len(inner)
        if (depth == _MAX_DEPTH and inner) or work > _MAX_WORK:
            raise PickleError("it has dictionaries in dictionaries without end")
        for key in reversed([key for key in inner if isinstance(key, (str, int))]):
            name = f"{path}.{key}" if path else str(key)
            work += len(name)
            if work > _MAX_WORK or len(name) > _MAX_PATH:
                raise PickleError("it has dictionaries in dictionaries without end")
            stack.append((name, depth + 1, inner[key]))
    "".join(tensors).encode()  # half a surrogate pair can't be printed
    return tensors


def find_metadata(root: Any) -> dict[str, str]:
    """Collect a file's other strings and integers, such as ``global_step``, as text by their keys."""
    items = _items(root) or {}
    return {key: str(value) for key, value in items.items() if isinstance(key, str) and type(value) in (str, int)}


def _check_kind(path: str, value: Any) -> Mapping[Any, Any] | None:
    """Return a dictionary's items; None for what isn't one.

    Raises:
        PickleError: it is a tensor that is not supported.
    """
    if isinstance(value, Instance) and "._rebuild_" in value.name:
        kind = value.name.rpartition("._rebuild_")[2]
        raise PickleError(f"'{path}' is not a plain tensor ({kind!r:.40})")
    return _items(value)


def _items(value: Any) -> Mapping[Any, Any] | None:
    """Return what a dictionary or a module of torch holds by name; None for anything else."""
    if isinstance(value, Instance):
        state = value.state
        if not isinstance(state, dict) or "_parameters" not in state:
            return value.items
        parts = [cast("Any", state).get(name) for name in ("_parameters", "_buffers", "_modules")]
        return {key: each for part in parts for key, each in (_dictionary(part) or {}).items()}
    return _dictionary(value)


def _dictionary(value: Any) -> Mapping[Any, Any] | None:
    """Return a dictionary's items, also of a class of its own; None for anything else, modules included."""
    if isinstance(value, Instance):
        return value.items
    return cast("Mapping[Any, Any]", value) if isinstance(value, dict) else None
