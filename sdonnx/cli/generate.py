"""Pictures made, followed on the screen, and saved: what `sdonnx run` does once or for each line of a file."""

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image
from rich.progress import MofNCompleteColumn, TextColumn
from sdonnx_runtime.arrays import Array
from sdonnx_runtime.images.preprocess import check_image, outpaint_canvas, resize_to_fit, snap_mask_to_latents, to_mask
from sdonnx_runtime.outputs.latents_file import save_latents
from sdonnx_runtime.outputs.metadata import save_preview
from sdonnx_runtime.packages.manifest import Manifest
from sdonnx_runtime.request import given

import sdonnx
from sdonnx.cli.console import print_plan, print_usage, progress
from sdonnx.cli.parsing import check_outputs, next_free_path, output_paths

logger = logging.getLogger(__name__)

Margins = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class OutputPaths:
    """Where what is made goes."""

    pictures: Path | None
    """A .png, None for a name that is not taken yet."""
    preview: Path | None = None
    """A .png that shows what is becoming of it."""
    latents: Path | None = None
    """An .npz for what was sampled."""
    enlarge: bool = True
    """Whether pictures of a model that makes very small ones are saved larger."""


def generate(
    pipe: sdonnx.Pipeline, fields: dict[str, Any], outputs: OutputPaths, margins: Margins | None = None
) -> tuple[sdonnx.Result, list[Path]]:
    """Makes and saves the pictures of a request.

    Args:
        pipe: the package.
        fields: those of a `Request`, as they were asked for.
        outputs: where to.
        margins: for outpainting, what is added to the request's image.

    Raises:
        RequestError: the request can't be served, or a name is none of its kind.
        SdonnxError: a place can't be written to; or as `Pipeline.generate` does.
    """
    request = _checked(pipe, fields, margins)
    paths = output_paths(outputs.pictures, request)
    check_outputs(paths, outputs.preview, outputs.latents)
    rescue = outputs.latents or next_free_path(paths[0].with_suffix(".npz"))
    try:
        result = _generate(pipe, request, outputs.preview, rescue)
    except sdonnx.SdonnxError:  # it says what is kept
        raise
    except BaseException:
        _tidy(rescue, outputs)
        raise
    _tidy(rescue, outputs)
    keeps_size = request.padding_mask_crop is not None
    factor = pipe.package.manifest.defaults.enlarge if outputs.enlarge and not keeps_size else 1
    try:
        for index, path in enumerate(paths):
            sdonnx.save_png(result, index, path, enlarge=factor)
    finally:  # neither is lost for the other's failing
        if outputs.latents is not None:
            save_latents(outputs.latents, result.latents, result.request, result.model)
    return result, paths


def _tidy(rescue: Path, outputs: OutputPaths) -> None:
    """Removes what was kept in case of need alone."""
    if rescue != outputs.latents:
        rescue.unlink(missing_ok=True)


def _checked(pipe: sdonnx.Pipeline, fields: dict[str, Any], margins: Margins | None) -> sdonnx.Request:
    manifest = pipe.package.manifest
    if margins is not None:
        picture, mask = _outpainted(fields, margins, manifest)
        fields = {**fields, "image": picture, "mask_image": mask}
    request = pipe.check(fields.get("prompt", ""), **{name: fields[name] for name in fields if name != "prompt"})
    return _in_whole_cells(request, manifest) if margins is not None and not request.paste else request


def _outpainted(fields: dict[str, Any], margins: Margins, manifest: Manifest) -> tuple[Image, Image]:
    """The canvas and its mask; one that is to have another size anyway may have any."""
    picture = fields.get("image")
    if picture is None or fields.get("mask_image") is not None:
        raise sdonnx.RequestError("--outpaint goes with --image and without --mask; it masks what is new by itself")
    sized = fields.get("width") is not None or fields.get("padding_mask_crop") is not None
    check_image("image", picture)
    area = 0 if sized else manifest.defaults.size**2
    return outpaint_canvas(picture, margins, area=area, multiple=manifest.latents.downscale)


def _in_whole_cells(request: sdonnx.Request, manifest: Manifest) -> sdonnx.Request:
    """Without pasting, cells that are only partly new would stay as they are."""
    size, fit = (given(request.width), given(request.height)), request.fit
    mask = to_mask(resize_to_fit(given(request.mask_image), size, fit))
    return replace(
        request,
        image=resize_to_fit(given(request.image), size, fit),
        mask_image=snap_mask_to_latents(mask, manifest.latents.downscale),
    )


def _generate(pipe: sdonnx.Pipeline, request: sdonnx.Request, preview: Path | None, rescue: Path) -> sdonnx.Result:
    """The result; what was sampled is in ``rescue`` before it is decoded, should that fail or end the process."""
    stream = pipe.stream(request)

    def keep(latents: Array, of: sdonnx.Request) -> None:
        save_latents(rescue, latents, of, pipe.package.name)

    def keep_if_possible(latents: Array, of: sdonnx.Request) -> None:
        with suppress(sdonnx.SdonnxError):
            keep(latents, of)

    stream.before_decoding(keep_if_possible)
    if stream.plan is not None:
        print_plan(stream.plan)
    try:
        _follow(stream, preview, pipe.package.manifest.latents.downscale)
    except (sdonnx.SdonnxError, MemoryError) as error:
        if stream.latents is None:
            raise
        kind = sdonnx.DeviceError if isinstance(error, MemoryError) else type(error)
        said = "there is too little memory to go on" if isinstance(error, MemoryError) else str(error)
        try:
            keep(stream.latents, stream.latents_request)
        except sdonnx.SdonnxError as other:
            raise kind(f"{said}; what was sampled is lost too: {other}") from None
        vae = "" if pipe.package.vae is None else f" --vae {pipe.package.vae.root}"
        raise kind(f"{said}; what was sampled is kept: sdonnx decode {rescue} -m {pipe.package.root}{vae}") from None
    if stream.plan is not None:
        print_usage(stream.result)
    return stream.result


def _follow(stream: sdonnx.Stream, preview: Path | None, downscale: int) -> None:
    with progress("{task.description}", MofNCompleteColumn(), TextColumn("{task.fields[pace]}")) as bar:
        task = bar.add_task("encoding the prompt", total=None, pace="")
        for done, step in enumerate(stream, 1):
            total = step.num_steps * step.num_images
            what = "decoding" if done == total else "denoising"
            pace = f"{step.seconds:.2f} s/step"
            bar.update(task, description=what, total=total, completed=done, pace=pace)
            if preview is not None:
                try:
                    height, width = (cells * downscale for cells in step.latents.shape[2:])
                    save_preview(preview, step.preview(), (width, height))
                except sdonnx.SdonnxError as error:
                    logger.warning("going on without a preview: %s", error)
                    preview = None
