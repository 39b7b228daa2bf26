"""The manifest, ``sdonnx.json``: what a package holds and how it is run, as frozen dataclasses."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.packages.parsing import parse

MANIFEST = "sdonnx.json"
FORMAT = 1
VAE_ALONE = "vae"
CONTROLS = ("controlnet", "adapter")
"""Families of what steers another package's U-Net; each has one component, of the same name."""
ALONE: Mapping[str, str] = {VAE_ALONE: "vae_decoder", **{family: family for family in CONTROLS}}
"""Families that make no pictures of their own, but serve other packages; and a component that each has."""

FAMILIES: Mapping[str, str] = {
    "sd1": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 2",
    "sdxl": "Stable Diffusion XL",
    "sdxl-refiner": "Stable Diffusion XL's refiner",
    VAE_ALONE: "a VAE alone",
    "controlnet": "a ControlNet",
    "adapter": "a T2I-Adapter",
}
"""What this version runs, by its name in manifests."""

MAX_ENLARGE = 16

CACHED_FEATURES = "kept"
"""What a U-Net's graph ``keeping`` gives besides its prediction, and its graph ``reusing`` takes."""

EMBEDS = "inputs_embeds"
"""What a text encoder's graph ``embedded`` takes: (N, S, C), its tokens' vectors."""

TILED = "tiled"
"""A VAE's graphs for tiles of a picture."""

NORM_STATS, USE_NORM_STATS, MEASURED_STATS = "moments", "given", "measured"
"""What they take and give besides pictures: of each norm of a tile the means and mean squares
(N, 2 K, groups) that it is to have if ``given`` () is 1, and those that it had of the tile itself."""


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of a package."""

    size: int
    """Bytes; checked whenever a package is opened."""
    sha256: str
    """Hexadecimal, for whoever copies packages about."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One component: a weights file and the graphs that point into it."""

    graphs: Mapping[str, str]
    """Path of each variant; every component has ``plain``.

    A U-Net has ``keeping`` and ``reusing`` too, see `denoise.StepReuse`; ``downsampled``, plain with token
    downsampling; ``keeping-downsampled`` and ``reusing-downsampled``; and of each, with ``controlled`` at its end (of
    ``plain`` that alone), one that takes what a ControlNet or T2I-Adapter adds, see `controls.Controlled`. A text
    encoder has ``embedded``, which starts from its tokens' vectors."""
    files: Mapping[str, File]
    """Every file of the component by its path: graphs and weights."""
    precision: str
    """Its layers': one of `sdonnx export`'s, or ``mixed``; ``unknown`` for what others exported."""


@dataclass(frozen=True, kw_only=True)
class Latents:
    """What the U-Net works on, and how it relates to pictures."""

    channels: int
    downscale: int
    """Pixels for each latent cell, per axis."""
    scaling_factor: float
    """Latents are the VAE's values less ``shift_factor``, times this."""
    shift_factor: float = 0.0
    preview: tuple[tuple[float, ...], ...] | None = None
    """(channels + 1, 3): a linear guess at a cell's red, green and blue in -1..1; the last row is the constant."""


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text encoder and what the U-Net reads of it."""

    component: str
    tokenizer: str
    """Directory of its tokenizer files."""
    length: int
    """Tokens of a prompt, start and end included: S."""
    output: str
    """Name of the output with the hidden states, (N, S, C)."""
    pooled: str | None = None
    """Name of the output with one projected state for the whole text, (N, P); None where the U-Net reads none."""


@dataclass(frozen=True, kw_only=True)
class ConditioningSpec:
    """What the U-Net is given besides noised latents, time and text."""

    beside: str | None = None
    """What follows the latents' channels: a key of BESIDE; None is nothing."""
    guidance_width: int | None = None
    """Numbers in which the guidance scale is told, for a model that was distilled to be guided by itself."""
    zero_negative: bool = False
    """Whether an empty negative prompt is all zeros instead of an encoded empty text."""


BESIDE: Mapping[str, str] = {
    "mask": "the mask, 1 where it is painted anew, and the latents of the picture without what is under it",
    "picture": "the latents of the picture that is edited",
    "depth": "how near each place is, from -1 to 1",
}
"""What a U-Net may be given beside the latents."""


def channels_beside(kind: str | None, channels: int) -> int:
    """How many channels what is of a kind of BESIDE has beside latents of ``channels``."""
    return 0 if kind is None else {"mask": 1 + channels, "picture": channels, "depth": 1}[kind]


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What suits the model where a request leaves a choice open."""

    size: int
    """Width and height, pixels."""
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    sampler: str | None = None
    """A name of SAMPLERS; None is what the scheduler config names."""
    enlarge: int = 1
    """How many times wider and higher the command line saves a picture; for models of few pixels."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a package came from."""

    name: str
    """Hub id, or the name of a file or directory."""
    revision: str | None = None
    exporter: str
    """Program and version that wrote it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that ``sdonnx.json`` says."""

    format: int = FORMAT
    family: str
    """One of FAMILIES; those of ALONE have no U-Net, text encoders and scheduler; their defaults mean nothing."""
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
    """Writes ``sdonnx.json`` into ``root``."""
    text = json.dumps(finite(asdict(manifest)), indent=2, allow_nan=False)
    (root / MANIFEST).write_text(text + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """JSON data without infinities and NaN, which JSON has not, though Python writes them: such keys are left out.

    diffusers writes ``lambda_min_clipped`` so, where -Infinity is "no limit", as an absent key is.
    """
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        return {key: finite(item) for key, item in items if not isinstance(item, float) or math.isfinite(item)}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in cast("list[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, `finite`.

    Raises:
        PackageError: the file is missing, unreadable or holds something else.
    """
    try:
        found = finite(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise PackageError(f"{path} can't be read ({error.strerror}); run 'sdonnx export' again") from None
    except (RecursionError, ValueError):
        raise PackageError(f"{path} is not valid JSON; run 'sdonnx export' again") from None
    if not isinstance(found, dict):
        raise PackageError(f"{path} holds no JSON object; run 'sdonnx export' again")
    return found  # pyright: ignore[reportUnknownVariableType]


def read_manifest(root: Path) -> Manifest:
    """The manifest in ``root``.

    Raises:
        PackageError: it is damaged, incomplete, or of a format or family that this version can't run.
    """
    path = root / MANIFEST
    data = read_json(path)
    if data.get("format") != FORMAT:
        raise PackageError(
            f"{path} has format {data.get('format')!r}, this version reads {FORMAT}; "
            "update sdonnx, or export the checkpoint again"
        )
    manifest = parse(Manifest, data, str(path))
    if manifest.family not in FAMILIES:
        raise PackageError(f"{path}: family '{manifest.family}' is unknown; this version runs {', '.join(FAMILIES)}")
    preview = manifest.latents.preview
    if preview is not None and [len(row) for row in preview] != [3] * (manifest.latents.channels + 1):
        raise PackageError(f"{path}: 'preview' has not 3 numbers for each of the latents' channels + 1; export again")
    if not 1 <= manifest.defaults.enlarge <= MAX_ENLARGE:
        raise PackageError(
            f"{path}: 'enlarge' is {manifest.defaults.enlarge}, expected 1 to {MAX_ENLARGE}; export again"
        )
    return manifest


NEEDED: Mapping[str, tuple[str, ...]] = {
    "mask": ("image", "mask_image"),
    "picture": ("image",),
    "depth": ("depth_image",),
}
"""A request's pictures that a model can't do without, by what it is given beside the latents."""
