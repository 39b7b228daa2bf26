"""Read a component's config file; a value that its graph can't honour is an error."""

from collections.abc import Mapping, Sequence
from typing import Any

from sdonnx_runtime.errors import ExportError

_REQUIRED: Any = object()


class ConfigReader:
    """Read a config's values one by one, and reject those that nobody read."""

    def __init__(self, component: str, config: Mapping[str, Any]) -> None:
        self._component = component
        self._config = config
        self._unread = {key for key in config if not key.startswith("_")}

    def value(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return the value of ``key``, or ``default`` if it is absent or null."""
        self._unread.discard(key)
        value = self._config.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ExportError(f"{self._component}: the config has no '{key}'; it is required to build the graph")
        return default

    def integer(self, key: str, default: Any = _REQUIRED, *, low: int = 1) -> int:
        """Return a whole number of at least ``low``."""
        value = self.value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise self.invalid(key, value, f"a whole number of at least {low}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """Return a finite number."""
        value = self.value(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < float("inf"):
            raise self.invalid(key, value, "a number")
        return float(value)

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        """Return true or false."""
        return bool(self.one_of(key, (True, False), default))

    def one_of(self, key: str, options: Sequence[Any], default: Any = _REQUIRED) -> Any:
        """Return one of ``options``."""
        value = self.value(key, default)
        if not any(value is option or (value == option and type(value) is type(option)) for option in options):
            raise self.invalid(key, value, " or ".join(repr(option) for option in options))
        return value

    def integers(self, key: str, count: int | None = None, default: Any = _REQUIRED) -> tuple[int, ...]:
        """Return a list of ``count`` whole numbers of at least 1; a single number stands for all."""
        value = self.value(key, default)
        if count is not None and type(value) is int:
            value = [value] * count
        whole = isinstance(value, (list, tuple)) and all(type(item) is int and item > 0 for item in value)
        if not whole or len(value) != (count if count is not None else max(len(value), 1)):
            expected = "a list of whole numbers" if count is None else f"a whole number, or a list of {count}"
            raise self.invalid(key, value, expected)
        return tuple(value)

    def enum_list(self, key: str, options: Sequence[str], count: int) -> tuple[str, ...]:
        """Return a list of ``count`` names, each one of ``options``."""
        value = self.value(key)
        if not isinstance(value, (list, tuple)) or len(value) != count:
            raise self.invalid(key, value, f"a list of {count} (one for each of block_out_channels)")
        for name in value:
            if name not in options:
                raise self.invalid(key, name, " or ".join(options))
        return tuple(value)

    def require_value(self, key: str, supported: Any) -> None:
        """Reject any value but ``supported`` (absent and null are accepted)."""
        value = self.value(key, supported)
        if value != supported:
            raise self.invalid(key, value, repr(supported))

    def ignore(self, *keys: str) -> None:
        """Accept any value of keys that don't change the graph."""
        self._unread.difference_update(keys)

    def finish(self) -> None:
        """Reject keys that nobody read, unless their value is null or false."""
        for key in sorted(self._unread):
            value = self._config[key]
            if value is not None and value is not False:
                raise self.invalid(key, value, "no such key (or null, or false)")

    def invalid(self, key: str, value: Any, supported: str) -> ExportError:
        """Return the error that says the value of a key and what is supported."""
        return ExportError(f"{self._component}: '{key}' is {value!r}; supported: {supported}")
