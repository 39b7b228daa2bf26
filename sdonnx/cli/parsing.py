"""Parse option values of the command line; build and check output paths."""

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from sdonnx_runtime.outputs.atomic import check_writable, comparable, is_stream
from sdonnx_runtime.request import Request

import sdonnx


def decode_argument(text: str) -> str:
    """Return the text of an argument that was typed as UTF-8, whatever the locale's encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:  # Python keeps the bytes that the locale doesn't know as surrogates
        with suppress(UnicodeError):
            return os.fsencode(text).decode()
    return text


def parse_size(size: str) -> dict[str, int]:
    """Parse "512x512" to the request fields width and height.

    Raises:
        RequestError: the text has another form.
    """
    sides = [pixels for pixels in map(_parse_pixels, size.lower().split("x")) if pixels is not None]
    if len(sides) != 2 or size.lower().count("x") != 1:
        raise sdonnx.RequestError(f"size is '{size}'; give width and height in pixels, such as 512x512")
    return {"width": sides[0], "height": sides[1]}


def parse_variation(variation: str) -> dict[str, tuple[int, float]]:
    """Parse "7:0.2" to the request field variation: seed and strength.

    Raises:
        RequestError: the text has another form.
    """
    seed, _, strength = variation.partition(":")
    try:
        return {"variation": (int(seed), float(strength))}
    except ValueError:
        raise sdonnx.RequestError(f"variation is '{variation}'; give a seed and a strength, such as 7:0.2") from None


def parse_hires(hires: str) -> dict[str, float | int]:
    """Parse "2x", "1.5x:0.4" or "2x:0.4:12" to the request fields of the hires pass.

    Raises:
        RequestError: the text has another form.
    """
    scale, *others = hires.lower().split(":")
    kinds: dict[str, type[float] | type[int]] = {"hires_scale": float, "hires_strength": float, "hires_steps": int}
    try:
        if len(others) > 2:
            raise ValueError
        texts = (scale.removesuffix("x"), *others)
        return {name: kind(text) for (name, kind), text in zip(kinds.items(), texts, strict=False)}
    except ValueError:
        expected = "a scale, optionally with strength and steps, such as 2x or 2x:0.4:12"
        raise sdonnx.RequestError(f"hires is '{hires}'; give {expected}") from None


def parse_refiner(refiner: str | None) -> tuple[str | None, dict[str, float]]:
    """Split "sdxl-refiner-onnx:0.7" into the package and the request field refiner_start."""
    if refiner is None:
        return None, {}
    package, _, start = refiner.rpartition(":")
    try:
        return (package, {"refiner_start": float(start)}) if package else (refiner, {})
    except ValueError:  # the colon is part of the path
        return refiner, {}


def parse_lora(lora: str) -> sdonnx.Lora:
    """Parse "grey.safetensors" or "grey.safetensors:0.8".

    Raises:
        RequestError: the scale is out of its range.
    """
    path, _, scale = lora.rpartition(":")
    try:
        return sdonnx.Lora(path=Path(path), scale=float(scale)) if path else sdonnx.Lora(path=Path(lora))
    except sdonnx.RequestError:
        raise
    except ValueError:  # the colon is part of the path
        return sdonnx.Lora(path=Path(lora))


def parse_embedding(embedding: str) -> tuple[Path, str | None]:
    """Parse "teal.safetensors" or "teal.safetensors:<teal>" to the file and its trigger word."""
    path, _, trigger = embedding.rpartition(":")
    if not path or Path(embedding).exists() or "/" in trigger or "\\" in trigger:  # the colon is part of the path
        return Path(embedding), None
    return Path(path), trigger


def parse_control(control: str, option: str = "control") -> tuple[str, Path, dict[str, float]]:
    """Parse "openpose-onnx:pose.png:0.8:0.1:0.9" to package, image file and the fields scale, start, end of `Control`.

    Those of `IPAdapter` are the same; ``option`` names the command line's in errors.

    The text is read from the right, so that paths may have colons, as Windows drives do.

    Raises:
        RequestError: the text has another form.
    """
    parts, numbers = control.split(":"), list[float]()
    while len(parts) > 2 and len(numbers) < 3 and (number := _parse_number(parts[-1])) is not None:
        numbers.insert(0, number)
        parts.pop()
    image = parts.pop()
    if parts and re.fullmatch(r"[A-Za-z]", parts[-1]) and image[:1] in ("\\", "/"):
        image = f"{parts.pop()}:{image}"
    package = ":".join(parts)
    if not package or not image or _parse_number(image) is not None:
        expected = "a package and an image, optionally scale, start and end, such as PACKAGE:image.png:0.8:0:0.5"
        raise sdonnx.RequestError(f"{option} is '{control}'; give {expected}")
    return package, Path(image), dict(zip(("scale", "start", "end"), numbers, strict=False))


def _parse_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_margins(margins: str) -> tuple[int, int, int, int]:
    """Parse "64,0,64,0" to pixels: left, top, right, bottom.

    Raises:
        RequestError: the text has another form.
    """
    pixels = [number for number in map(_parse_pixels, margins.split(",")) if number is not None]
    if len(pixels) != 4 or margins.count(",") != 3:
        raise sdonnx.RequestError(f"outpaint is '{margins}'; give left,top,right,bottom in pixels, such as 64,0,64,0")
    left, top, right, bottom = pixels
    return left, top, right, bottom


def _parse_pixels(text: str) -> int | None:
    """Parse a whole number of up to 9 digits; None for any other text."""
    text = text.strip()
    return int(text) if text.isdecimal() and len(text) < 10 else None


def parse_numbers(name: str, numbers: str) -> tuple[float, ...]:
    """Parse "14.6,3.2,0.7"; ``name`` is the option's, for the error.

    Raises:
        RequestError: a part is not a number.
    """
    try:
        return tuple(float(number) for number in numbers.split(","))
    except ValueError:
        raise sdonnx.RequestError(f"{name} are '{numbers}'; give numbers with commas, such as 14.6,3.2,0.7") from None


def parse_interval(interval: str) -> dict[str, tuple[float, float]]:
    """Parse sigmas, "0.3,5.4", to guidance_interval, or fractions of the steps, "0.1:0.9", to guidance_steps.

    Raises:
        RequestError: the text has another form.
    """
    field = "guidance_steps" if ":" in interval else "guidance_interval"
    numbers = parse_numbers("guidance-interval", interval.replace(":", ","))
    if len(numbers) != 2:
        expected = "two sigmas, such as 0.3,5.4, or two fractions of the steps, such as 0.1:0.9"
        raise sdonnx.RequestError(f"guidance-interval is '{interval}'; give {expected}")
    return {field: (numbers[0], numbers[1])}


def output_paths(output: Path | None, request: Request) -> list[Path]:
    """Return a path for each image of a request with a seed; if ``output`` is None, in the working directory.

    Raises:
        RequestError: ``output`` does not end in .png, and is no pipe or device.
    """
    first = request.seed if request.variation is None else request.variation[0]
    assert first is not None  # noqa: S101 — for the type checker
    seeds = [first + index for index in range(request.num_images)]
    if output is None:
        return [Path(f"sdonnx-{seed}.png") for seed in seeds]
    is_file = output.suffix.lower() == ".png"
    if not is_file and not is_stream(output):
        raise sdonnx.RequestError(f"the image is named {output.name}; give a name that ends in .png")
    if request.num_images == 1:
        return [output]
    if not is_file:
        raise sdonnx.RequestError(f"{output} takes one image, and these are {request.num_images}; give a name of files")
    return [output.with_name(f"{output.stem}-{seed}{output.suffix}") for seed in seeds]


_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:/(?!/)", re.IGNORECASE)
"""Of a URL that became a path, in which two slashes are one; a Windows drive has one letter."""


def is_url(output: Path) -> bool:
    """Whether the name of an output is a URL."""
    return _SCHEME.match(output.as_posix()) is not None


def grid_path(output: Path | None, images: list[Path]) -> Path | None:
    """Return the path of the grid of the images of `output_paths`; None for a single one, which has none."""
    first = images[0] if output is None else output
    return None if len(images) == 1 else first.with_name(f"{first.stem}-grid.png")


def check_outputs(
    images: Sequence[Path],
    preview: Path | None = None,
    latents: Path | None = None,
    *,
    inputs: Iterable[Path] = (),
    overwrite: bool = True,
) -> None:
    """Check that every output can be written, each to its own file; ``overwrite`` is about the images.

    Raises:
        RequestError: a name has the wrong suffix, two names are one file, or an output is one of ``inputs``.
        SdonnxError: a path is not writable.
    """
    for option, path, suffix in (("--preview", preview, ".png"), ("--save-latents", latents, ".npz")):
        if path is not None and path.suffix.lower() != suffix:
            raise sdonnx.RequestError(f"{option} is {path.name}; give a name that ends in {suffix}")
    others = [path for path in (preview, latents) if path is not None]
    paths = [*images, *others] if overwrite else others
    if len({comparable(path) for path in (*images, *others)}) < len(images) + len(others):
        raise sdonnx.RequestError("two of -o, --preview and --save-latents are the same file; give each its own")
    check_not_inputs(paths, inputs)
    for path in images:
        check_writable(path, overwrite=overwrite)
    for path in others:
        check_writable(path)


def check_not_inputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Check that no output is a file that the command reads, also by another name.

    Raises:
        RequestError: one is.
    """
    existing = [path for path in inputs if path.exists() and not is_stream(path)]
    for output in outputs:
        for path in existing:
            if output.exists() and output.samefile(path):
                raise sdonnx.RequestError(f"{output} is an input of this command; give the output another name")
