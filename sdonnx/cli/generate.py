"""Generate and save the images of one request, with progress: `sdonnx run`, and each line of a batch file."""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from PIL.Image import Image
from rich.progress import MofNCompleteColumn, TextColumn
from sdonnx_runtime.arrays import Array
from sdonnx_runtime.images.preprocess import check_image, outpaint_canvas, resize_to_fit, snap_mask_to_latents, to_mask
from sdonnx_runtime.outputs.atomic import is_stream
from sdonnx_runtime.outputs.latents_file import is_left_over, save_latents
from sdonnx_runtime.outputs.metadata import save_grid, save_preview
from sdonnx_runtime.packages.manifest import Manifest
from sdonnx_runtime.request import CompleteRequest
from sdonnx_runtime.resolved import ResolvedRequest
from sdonnx_runtime.storage.staging import lock_file

import sdonnx
from sdonnx.cli.console import print_plan, print_usage, progress
from sdonnx.cli.parsing import check_outputs, grid_path, output_paths

logger = logging.getLogger(__name__)

Margins = tuple[int, int, int, int]
"""Pixels to outpaint: left, top, right, bottom."""


@dataclass(frozen=True, kw_only=True)
class OutputPaths:
    """The files that a request is saved to."""

    images: Path | None
    """A .png; None is a name made from the seed."""
    overwrite: bool = True
    """Whether existing images are replaced; otherwise a number is appended to the names of the new ones."""
    preview: Path | None = None
    """A .png, overwritten at each step."""
    latents: Path | None = None
    """An .npz for the final latents."""
    grid: bool = False
    """Whether several images are also saved as one."""
    upscale: bool = True
    """Whether the images of very small models are saved larger, by the package's factor."""
    provenance: bool = True
    """Whether the images say in XMP that they are AI-generated."""
    inputs: tuple[Path, ...] = ()
    """Files that the request reads, and that are never replaced."""


def generate(
    pipe: sdonnx.Pipeline, fields: dict[str, Any], outputs: OutputPaths, margins: Margins | None = None
) -> tuple[sdonnx.Result, list[Path | None], Path | None]:
    """Generate and save the images of a request; returns the result, the images' paths and the grid's.

    The path of a refused image is None; the grid has the others.

    Args:
        pipe: the pipeline.
        fields: the fields of `Request`.
        outputs: the files to write.
        margins: outpaint the request's image by these pixels.

    Raises:
        RequestError: the request is invalid, a file name has the wrong suffix, or an output is an input.
        SdonnxError: a path is not writable; or as `Pipeline.generate`.
    """
    resolved = resolve_fields(pipe, fields, margins)
    overwrite = outputs.overwrite and outputs.images is not None
    paths = output_paths(outputs.images, resolved.request)
    grid = grid_path(outputs.images, paths) if outputs.grid else None
    written = [*paths, *([] if grid is None else [grid])]
    check_outputs(written, outputs.preview, outputs.latents, inputs=outputs.inputs, overwrite=overwrite)
    recovery = _Recovery(outputs.latents, paths[0])
    stream = pipe.stream(resolved)

    def save_images(result: sdonnx.Result) -> list[Path | None]:
        keeps_size = resolved.request.padding_mask_crop is not None
        factor = pipe.package.manifest.defaults.enlarge if outputs.upscale and not keeps_size else 1
        save = partial(sdonnx.save_png, enlarge=factor, overwrite=overwrite, provenance=outputs.provenance)
        return [None if index in result.refused else save(result, index, path) for index, path in enumerate(paths)]

    try:
        result, saved = _generate(pipe, stream, outputs.preview, recovery, save_images)
    except sdonnx.SdonnxError:  # its message names the recovery file
        raise
    except BaseException:
        recovery.delete()
        raise
    kept = [path for path in saved if path is not None]
    return result, saved, save_grid(kept, grid, overwrite=overwrite) if grid is not None and kept else None


