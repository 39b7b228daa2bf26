"""Which precision a layer has: what each of a package's precisions means, and mixed ones that a file describes."""

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from sdonnx_runtime.errors import ExportError, RequestError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Precision: TypeAlias = Literal["fp32", "fp16", "int8", "int8-weights", "int4"]
"""Of a layer: int8 computes in 8 bits; fp16, int8-weights and int4 store the weights so and compute in float32."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_BY_NAME: Mapping[str, Precision] = {precision: precision for precision in PRECISIONS}

PrecisionOf: TypeAlias = Callable[[str], Precision]
"""The precision of a layer by its weight's name."""

_ENDS = r"(^|\.)(conv_in|conv_out|quant_conv|post_quant_conv)\.|^(encoder|decoder)\.layers\.\d+\.weight"
"""What comes in and goes out; of a tiny autoencoder also what changes the size between its blocks."""

_EXCEPTIONS: dict[Precision, tuple[tuple[str, Precision], ...]] = {
    "fp32": (),
    "fp16": (),
    "int8": (
        (_ENDS, "fp32"),
        (r"time_emb|\.attn2\.to_[kv]\.|^text_model\.", "int8-weights"),  # few rows: the weights are the work
    ),
    "int8-weights": ((_ENDS, "fp32"),),
    "int4": (
        (_ENDS, "fp32"),
        (r"time_emb|^text_model\.|^decoder\.|^encoder\.|conv_shortcut", "int8-weights"),
    ),
}
"""First match; layers that none matches have the package's own."""


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """A precision for each layer."""

    base: Precision
    """Layers that no pattern matches have what a package of this precision would give them."""
    patterns: Mapping[str, Mapping[str, Precision]]
    """By component, then by a pattern of layers' names (`matches`); the first match counts."""

    @classmethod
    def read(cls, path: Path) -> "MixedPrecision":
        """What a TOML file says: ``base``, and for each component a table of patterns.

        Raises:
            ExportError: it can't be read, or says something else.
        """
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ExportError(f"{path} can't be read ({error.strerror}); give a TOML file with 'base'") from None
        except ValueError as error:
            raise ExportError(f"{path} is not valid TOML: {error}") from None
        if "base" not in data:
            raise ExportError(f"""{path} has no 'base'; begin it with a line such as base = "int8\"""")
        base = _checked(data.pop("base"), f"{path}: 'base'")
        tables: dict[str, dict[str, Precision]] = {}
        for component, table in data.items():
            if not isinstance(table, dict):
                raise ExportError(f"{path}: '{component}' is no table of patterns; put them below a line [unet]")
            tables[component] = {
                pattern: _checked(value, f"{path}: '{pattern}' of [{component}]") for pattern, value in table.items()
            }
        return cls(base=base, patterns=tables)

    def check(self, layers: Mapping[str, Iterable[str]]) -> None:
        """Whether everything in it is about something; ``layers`` are names of weights by component.

        Raises:
            ExportError: a component or a pattern is not.
        """
        for component, table in self.patterns.items():
            if component not in layers:
                raise ExportError(f"the mix names a component '{component}'; there are {', '.join(layers)}")
            names = list(layers[component])
            for pattern in table:
                if not any(matches(pattern, name) for name in names):
                    raise ExportError(
                        f"the mix's pattern '{pattern}' matches no layer of {component}, "
                        f"which has such as {', '.join(names[:: max(len(names) // 3, 1)][:3])}"
                    )


PrecisionSpec: TypeAlias = Precision | MixedPrecision
"""Of a package."""


def parse_precision(precision: str) -> PrecisionSpec:
    """One of PRECISIONS, or with ``mixed:FILE`` what `MixedPrecision.read` gives.

    Raises:
        RequestError: it is neither.
        ExportError: the file can't be honoured.
    """
    if precision.startswith("mixed:"):
        return MixedPrecision.read(Path(precision.removeprefix("mixed:")))
    if precision not in _BY_NAME:
        raise RequestError(f"precision '{precision}' is unknown; choose {', '.join(PRECISIONS)} or mixed:FILE")
    return _BY_NAME[precision]


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern, in which ``*`` stands for anything, is of a weight or of a module that it lies in."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def precision_of(package: PrecisionSpec, component: str) -> PrecisionOf:
    """What the layers of a component have."""
    base, patterns = (
        (package.base, package.patterns.get(component, {})) if isinstance(package, MixedPrecision) else (package, {})
    )

    def find(name: str) -> Precision:
        chosen = [precision for pattern, precision in patterns.items() if matches(pattern, name)]
        usual = [precision for pattern, precision in _EXCEPTIONS[base] if re.search(pattern, name)]
        return [*chosen, *usual, base][0]

    return find


def label(package: PrecisionSpec, component: str) -> str:
    """What the manifest calls a component's precision."""
    if isinstance(package, MixedPrecision):
        return "mixed" if component in package.patterns else package.base
    return package


def _checked(value: Any, what: str) -> Precision:
    if isinstance(value, dict):
        raise ExportError(f"{what} is a table; put patterns with dots in quotes")
    if not isinstance(value, str) or value not in _BY_NAME:
        raise ExportError(f"{what} is {value!r}; choose {', '.join(PRECISIONS)}")
    return _BY_NAME[value]
