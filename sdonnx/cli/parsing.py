"""What is typed on the command line, as values."""

import re
from itertools import count as count_from
from pathlib import Path

from sdonnx_runtime.outputs.atomic import check_writable

import sdonnx


def parse_size(size: str | None) -> dict[str, int]:
    """The request's fields of "512x512".

    Raises:
        RequestError: it is something else.
    """
    if size is None:
        return {}
    parts = [number for number in map(_pixels, size.lower().split("x")) if number is not None]
    if len(parts) != 2 or size.lower().count("x") != 1:
        raise sdonnx.RequestError(f"size is '{size}'; give width and height in pixels, such as 512x512")
    return {"width": parts[0], "height": parts[1]}


def parse_variation(variation: str | None) -> tuple[int, float] | None:
    """Seed and strength of "7:0.2".

    Raises:
        RequestError: it is something else.
    """
    if variation is None:
        return None
    seed, _, strength = variation.partition(":")
    try:
        return int(seed), float(strength)
    except ValueError:
        raise sdonnx.RequestError(f"variation is '{variation}'; give a seed and a strength, such as 7:0.2") from None


def parse_hires(hires: str | None) -> dict[str, float | int]:
    """The request's fields of "2x", "1.5x:0.4" or "2x:0.4:12".

    Raises:
        RequestError: it is something else.
    """
    if hires is None:
        return {}
    scale, *others = hires.lower().split(":")
    kinds: dict[str, type[float] | type[int]] = {"hires_scale": float, "hires_strength": float, "hires_steps": int}
    try:
        if len(others) > 2:
            raise ValueError
        given = zip(kinds.items(), (scale.removesuffix("x"), *others), strict=False)
        return {name: kind(text) for (name, kind), text in given}
    except ValueError:
        said = "how many times larger, and if you like strength and steps, such as 2x or 2x:0.4:12"
        raise sdonnx.RequestError(f"hires is '{hires}'; give {said}") from None


def parse_refiner(refiner: str | None) -> tuple[str | None, dict[str, float]]:
    """The package of "sdxl-refiner-onnx" or "sdxl-refiner-onnx:0.7", and the request's field of the share."""
    if refiner is None:
        return None, {}
    package, _, share = refiner.rpartition(":")
    try:
        return (package, {"refiner_start": float(share)}) if package else (refiner, {})
    except ValueError:  # a colon of the path's own
        return refiner, {}


def parse_lora(lora: str) -> sdonnx.Lora:
    """The adapters of "grey.safetensors" or "grey.safetensors:0.8".

    Raises:
        RequestError: the scale is out of its range.
    """
    path, _, scale = lora.rpartition(":")
    try:
        return sdonnx.Lora(path=Path(path), scale=float(scale)) if path else sdonnx.Lora(path=Path(lora))
    except sdonnx.RequestError:
        raise
    except ValueError:  # a colon of the path's own
        return sdonnx.Lora(path=Path(lora))


def parse_embedding(embedding: str) -> tuple[Path, str | None]:
    """File and word of "teal.safetensors" or "teal.safetensors:<teal>"."""
    path, _, word = embedding.rpartition(":")
    if not path or Path(embedding).exists() or "/" in word or "\\" in word:  # a colon of the path's own
        return Path(embedding), None
    return Path(path), word


