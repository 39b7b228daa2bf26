"""AUTOMATIC1111's infotext: in the images that clients send, and as fields of a request."""

import json
import re
from collections.abc import Mapping
from typing import Any

from PIL import ExifTags, Image
from sdonnx_runtime.images.preprocess import UPSCALERS
from sdonnx_runtime.outputs.metadata import A1111_SCHEDULES
from sdonnx_runtime.packages.families import FAMILIES
from sdonnx_runtime.request import FIELDS, TILINGS

_SETTING = re.compile(r'(\w[\w /-]{0,100}): *("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"(\d{1,9})x(\d{1,9})", re.ASCII)

_TILINGS = {**{axes: axes for axes in TILINGS}, "True": "xy"}
"""Values of Tiling; True is AUTOMATIC1111's."""

_MIN_SETTINGS = 3
"""A last line with fewer belongs to the prompt."""

_MAX_LINE = 20_000
"""Characters of a line of settings; a longer one belongs to the prompt."""


def read_infotext(image: Image.Image) -> str | None:
    """Read the infotext of a PNG's text chunk, or of a JPEG's or WebP's EXIF; None if there is none."""
    text = image.info.get("parameters")
    if isinstance(text, str):
        return text
    try:
        comment: Any = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except (ArithmeticError, LookupError, OSError, SyntaxError, TypeError, ValueError):  # it is damaged
        return None
    if not isinstance(comment, bytes):
        return comment if isinstance(comment, str) else None
    kind, text = comment[:8], comment[8:]
    return text.decode("utf-16-be" if kind.startswith(b"UNICODE") else "utf-8", "replace")


def parse_infotext(text: str) -> dict[str, str]:
    """Parse an infotext to its settings by name, with ``Prompt``, ``Negative prompt``, ``Size-1`` and ``Size-2``."""
    *lines, last = text.strip().split("\n")
    found = _SETTING.findall(last) if len(last) <= _MAX_LINE else []
    if len(found) < _MIN_SETTINGS:
        lines, found = [*lines, last], []
    prompt, mark, negative = "\n".join(line.strip() for line in ["", *lines]).partition("\nNegative prompt:")
    settings = {"Prompt": prompt.strip(), "Negative prompt": negative.strip() if mark else ""}
    for name, value in found:
        size = _SIZE.fullmatch(value.strip())
        settings |= {f"{name}-1": size[1], f"{name}-2": size[2]} if size else {name: _unquote(value.strip())}
    return settings


def infotext_fields(text: str, *, family: str) -> dict[str, Any]:
    """Convert an infotext to fields of `sdonnx.Request`, for a model of a family, without what can't be converted."""
    settings = parse_infotext(text)
    names = {spec.infotext: name for name, spec in FIELDS.items() if spec.infotext is not None}
    fields = {names[key]: _convert(names[key], value) for key, value in settings.items() if key in names}
    fields |= {"prompt": settings["Prompt"], "negative_prompt": settings["Negative prompt"]}
    fields |= {side: _convert(side, settings.get(key, "")) for side, key in (("width", "Size-1"), ("height", "Size-2"))}
    fields["schedule"] = find_schedule(settings.get("Schedule type", ""), family)
    fields["variation"] = _variation(settings)
    fields["tiling"] = _TILINGS.get(settings.get("Tiling", ""))
    fields["clip_skip"] = None if fields.get("clip_skip") == 1 else fields.get("clip_skip")
    if settings.get("Emphasis") == "None":
        fields["prompt_syntax"] = "plain"
    if "Hires upscale" in settings:
        fields |= _hires(settings, fields.pop("strength", None))
    return {name: value for name, value in fields.items() if value is not None}


def find_schedule(name: str, family: str) -> str | None:
    """Find a key of SCHEDULES by AUTOMATIC1111's or sdonnx' name, for a model of a family; None if there is none."""
    wanted = name.strip().lower().replace(" ", "_")
    labels = {label.lower().replace(" ", "_"): key for key, label in A1111_SCHEDULES.items() if key != "ays_sdxl"}
    key = wanted if wanted in A1111_SCHEDULES else labels.get(wanted)
    return "ays_sdxl" if key == "ays" and FAMILIES[family].time_ids else key


def second_pass_steps(count: int, strength: float) -> tuple[int | None, float]:
    """Convert AUTOMATIC1111's steps of the second pass to ``hires_steps`` and ``hires_strength``.

    It makes all of these steps: those of a schedule of ``count / strength`` that start at the strength.
    """
    share = min(strength, 0.999)
    if share <= 0:
        return None, strength
    total = int(min(count / share, 1e6))
    return total, _share(count, total)


def _share(count: int, total: int) -> float:
    """The strength at which this many of all steps are made."""
    return min(1.0, (count + 1e-6) / total)


def _hires(settings: Mapping[str, str], strength: float | None) -> dict[str, Any]:
    """The fields of hires fix."""
    share = 0.55 if strength is None else strength
    steps = _convert("hires_steps", settings.get("Hires steps", "")) or _convert(
        "num_inference_steps", settings.get("Steps", "")
    )
    if settings.get("Version") != "sdonnx" and steps is not None:
        steps, share = second_pass_steps(steps, share)
    elif steps is not None and share > 0:
        share = _share(int(steps * share + 1e-3), steps)  # the text has six digits of it
    return {
        "hires_steps": steps,
        "hires_strength": share,
        "hires_upscaler": _upscaler(settings.get("Hires upscaler")),
    }


def _upscaler(name: str | None) -> str | None:
    """The name as `Request` has it: in lower case, unless it is a package's."""
    return name.lower() if name is not None and name.lower() in UPSCALERS else name


def _variation(settings: Mapping[str, str]) -> tuple[int, float] | None:
    seed, strength = (settings.get(name, "") for name in ("Variation seed", "Variation seed strength"))
    try:
        return int(seed), float(strength)
    except ValueError:
        return None


def _convert(field: str, text: str) -> Any:
    """Convert a setting to a field's type; None if it isn't of it."""
    kind = FIELDS[field].kind
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return None


def _unquote(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value
    except ValueError:
        return value
