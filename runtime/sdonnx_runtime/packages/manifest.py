"""The manifest, ``sdonnx.json``: what a package holds and how it is run, as frozen dataclasses.

The files may be untrusted: every key and type is checked, and errors name the key.
"""

import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.files.json_file import load_json
from sdonnx_runtime.files.kinds import describe_file
from sdonnx_runtime.packages.concat import CONCAT
from sdonnx_runtime.packages.families import COMPONENT_NAMES, FAMILIES, TARGETS

T = TypeVar("T")

MANIFEST = "sdonnx.json"
FORMAT = 2
MAX_ENLARGE = 16


@dataclass(frozen=True)
class Range:
    """The lowest and the highest value of a number, as an annotation of its type."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of a package."""

    size: Annotated[int, Range(0, 2**62)]
    """Bytes; checked whenever a package is opened."""
    sha256: str
    """Hexadecimal, for programs that copy packages."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One component: a weights file and the graphs that point into it."""

    graphs: Mapping[str, str]
    """Path of each variant by its name, see `variant`; every component has ``plain``."""
    files: Mapping[str, File]
    """Every file of the component by its path: graphs and weights."""
    precision: str
    """Of its layers: one of `sdonnx export`'s, or ``mixed``; ``unknown`` in an optimum export."""


@dataclass(frozen=True, kw_only=True)
class Latents:
    """The latent space of the VAE that the U-Net was trained on."""

    channels: Annotated[int, Range(1, 256)]
    downscale: Annotated[int, Range(1, 64)]
    """Image pixels per latent pixel, on each axis."""
    scaling_factor: Annotated[float, Range(1e-6, 1e6)]
    """Latents are the VAE's values less ``shift_factor``, times this."""
    shift_factor: Annotated[float, Range(-1e6, 1e6)] = 0.0
    preview: tuple[tuple[Annotated[float, Range(-1e6, 1e6)], ...], ...] | None = None
    """(channels + 1, 3): a linear map from a latent pixel to red, green and blue in -1..1; the last row is the bias."""


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text encoder and the outputs of it that the U-Net reads."""

    component: str
    tokenizer: str
    """Directory of its tokenizer files."""
    length: Annotated[int, Range(3, 10_000)]
    """Tokens of a prompt, start and end included: S."""
    output: str
    """Name of the output with the hidden states, (N, S, C)."""
    pooled: str | None = None
    """Name of the output with the pooled text state, (N, P); None where the U-Net reads none."""


@dataclass(frozen=True, kw_only=True)
class ConditioningSpec:
    """The U-Net's inputs other than noised latents, timestep and text."""

    concat: str | None = None
    """Extra input channels: a key of CONCAT; None is none."""
    guidance_width: Annotated[int, Range(4, 100_000)] | None = None
    """Width of the guidance embedding (arXiv:2310.04378) of a distilled model; None is none."""
    zero_negative: bool = False
    """Whether an empty negative prompt is all zeros instead of an encoded empty text."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What suits the model where a request leaves a choice open."""

    size: Annotated[int, Range(1, 16384)]
    """Width and height, pixels; the width alone where there is a height."""
    height: Annotated[int, Range(1, 16384)] | None = None
    num_inference_steps: Annotated[int, Range(1, 1000)] = 20
    guidance_scale: Annotated[float, Range(-1000, 1000)] = 7.5
    sampler: str | None = None
    """A name of SAMPLERS; None is the one of the scheduler config."""
    enlarge: Annotated[int, Range(1, MAX_ENLARGE)] = 1
    """Factor by which the command line upscales the saved image; for models of few pixels."""

    @property
    def sides(self) -> tuple[int, int]:
        """Width and height."""
        return self.size, self.size if self.height is None else self.height

    @property
    def area(self) -> int:
        """Width times height."""
        return self.sides[0] * self.sides[1]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a package came from."""

    name: str
    """Hub id, or the name of a file or directory."""
    revision: str | None = None
    exporter: str
    """Program and version that wrote it."""
    stated: Mapping[str, str] = field(default_factory=dict[str, str])
    """What a single file says of its model, and where: ``{"prediction type": "epsilon, from the file's name"}``."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of ``sdonnx.json``."""

    format: int = FORMAT
    family: str
    """A key of FAMILIES. Only those of kind MODEL have a U-Net, text encoders, a scheduler and meaningful defaults."""
    target: str
    """What the graphs were written for: any device of DEVICES (``generic``)."""
    defaults: Defaults
    scheduler: Mapping[str, Any]
    """diffusers' scheduler_config.json as published: prediction type, betas, spacing, the default sampler."""
    latents: Latents
    conditions: ConditioningSpec = ConditioningSpec()
    text_encoders: tuple[TextEncoder, ...]
    components: Mapping[str, Component]
    source: Source


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write ``sdonnx.json`` into ``root``."""
    text = json.dumps(drop_non_finite(asdict(manifest)), indent=2, allow_nan=False)
    (root / MANIFEST).write_text(text + "\n", encoding="utf-8")


def drop_non_finite(value: Any) -> Any:
    """Leave out the keys of JSON data that are infinite or NaN, which JSON does not have though Python writes them.

    diffusers writes ``lambda_min_clipped`` so, where -Infinity is "no limit", as an absent key is.
    """
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        return {key: drop_non_finite(item) for key, item in items if not _is_non_finite(item)}
    if isinstance(value, (list, tuple)):
        return [drop_non_finite(item) for item in cast("list[Any]", value)]
    return None if _is_non_finite(value) else value


def _is_non_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file, without what is not finite.

    Raises:
        PackageError: the file is missing, unreadable or holds something else.
    """
    try:
        data = drop_non_finite(load_json(path))
    except OSError as error:
        raise PackageError(f"{path} can't be read ({error.strerror}); run 'sdonnx export' again") from None
    except ValueError:
        what = describe_file(path, is_text=True) or "is not valid JSON; run 'sdonnx export' again"
        raise PackageError(f"{path} {what}") from None
    if not isinstance(data, dict):
        raise PackageError(f"{path} is not a JSON object; run 'sdonnx export' again")
    return data  # pyright: ignore[reportUnknownVariableType]