class _Recovery:
    """The file of latents that exists until their images are saved, or longer if the user asked for it.

    It is locked meanwhile: what a killed process left is replaced by the next one, and what a living one has is not.
    """

    def __init__(self, asked: Path | None, image: Path) -> None:
        self._asked = asked
        self._beside_image = (Path("sdonnx") if is_stream(image) else image).with_suffix(".npz")
        self._saved: Path | None = None
        self._lock: IO[bytes] | None = None

    def save(self, latents: Array, request: CompleteRequest, model: str, *, compute: str, keep: bool = False) -> Path:
        """Save the latents, and return the file; with ``keep``, it is not deleted later."""
        self._unlock()
        path = self._asked or self._saved or self._beside_image
        is_own = path in (self._asked, self._saved) or is_left_over(path)
        temporary = self._asked is None and not keep
        self._saved = save_latents(
            path, latents, request, model, compute=compute, overwrite=is_own, temporary=temporary
        )
        if temporary:
            self._lock = self._saved.open("rb+")
            lock_file(self._lock)
        return self._saved

    def finish(self, result: sdonnx.Result) -> None:
        """Save what the user asked for, now with its errors; delete what they didn't."""
        if self._asked is not None:
            save_latents(self._asked, result.latents, result.request, result.model, compute=result.compute)
        self.delete()

    def delete(self) -> None:
        """Delete the file unless the user asked for it."""
        self._unlock()
        path = self._saved or self._beside_image
        if self._asked is None and is_left_over(path):
            path.unlink()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()


def resolve_fields(pipe: sdonnx.Pipeline, fields: dict[str, Any], margins: Margins | None) -> ResolvedRequest:
    """Resolve the fields of `Request`, with ``margins`` as an outpainting; raises as `Pipeline.resolve`."""
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
    area = 0 if is_resized else manifest.defaults.area
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
    pipe: sdonnx.Pipeline,
    stream: sdonnx.Stream,
    preview: Path | None,
    recovery: _Recovery,
    save_images: Callable[[sdonnx.Result], list[Path | None]],
) -> tuple[sdonnx.Result, list[Path | None]]:
    """Generate and save; the latents are saved before they are decoded, in case that fails or ends the process."""
    model = pipe.package.name

    def save_if_possible(latents: Array, sampled: CompleteRequest) -> None:
        with suppress(sdonnx.SdonnxError):
            recovery.save(latents, sampled, model, compute=stream.compute)

    stream.before_decoding(save_if_possible)
    if stream.plan is not None:
        print_plan(stream.plan)
    try:
        _show_progress(stream, preview, pipe.package.manifest.latents.downscale)
        if stream.plan is not None:
            print_usage(stream.result)
        paths = save_images(stream.result)
    except (sdonnx.SdonnxError, MemoryError) as error:
        if stream.latents is None:
            raise
        kind = sdonnx.DeviceError if isinstance(error, MemoryError) else type(error)
        reason = "out of memory" if isinstance(error, MemoryError) else str(error)
        try:
            saved = recovery.save(stream.latents, stream.latents_request, model, compute=stream.compute, keep=True)
        except sdonnx.SdonnxError as other:
            raise kind(f"{reason}; could not save latents either: {other}") from None
        options = "" if pipe.package.vae is None else f" --vae {pipe.package.vae.root}"
        options += "" if pipe.safety is None else f" --safety {pipe.safety.mode}"
        resume = f"sdonnx decode {saved} -m {pipe.package.root}{options}"
        raise kind(f"{reason}; latents saved; resume with: {resume}") from None
    recovery.finish(stream.result)
    return stream.result, paths


def _show_progress(stream: sdonnx.Stream, preview: Path | None, downscale: int) -> None:
    """Run the stream with a progress bar, and save a preview after each step."""
    with progress("{task.description}", MofNCompleteColumn(), TextColumn("{task.fields[pace]}")) as bar:
        task = bar.add_task("encoding the prompt", total=None, pace="")
        stream.on_upscaling(lambda done, total: bar.update(task, description=f"upscaling, tile {done} of {total},"))
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
