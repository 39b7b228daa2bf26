"""The precision of each layer: what each of a package's precisions means, and mixed precision from a file."""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
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
"""Of a layer: int8 computes in 8 bits; fp16, int8-weights and int4 store the weights and compute in float32."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_BY_NAME: Mapping[str, Precision] = {precision: precision for precision in PRECISIONS}

PrecisionLookup: TypeAlias = Callable[[str], Precision]
"""The precision of a layer by its weight's name."""

_INPUTS_OUTPUTS = (
    r"(^|\.)(conv_in|conv_out|patch_embedding|quant_conv|post_quant_conv|conv_first|conv_last)\.|^body\.0\.weight"
    r"|^(encoder|decoder)\.layers\.\d+\.weight"
)
"""The first and the last convolutions; of a tiny autoencoder also those that resize between its blocks."""

_EXCEPTIONS: dict[Precision, tuple[tuple[str, Precision], ...]] = {
    "fp32": (),
    "fp16": (),
    "int8": (
        (_INPUTS_OUTPUTS, "fp32"),
        (
            r"time_emb|\.attn2\.to_[kv]\.|^(text_model|vision_model|visual_projection|image_proj|ip_adapter)\.",
            "int8-weights",
        ),  # few tokens: time goes to reading weights
    ),
    "int8-weights": ((_INPUTS_OUTPUTS, "fp32"),),
    "int4": (
        (_INPUTS_OUTPUTS, "fp32"),
        (
            r"time_emb|^(text_model|vision_model|visual_projection|image_proj|ip_adapter)\.|^decoder\.|^encoder\.|conv_shortcut",
            "int8-weights",
        ),
    ),
}
"""Layers whose precision differs from the package's; the first match counts."""


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """A precision for each layer."""

    base: Precision
    """Layers that no pattern matches have their precision in a package of this precision."""
    patterns: Mapping[str, Mapping[str, Precision]]
    """By component, then by a pattern of layer names (`matches`); the first match counts."""

    @classmethod
    def read(cls, path: Path) -> "MixedPrecision":
        """Read a TOML file: ``base``, and for each component a table of patterns.

        Raises:
            ExportError: it can't be read, or has other content.
        """
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ExportError(f"{path} can't be read ({error.strerror}); give a TOML file with 'base'") from None
        except (ValueError, RecursionError) as error:
            raise ExportError(f"{path} is not valid TOML: {error}") from None
        if "base" not in data:
            raise ExportError(f"""{path} has no 'base'; begin it with a line such as base = "int8\"""")
        base = _check_precision(data.pop("base"), f"{path}: 'base'")
        tables: dict[str, dict[str, Precision]] = {}
        for component, table in data.items():
            if not isinstance(table, dict):
                raise ExportError(f"{path}: '{component}' is not a table; expected such as [unet] and its patterns")
            tables[component] = {
                pattern: _check_precision(value, f"{path}: '{pattern}' of [{component}]")
                for pattern, value in table.items()
            }
        return cls(base=base, patterns=tables)

    @property
    def named(self) -> set[Precision]:
        """The precisions that it names."""
        return {self.base, *(precision for table in self.patterns.values() for precision in table.values())}

    def check(self, layers: Mapping[str, Iterable[str]]) -> None:
        """Check that its components exist and its patterns match; ``layers`` are weight names by component.

        Raises:
            ExportError: a component is unknown, or a pattern matches nothing.
        """
        for component, table in self.patterns.items():
            if component not in layers:
                raise ExportError(f"unknown component '{component}' in mixed precision; expected {', '.join(layers)}")
            names = list(layers[component])
            for pattern in table:
                if not any(matches(pattern, name) for name in names):
                    raise ExportError(
                        f"pattern '{pattern}' of mixed precision matches no layer of {component}; "
                        f"it has {', '.join(names[:: max(len(names) // 3, 1)][:3])} and others"
                    )


PrecisionSpec: TypeAlias = Precision | MixedPrecision
"""The precision of a package."""


def parse_precision(precision: str) -> PrecisionSpec:
    """Parse one of PRECISIONS, or ``mixed:FILE`` (see `MixedPrecision.read`).

    Raises:
        RequestError: it is neither.
        ExportError: the file is invalid.
    """
    if precision.startswith("mixed:"):
        return MixedPrecision.read(Path(precision.removeprefix("mixed:")))
    if precision not in _BY_NAME:
        raise RequestError(f"precision '{precision}' is unknown; choose {', '.join(PRECISIONS)} or mixed:FILE")
    return _BY_NAME[precision]


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern, in which ``*`` matches anything, is the name of a weight or of a module around it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def make_precision_lookup(
    package: PrecisionSpec, component: str, float32_layers: Sequence[str] = ()
) -> PrecisionLookup:
    """Return the function from a layer of a component to its precision.

    ``float32_layers`` are patterns of layers that are fp32 unless the package says otherwise.
    """
    base, patterns = (
        (package.base, package.patterns.get(component, {})) if isinstance(package, MixedPrecision) else (package, {})
    )

    def find(name: str) -> Precision:
        chosen = [precision for pattern, precision in patterns.items() if matches(pattern, name)]
        upcast = [_BY_NAME["fp32"] for pattern in float32_layers if matches(pattern, name)]
        usual = [precision for pattern, precision in _EXCEPTIONS[base] if re.search(pattern, name)]
        return [*chosen, *upcast, *usual, base][0]

    return find


def precision_label(package: PrecisionSpec, component: str) -> str:
    """Return a component's precision as the manifest names it."""
    if isinstance(package, MixedPrecision):
        return "mixed" if component in package.patterns else package.base
    return package


def _check_precision(value: Any, what: str) -> Precision:
    if isinstance(value, dict):
        raise ExportError(f"{what} is a table; put patterns with dots in quotes")
    if not isinstance(value, str) or value not in _BY_NAME:
        raise ExportError(f"{what} is {value!r}; choose {', '.join(PRECISIONS)}")
    return _BY_NAME[value]