def parse_control(control: str) -> tuple[str, Path, dict[str, float]]:
    """The package and the picture of "openpose-onnx:pose.png", and fields of `Control` of "…:0.8:0.1:0.9".

    Parts are taken from the right, so that paths may have colons, as Windows' drives do.

    Raises:
        RequestError: it is something else.
    """
    parts, numbers = control.split(":"), list[float]()
    while len(parts) > 2 and len(numbers) < 3 and (number := _number(parts[-1])) is not None:
        numbers.insert(0, number)
        parts.pop()
    picture = parts.pop()
    if parts and re.fullmatch(r"[A-Za-z]", parts[-1]) and picture[:1] in ("\\", "/"):
        picture = f"{parts.pop()}:{picture}"
    package = ":".join(parts)
    if not package or not picture or _number(picture) is not None:
        said = "a package and a picture, and if you like scale, start and end, such as net-onnx:pose.png:0.8:0:0.5"
        raise sdonnx.RequestError(f"control is '{control}'; give {said}")
    return package, Path(picture), dict(zip(("scale", "start", "end"), numbers, strict=False))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_margins(margins: str) -> tuple[int, int, int, int]:
    """The pixels of "64,0,64,0".

    Raises:
        RequestError: it is something else.
    """
    pixels = [number for number in map(_pixels, margins.split(",")) if number is not None]
    if len(pixels) != 4 or margins.count(",") != 3:
        raise sdonnx.RequestError(f"outpaint is '{margins}'; give left,top,right,bottom in pixels, such as 64,0,64,0")
    left, top, right, bottom = pixels
    return left, top, right, bottom


def _pixels(text: str) -> int | None:
    """A whole number; None for what is none, or has more digits than any picture has pixels."""
    text = text.strip()
    return int(text) if text.isdecimal() and len(text) < 10 else None


def parse_numbers(name: str, numbers: str | None) -> tuple[float, ...] | None:
    """The numbers of "14.6,3.2,0.7".

    Raises:
        RequestError: one is none.
    """
    if numbers is None:
        return None
    try:
        return tuple(float(number) for number in numbers.split(","))
    except ValueError:
        raise sdonnx.RequestError(f"{name} are '{numbers}'; give numbers with commas, such as 14.6,3.2,0.7") from None


def parse_interval(interval: str | None) -> dict[str, tuple[float, float]]:
    """The request's field of the noise levels of "0.3,5.4", or of the shares of the steps of "0.1:0.9".

    Raises:
        RequestError: it is something else.
    """
    if interval is None:
        return {}
    field = "guidance_steps" if ":" in interval else "guidance_interval"
    numbers = parse_numbers("guidance-interval", interval.replace(":", ",")) or ()
    if len(numbers) != 2:
        said = "two noise levels, such as 0.3,5.4, or two shares of the steps, such as 0.1:0.9"
        raise sdonnx.RequestError(f"guidance-interval is '{interval}'; give {said}")
    return {field: (numbers[0], numbers[1])}


def output_paths(output: Path | None, request: sdonnx.Request) -> list[Path]:
    """A path for each picture; where none was given, one that doesn't exist.

    Raises:
        RequestError: the path given is not that of a PNG.
    """
    first = request.seed or 0 if request.variation is None else request.variation[0]
    seeds = [first + index for index in range(request.num_images)]
    if output is None:
        return [next_free_path(Path(f"sdonnx-{seed}.png")) for seed in seeds]
    if output.suffix.lower() != ".png":
        raise sdonnx.RequestError(f"the picture is named {output.name}; give a name that ends in .png")
    if request.num_images == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{seed}{output.suffix}") for seed in seeds]


def check_outputs(pictures: list[Path], preview: Path | None, latents: Path | None) -> None:
    """Finds out before the work whether everything can be written, each to a file of its own.

    Raises:
        RequestError: a name is that of another kind of file, or there twice.
        SdonnxError: a place can't be written to.
    """
    for option, path, suffix in (("--preview", preview, ".png"), ("--save-latents", latents, ".npz")):
        if path is not None and path.suffix.lower() != suffix:
            raise sdonnx.RequestError(f"{option} is {path.name}; give a name that ends in {suffix}")
    paths = [*pictures, *(path for path in (preview, latents) if path is not None)]
    if len({path.resolve() for path in paths}) < len(paths):
        raise sdonnx.RequestError("two of -o, --preview and --save-latents are one file; give each its own")
    for path in paths:
        check_writable(path)


def next_free_path(path: Path) -> Path:
    """The path, or where there is something, one like it with a number."""
    candidates = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count_from(2))
    return path if not path.exists() else next(other for other in candidates if not other.exists())
