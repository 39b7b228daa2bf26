"""Export: turn a checkpoint into a package, whole or not at all."""

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.errors import ExportError, RequestError
from sdonnx_runtime.packages.manifest import Manifest, Source, write_manifest
from sdonnx_runtime.packages.variant import PLAIN
from sdonnx_runtime.sampling.scheduler_config import PREDICTION_TYPES

from sdonnx_export.checkpoint_model import Report
from sdonnx_export.checkpoints.fuse_lora import fuse_loras
from sdonnx_export.checkpoints.open import NOTHING, check_pipeline, open_source
from sdonnx_export.checkpoints.safety_checker import add_safety_checker
from sdonnx_export.models.variants import VariantBuilder
from sdonnx_export.operators.precision import MixedPrecision, PrecisionSpec, parse_precision
from sdonnx_export.operators.targets import OPERATORS, find_operators
from sdonnx_export.packaging.output_directory import default_output, replace_package
from sdonnx_export.packaging.preview import fit_preview
from sdonnx_export.packaging.verify import verify
from sdonnx_export.packaging.writer import GRAPH, hash_files, make_manifest, write_components, write_graph
from sdonnx_export.quantization.calibration import ActivationRanges, Calibration, calibrate, delete_work

logger = logging.getLogger(__name__)

_NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})
_BUILT_IN_CALIBRATIONS = ("full", "fast", "none")


def export(
    source: str | None,
    output: Path | None = None,
    *,
    precision: str | MixedPrecision | None = None,
    target: str = "generic",
    vae: str | None = None,
    unet: str | None = None,
    text_encoders: Sequence[str] = (),
    base: str | None = None,
    prediction_type: str | None = None,
    image_encoder: str | None = None,
    revision: str | None = None,
    via: str = "native",
    calibration: str = "full",
    defaults: Mapping[str, Any] = _NO_DEFAULTS,
    loras: Sequence[Lora] = (),
    safety_checker: bool = False,
    force: bool = False,
    report: Report = lambda _what, _done: None,
) -> Path:
    """Turn a checkpoint into a package and return its directory.

    Args:
        source: a diffusers directory, a Hub id, a single ``.safetensors``, ``.ckpt``, ``.bin`` or ``.gguf`` file, or a
            package of fp32 or fp16; None composes a model of ``unet`` and the others or, without it, exports ``vae``
            alone.
        output: the package's directory; None is the source's name with ``-onnx`` in the working directory.
        precision: fp32; fp16, int8-weights or int4 for smaller weights (the arithmetic stays float32); int8 computes
            in 8 bits; mixed:FILE, or a `MixedPrecision`, chooses for each layer. Targets of GPUs support fp16, in which
            they compute, and fp32. None is fp32 for generic, int8 for openvino, and fp16 for a GPU.
        target: what the graphs are made for: ``generic`` runs on every device, cuda, directml, webgpu and openvino on
            that one. Graphs for openvino differ from generic ones in int8 alone.
        vae: where to take the VAE from instead of ``source``; also a VAE's own directory, Hub id or package.
        unet: where to take the U-Net from instead of ``source``, with its scheduler and settings; also a file or
            directory of a U-Net alone.
        text_encoders: where to take text encoders from instead of ``source``; also a file or directory of one alone.
            Of SDXL's two, the width tells which one it is.
        base: a checkpoint or package that lends the components which ``source`` lacks, such as text encoders; or the
            model that a ControlNet in ``source`` is stored relative to (a difference, a Control-LoRA).
        image_encoder: the directory or Hub id of the CLIP image encoder of an IP-Adapter in ``source``; None looks for
            it beside the file, as h94/IP-Adapter has it.
        prediction_type: epsilon, v_prediction or sample, whatever the source says.
        revision: branch, tag or commit of the source's Hub id, or of the VAE's where it is alone.
        via: ``native`` (written graphs, no torch) or ``optimum`` (traced by optimum-onnx).
        calibration: what int8 takes its ranges from: full or fast (a trajectory for each of the prompts that come
            with sdonnx, or for the first of them), none (ranges are found while running, and fewer layers are int8),
            or a file with one prompt per line. A VAE alone and an upscaler have no prompts: full and fast are images
            of random colors.
            A ControlNet or T2I-Adapter can't be calibrated without a model: its larger convolutions compute in
            float32.
        defaults: fields of `Defaults` that suit the model and that its configs don't have.
        loras: LoRAs to fuse into the weights.
        safety_checker: whether the package gets the safety checker of ``source`` (1.2 GB in fp32); a package as the
            source keeps its own.
        force: replace ``output`` if it exists.
        report: progress callback.

    Raises:
        RequestError: the precision or the prediction type is unknown, there is neither a source nor a VAE, or an
            adapter can't be read or is for another model.
        ExportError: the source can't be read or exported, the precision file is invalid, the target does not support
            the precision, or the output can't be written.
    """
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise RequestError(f"prediction type '{prediction_type}' is unknown; choose {', '.join(PREDICTION_TYPES)}")
    if target not in OPERATORS:
        raise RequestError(f"target '{target}' is unknown; choose {', '.join(OPERATORS)}")
    if precision is None:
        precision = _DEFAULT_PRECISIONS.get(target, "fp16")
    spec = parse_precision(precision) if isinstance(precision, str) else precision
    find_operators(target, spec.named if isinstance(spec, MixedPrecision) else {spec})
    name = next((each for each in (source, unet, vae) if each is not None), None)
    if name is None:
        raise RequestError(NOTHING)
    if source is None and unet is None and calibration not in _BUILT_IN_CALIBRATIONS:
        raise RequestError("a VAE alone has no prompts to calibrate on; leave out --calibration, or give none")
    output = default_output(name) if output is None else output
    mix = precision.removeprefix("mixed:") if isinstance(precision, str) else None
    prompts = None if calibration in _BUILT_IN_CALIBRATIONS else calibration
    files = (source, vae, unet, *text_encoders, base, image_encoder, prompts, mix, *(lora.path for lora in loras))
    builder: VariantBuilder | None = None
    with replace_package(output, sources=[each for each in files if each is not None], force=force) as directory:
        if via == "native":
            opened = open_source(
                source,
                vae,
                revision,
                report,
                base=base,
                unet=unet,
                text_encoders=text_encoders,
                prediction_type=prediction_type,
                image_encoder=image_encoder,
            )
            checkpoint = fuse_loras(opened, loras)
            if safety_checker:
                checkpoint = add_safety_checker(checkpoint, name, revision)
            if source is not None and "unet" not in checkpoint.parts and calibration not in _BUILT_IN_CALIBRATIONS:
                raise ExportError(f"{name} has no U-Net to calibrate on prompts; leave out --calibration")
            defaults = {**checkpoint.defaults, **defaults}
            builder = VariantBuilder(checkpoint=checkpoint, precision=spec, target=target)
            manifest = _export_native(builder, directory, output, calibration, defaults, report)
        elif via == "optimum":
            given = any(each is not None for each in (base, unet, image_encoder, prediction_type))
            if loras or text_encoders or safety_checker or given or target != "generic":
                raise ExportError(
                    "--via optimum does not support --lora, --base, --unet, --text-encoder, --image-encoder, "
                    "--prediction-type, --safety-checker and --target; leave them out"
                )
            manifest = _export_optimum(source, directory, spec, vae, revision, report)
        else:
            raise ExportError(f"via '{via}' is unknown; choose native or optimum")
        manifest = _complete_manifest(directory, manifest, defaults, builder)
        write_manifest(directory, manifest)
        verify(directory, manifest, report)
    delete_work(_calibration_cache(output))
    return output