def read_manifest(root: Path) -> Manifest:
    """Read the manifest in ``root``.

    Raises:
        PackageError: it is damaged, incomplete, or of a format or family that this version does not support.
    """
    path = root / MANIFEST
    data = read_json(path)
    found = data.get("format")
    if found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        remedy = "update sdonnx" if newer else "export the checkpoint again"
        raise PackageError(f"{path} has format {found!r}; this version reads format {FORMAT}; {remedy}")
    return check_manifest(parse(Manifest, data, str(path)), str(path))


def check_manifest(manifest: Manifest, where: str) -> Manifest:
    """Check a manifest's names against this version's tables; ``where`` begins every message.

    Raises:
        PackageError: a name is unknown, or values contradict each other.
    """
    known = {"family": (manifest.family, FAMILIES), "target": (manifest.target, TARGETS)}
    known |= {"concat": (manifest.conditions.concat, {**CONCAT, None: None})}
    known |= {f"components: '{name}'": (name, COMPONENT_NAMES) for name in manifest.components}
    for key, (name, supported) in known.items():
        if name not in supported:
            names = ", ".join(each for each in supported if each is not None)
            raise PackageError(f"{where}: '{key}' is '{name}'; supported: {names}; update sdonnx")
    for name, component in manifest.components.items():
        if not component.precision.isprintable() or component.precision == "":
            raise PackageError(f"{where}: 'precision' of '{name}' is not a precision's name; export again")
    family, found = FAMILIES[manifest.family], tuple(each.component for each in manifest.text_encoders)
    if found != family.text_encoders:
        expected = ", ".join(family.text_encoders) or "none"
        raise PackageError(f"{where} has the text encoders {', '.join(found) or 'none'}; {family.title} has {expected}")
    if family.time_ids and manifest.text_encoders[-1].pooled is None:
        raise PackageError(f"{where}: '{found[-1]}' has no 'pooled', which {family.title} requires; export again")
    preview, rows = manifest.latents.preview, manifest.latents.channels + 1
    if preview is not None and (len(preview) != rows or any(len(row) != 3 for row in preview)):
        raise PackageError(f"{where}: 'preview' requires 3 numbers for each of the latent channels + 1; export again")
    return manifest


def parse(kind: type[T], data: Any, where: str) -> T:
    """Parse JSON data to an instance of the dataclass ``kind``; ``where`` begins every message.

    Fields may be str, int, float, Any, dataclasses, ``X | None``, ``Mapping[str, X]`` and ``tuple[X, ...]``; numbers
    may be annotated with a `Range`.

    Raises:
        PackageError: a key is missing or unknown, or a value has another type or is out of range.
    """
    return cast("T", _value(kind, data, where))


def _value(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        number, limits = _value(arguments[0], data, where), arguments[1]
        if not limits.low <= number <= limits.high:
            raise PackageError(f"{where} is {number}, expected {limits.low:g} to {limits.high:g}; export again")
        return number
    if kind is Any:
        return data
    if is_dataclass(kind):
        return _dataclass(cast("type[Any]", kind), data, where)
    if origin in (types.UnionType, Union):
        return None if data is None else _value(arguments[0], data, where)
    if origin is tuple:
        items = cast("list[Any]", _typed(list, data, where))
        return tuple(_value(arguments[0], item, f"{where}: {index}") for index, item in enumerate(items))
    if origin is Mapping:
        entries = cast("dict[str, Any]", _typed(dict, data, where))
        return {key: _value(arguments[1], item, f"{where}: '{key}'") for key, item in entries.items()}
    if kind is float and type(data) is int:
        return float(data)
    return _typed(kind, data, where)


def _dataclass(kind: type[Any], data: Any, where: str) -> Any:
    entries = cast("dict[str, Any]", _typed(dict, data, where))
    hints = get_type_hints(kind, include_extras=True)
    known = {item.name: item for item in fields(kind)}
    for name, item in known.items():
        if name not in entries and item.default is MISSING and item.default_factory is MISSING:
            raise PackageError(f"{where} has no '{name}'; export the checkpoint again")
    for name in entries:
        if name not in known:
            raise PackageError(f"{where} has an unknown key '{name}'; update sdonnx, or export the checkpoint again")
    return kind(**{name: _value(hints[name], item, f"{where}: '{name}'") for name, item in entries.items()})


def _typed(kind: type[Any], data: Any, where: str) -> Any:
    if type(data) is not kind:
        raise PackageError(f"{where} is {type(data).__name__} instead of {kind.__name__}; export the checkpoint again")
    return data
