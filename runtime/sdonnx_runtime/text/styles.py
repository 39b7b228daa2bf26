"""Styles: prompts by name in AUTOMATIC1111's ``styles.csv``, which are merged with a request's."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from sdonnx_runtime.errors import RequestError

_MAX_BYTES = 16 << 20
_PLACE = "{prompt}"
_EXPECTED = "give a CSV file with the columns name, prompt and negative_prompt, as AUTOMATIC1111's styles.csv"


@dataclass(frozen=True, kw_only=True)
class Style:
    """A style: a prompt and a negative one, with ``{prompt}`` where the request's own comes."""

    name: str
    prompt: str
    negative_prompt: str


def read_styles(path: Path) -> dict[str, Style]:
    """Read the styles of a file by name, in its order; of several with one name the last counts.

    Rows without a name are skipped, and those of which it begins with ``#``. The column ``text`` is ``prompt`` in old
    files.

    Raises:
        RequestError: the file can't be read, or has no styles.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise RequestError(f"the styles file {path} is too large; it may have {_MAX_BYTES >> 20} MB")
        text = data.decode("utf-8-sig")
        rows = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
        columns = rows.fieldnames or ()
        prompt = next((name for name in ("prompt", "text") if name in columns), None)
        if prompt is None or "name" not in columns:
            raise RequestError(f"{path} is not a file of styles; {_EXPECTED}")
        styles = (_style(row, prompt) for row in rows)
        return {each.name: each for each in styles if each.name and not each.name.startswith("#")}
    except OSError as error:
        raise RequestError(f"the styles file {path} can't be read: {error.strerror}; {_EXPECTED}") from None
    except UnicodeDecodeError:
        raise RequestError(f"the styles file {path} is not UTF-8; save it as UTF-8") from None
    except csv.Error as error:
        raise RequestError(f"{path} is not a file of styles ({error}); {_EXPECTED}") from None


def _style(row: Mapping[str, str | None], prompt: str) -> Style:
    return Style(
        name=row.get("name") or "", prompt=row.get(prompt) or "", negative_prompt=row.get("negative_prompt") or ""
    )


def find_styles(path: Path | None, names: Sequence[str]) -> list[Style]:
    """Read the styles of these names.

    Raises:
        RequestError: there is no file of styles, or no such style; or as `read_styles` does.
    """
    if not names:
        return []
    if path is None:
        raise RequestError(f"the style '{names[0][:80]}' requires a file of styles; give it with --styles (styles=)")
    styles = read_styles(path)
    for name in names:
        if name not in styles:
            near = get_close_matches(name, styles, n=3, cutoff=0.4) or list(styles)[:10]
            raise RequestError(f"{path} has no style '{name[:80]}'; choose {', '.join(near)}")
    return [styles[name] for name in names]


def apply_styles(prompt: str, styles: Iterable[str]) -> str:
    """Merge a prompt with the prompts of styles, one after another, as AUTOMATIC1111 does.

    It takes the place of ``{prompt}``; a style without that comes after it.
    """
    for style in styles:
        parts = filter(None, (prompt.strip(), style.strip()))
        prompt = style.replace(_PLACE, prompt) if _PLACE in style else ", ".join(parts)
    return prompt