def _export_native(
    builder: VariantBuilder,
    directory: Path,
    output: Path,
    calibration: str,
    defaults: Mapping[str, Any],
    report: Report,
) -> Manifest:
    """Write the components to ``directory``, after calibration where a layer is int8."""
    checkpoint = builder.checkpoint
    if "int8" in builder.check() and checkpoint.parts.keys() & {"upscaler", "vae"}:
        parsed = Calibration.parse(calibration)
        ranges = _calibrate(builder, parsed, _calibration_cache(output), defaults, report)
        builder = builder if ranges is None else replace(builder, ranges=ranges)
    files = write_components(directory, checkpoint, builder.build, report)
    source = Source(
        name=checkpoint.source,
        revision=checkpoint.revision,
        exporter=f"sdonnx {version('sdonnx')}",
        stated=checkpoint.stated,
    )
    return make_manifest(directory, files, builder.precision, source, target=builder.target)


def _calibrate(
    builder: VariantBuilder,
    calibration: Calibration | None,
    work: Path,
    defaults: Mapping[str, Any],
    report: Report,
) -> ActivationRanges | None:
    """Run `calibrate`; if it is interrupted, the same export resumes it."""
    if calibration is None:
        return None
    try:
        return calibrate(builder.checkpoint, builder.precision, calibration, work, defaults, report, builder.target)
    except KeyboardInterrupt:
        logger.warning("the calibration so far is in %s; the same command resumes it", work)
        raise


def _calibration_cache(output: Path) -> Path:
    """Where a calibration's runs are saved until the package is whole; next to what ``output`` may link to."""
    target = Path(os.path.realpath(output))
    long = len(os.fsencode(target.name)) > _LONG_NAME
    name = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16] if long else target.name
    return target.with_name(f".{name}.calibration")


_DEFAULT_PRECISIONS = {"generic": "fp32", "openvino": "int8"}
"""By target; others compute in fp16."""

_LONG_NAME = 240
"""Bytes of a name; most file systems take 255."""


def _export_optimum(
    source: str | None, directory: Path, precision: PrecisionSpec, vae: str | None, revision: str | None, report: Report
) -> Manifest:
    from sdonnx_export.optimum_export import export_with_optimum

    if source is None or precision != "fp32" or vae is not None:
        raise ExportError("--via optimum writes fp32 and the checkpoint's own VAE; leave out --precision and --vae")
    check_pipeline(source, revision)
    report("tracing with optimum", 0.0)
    export_with_optimum(source, directory, revision)
    files = {path.parent.name: hash_files(directory, path.parent.name) for path in directory.glob(f"*/{GRAPH}")}
    name = Path(source).name if Path(source).exists() else source
    exporter = f"optimum-onnx {version('optimum-onnx')}, sdonnx {version('sdonnx')}"
    return make_manifest(directory, files, precision, Source(name=name, revision=revision, exporter=exporter))


def _complete_manifest(
    directory: Path, manifest: Manifest, defaults: Mapping[str, Any], builder: VariantBuilder | None
) -> Manifest:
    """Add the defaults and, where there is a VAE, the preview fitted to it.

    Of a package that the CPU may not run, to a generic graph of the same weights.
    """
    square = {"height": None} if "size" in defaults else {}
    manifest = replace(manifest, defaults=replace(manifest.defaults, **{**square, **defaults}))
    if "vae_encoder" not in manifest.components:
        return manifest
    with TemporaryDirectory(dir=directory.parent) as work:
        encoder = directory / manifest.components["vae_encoder"].graphs[PLAIN]
        if builder is not None and builder.target != "generic":
            generic = replace(builder, target="generic", precision="fp32").build("vae_encoder")
            encoder = write_graph(generic[PLAIN], Path(work))
        return replace(manifest, latents=replace(manifest.latents, preview=fit_preview(encoder, manifest.latents)))
