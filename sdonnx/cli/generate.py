"""Generate and save the images of one request, with progress: `sdonnx run`, and each line of a batch file."""

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
from sdonnx_runtime.request import CompleteRequest
from sdonnx_runtime.resolved import ResolvedRequest

import sdonnx
from sdonnx.cli.console import print_plan, print_usage, progress
from sdonnx.cli.parsing import check_outputs, next_free_path, output_paths

logger = logging.getLogger(__name__)

Margins = tuple[int, int, int, int]
"""Pixels to outpaint: left, top, right, bottom."""


@dataclass(frozen=True, kw_only=True)
class OutputPaths:
    """The files that a request is saved to."""

    images: Path | None
    """A .png; None chooses a free name."""
    preview: Path | None = None
    """A .png, overwritten at each step."""
    latents: Path | None = None
    """An .npz for the final latents."""
    upscale: bool = True
    """Whether the images of very small models are saved larger, by the package's factor."""


def generate(
    pipe: sdonnx.Pipeline, fields: dict[str, Any], outputs: OutputPaths, margins: Margins | None = None
) -> tuple[sdonnx.Result, list[Path]]:
    """Generate and save the images of a request.

    Args:
        pipe: the pipeline.
        fields: the fields of `Request`.
        outputs: the files to write.
        margins: outpaint the request's image by these pixels.

    Raises:
        RequestError: the request is invalid, or a file name has the wrong suffix.
        SdonnxError: a path is not writable; or as `Pipeline.generate`.
    """
    resolved = _resolve(pipe, fields, margins)
    paths = output_paths(outputs.images, resolved.request)
    check_outputs(paths, outputs.preview, outputs.latents)
    recovery_path = outputs.latents or next_free_path(paths[0].with_suffix(".npz"))
    try:
        result = _generate(pipe, resolved, outputs.preview, recovery_path)
    except sdonnx.SdonnxError:  # its message names the recovery file
        raise
    except BaseException:
        _cleanup(recovery_path, outputs)
        raise
    _cleanup(recovery_path, outputs)
    keeps_size = resolved.request.padding_mask_crop is not None
    factor = pipe.package.manifest.defaults.enlarge if outputs.upscale and not keeps_size else 1
    try:
        for index, path in enumerate(paths):
            sdonnx.save_png(result, index, path, enlarge=factor)
    finally:  # the latents are saved even if a PNG can't be
        if outputs.latents is not None:
            save_latents(outputs.latents, result.latents, result.request, result.model)
    return result, paths


def _cleanup(recovery_path: Path, outputs: OutputPaths) -> None:
    """Remove the recovery file unless the user asked for the latents."""
    if recovery_path != outputs.latents:
        recovery_path.unlink(missing_ok=True)


def _resolve(pipe: sdonnx.Pipeline, fields: dict[str, Any], margins: Margins | None) -> ResolvedRequest:
    manifest = pipe.package.manifest
    if margins is not None:
        image, mask = _outpaint(fields, margins, manifest)
        fields = {**fields, "image": image, "mask_image": mask}
    resolved = pipe.resolve(fields.get("prompt", ""), **{name: fields[name] for name in fields if name != "prompt"})
    if margins is None or resolved.request.paste:
        return resolved
    return pipe.resolve(_snap_mask(resolved.request, manifest))


def _outpaint(fields: dict[str, Any], margins: Margins, manifest: Manifest) -> tuple[Image, Image]:
    """Make the outpainting canvas and its mask, of any size if the request is to be resized anyway."""
    image = fields.get("image")
    if image is None or fields.get("mask_image") is not None:
        raise sdonnx.RequestError("--outpaint requires --image, without --mask (it makes the mask itself)")
    is_resized = fields.get("width") is not None or fields.get("padding_mask_crop") is not None
    check_image("image", image)
    area = 0 if is_resized else manifest.defaults.size**2
    return outpaint_canvas(image, margins, area=area, multiple=manifest.latents.downscale)


def _snap_mask(request: CompleteRequest, manifest: Manifest) -> CompleteRequest:
    """Extend the mask to whole latent pixels; without pasting, partly masked ones would stay unchanged."""
    size, fit = (request.width, request.height), request.fit
    assert request.image is not None and request.mask_image is not None  # noqa: S101 — the outpainting canvas'
    mask = to_mask(resize_to_fit(request.mask_image, size, fit))
    return replace(
        request,
        image=resize_to_fit(request.image, size, fit),
        mask_image=snap_mask_to_latents(mask, manifest.latents.downscale),
    )


def _generate(
    pipe: sdonnx.Pipeline, resolved: ResolvedRequest, preview: Path | None, recovery_path: Path
) -> sdonnx.Result:
    """Generate; the latents are saved before they are decoded, in case decoding fails or ends the process."""
    stream = pipe.stream(resolved)

    def save(latents: Array, sampled: CompleteRequest) -> None:
        save_latents(recovery_path, latents, sampled, pipe.package.name)

    def save_if_possible(latents: Array, sampled: CompleteRequest) -> None:
        with suppress(sdonnx.SdonnxError):
            save(latents, sampled)

    stream.before_decoding(save_if_possible)
    if stream.plan is not None:
        print_plan(stream.plan)
    try:
        _show_progress(stream, preview, pipe.package.manifest.latents.downscale)
    except (sdonnx.SdonnxError, MemoryError) as error:
        if stream.latents is None:
            raise
        kind = sdonnx.DeviceError if isinstance(error, MemoryError) else type(error)
        reason = "out of memory" if isinstance(error, MemoryError) else str(error)
        try:
            save(stream.latents, stream.latents_request)
        except sdonnx.SdonnxError as other:
            raise kind(f"{reason}; could not save latents either: {other}") from None
        vae = "" if pipe.package.vae is None else f" --vae {pipe.package.vae.root}"
        resume = f"sdonnx decode {recovery_path} -m {pipe.package.root}{vae}"
        raise kind(f"{reason}; latents saved; resume with: {resume}") from None
    if stream.plan is not None:
        print_usage(stream.result)
    return stream.result


def _show_progress(stream: sdonnx.Stream, preview: Path | None, downscale: int) -> None:
    """Run the stream with a progress bar, and save a preview after each step."""
    with progress("{task.description}", MofNCompleteColumn(), TextColumn("{task.fields[pace]}")) as bar:
        task = bar.add_task("encoding the prompt", total=None, pace="")
        for done, step in enumerate(stream, 1):
            total = step.num_steps * step.num_images
            what = "decoding" if done == total else "denoising"
            pace = f"{step.seconds:.2f} s/step"
            bar.update(task, description=what, total=total, completed=done, pace=pace)
            if preview is not None:
                try:
                    height, width = (side * downscale for side in step.latents.shape[2:])
                    save_preview(preview, step.preview(), (width, height))
                except sdonnx.SdonnxError as error:
                    logger.warning("preview disabled: %s", error)
                    preview = None
