"""The export: a checkpoint in, a package out, whole or not at all."""

import logging
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.errors import ExportError, RequestError, SdonnxError
from sdonnx_runtime.packages.manifest import TILED, Manifest, Source, write_manifest
from sdonnx_runtime.packages.package import VAE

from sdonnx_export.checkpoint_model import Checkpoint, Report
from sdonnx_export.checkpoints.fuse_lora import fuse_loras
from sdonnx_export.checkpoints.open import check_pipeline, open_source
from sdonnx_export.models.components import COMPONENTS, build, components_of, has_norms, layers
from sdonnx_export.models.configs import UNetConfig
from sdonnx_export.models.unet import cache_stage
from sdonnx_export.operators.int8 import Int8Operators
from sdonnx_export.operators.partition import cache_graphs, embedded_graph
from sdonnx_export.operators.precision import MixedPrecision, Precision, PrecisionSpec, parse_precision, precision_of
from sdonnx_export.packaging.preview import fit_preview
from sdonnx_export.packaging.verify import verify
from sdonnx_export.packaging.writer import GRAPH, files_of, manifest_of, write_components
from sdonnx_export.quantization.calibration import ActivationRanges, Calibration, calibrate

logger = logging.getLogger(__name__)

_NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})


def export(
    source: str | None,
    output: Path | None = None,
    *,
    precision: str | MixedPrecision = "fp32",
    vae: str | None = None,
    revision: str | None = None,
    via: str = "native",
    calibration: str = "full",
    defaults: Mapping[str, Any] = _NO_DEFAULTS,
    loras: Sequence[Lora] = (),
    force: bool = False,
    report: Report = lambda _what, _done: None,
) -> Path:
    """Turns a checkpoint into a package and returns its directory.

    Args:
        source: a diffusers directory, a Hub id, a single ``.safetensors`` or ``.ckpt`` file, or a package of fp32 or
            fp16; None makes a package of ``vae`` alone.
        output: the package's directory; None is the source's name with ``-onnx`` in the working directory.
        precision: fp32; fp16, int8-weights or int4 for smaller weights (the arithmetic stays float32); int8 computes
            in 8 bits; mixed:FILE, or a `MixedPrecision`, chooses for each layer.
        vae: where to take the VAE from instead of ``source``; also a VAE's own directory, Hub id or package.
        revision: branch, tag or commit of the source's Hub id, or the VAE's where it is alone.
        via: ``native`` (written graphs, no torch) or ``optimum`` (traced by optimum-onnx).
        calibration: what int8 takes its ranges from: full or fast (a trajectory for each of the prompts that come
            with sdonnx, or for the first of them), none (ranges are found while running, and fewer layers are int8),
            or a file of prompts, one to a line. A VAE alone has no prompts: full and fast are random colours. A
            ControlNet or T2I-Adapter can't be observed alone: whichever it is, its larger kernels compute in float32.
        defaults: fields of `Defaults` that suit the model and that its configs don't say.
        loras: adapters that become part of it for good.
        force: replaces ``output`` if it exists.
        report: told of the progress.

    Raises:
        RequestError: the precision is unknown, there is neither a source nor a VAE, or an adapter can't be read or is
            for another model.
        ExportError: the source or the mix can't be read or honoured, or the output can't be written.
    """
    chosen = parse_precision(precision) if isinstance(precision, str) else precision
    name = vae if source is None else source
    if name is None:
        raise RequestError("there is nothing to export; give SRC, or --vae SRC alone for a package of a VAE")
    if source is None and calibration not in ("full", "fast", "none"):
        raise RequestError("a VAE alone has no prompts to be calibrated on; leave out --calibration, or give none")
    output = output if output is not None else Path(f"{Path(name.rstrip('/')).stem}-onnx")
    with _finished_at(output, replacing=force) as directory:
        if via == "native":
            checkpoint = fuse_loras(open_source(source, vae, revision, report), loras)
            if source is not None and "unet" not in checkpoint.parts and calibration not in ("full", "fast", "none"):
                raise ExportError(f"{name} has no U-Net that prompts could be shown to; leave out --calibration")
            defaults = {**checkpoint.defaults, **defaults}
            seen = None
            if "int8" in _precisions(checkpoint, chosen) and "vae" in checkpoint.parts:
                seen = _observed(checkpoint, chosen, Calibration.named(calibration), output, defaults, report)
            files = write_components(directory, checkpoint, partial(_graphs, checkpoint, chosen, seen), report)
            manifest = manifest_of(directory, files, chosen, _source(checkpoint))
        elif via == "optimum":
            if loras:
                raise ExportError("--via optimum writes the checkpoint as it is; leave out --lora")
            manifest = _export_optimum(source, directory, chosen, vae, revision, report)
        else:
            raise ExportError(f"via '{via}' is unknown; choose native or optimum")
        manifest = replace(manifest, defaults=replace(manifest.defaults, **defaults))
        if "vae_decoder" in manifest.components:
            latents = replace(manifest.latents, preview=fit_preview(directory, manifest))
            manifest = replace(manifest, latents=latents)
        write_manifest(directory, manifest)
        verify(directory, manifest, report)
    shutil.rmtree(_kept_at(output), ignore_errors=True)
    return output


def _precisions(checkpoint: Checkpoint, chosen: PrecisionSpec) -> set[Precision]:
    """Those that layers have.

    Raises:
        ExportError: the mix is of layers that there are not.
    """
    known = {name: layers(name, checkpoint.parts[each.part].config) for name, each in components_of(checkpoint).items()}
    if isinstance(chosen, MixedPrecision):
        chosen.check(known)
    return {precision_of(chosen, name)(layer) for name, mine in known.items() for layer in mine}


def _graphs(
    checkpoint: Checkpoint, chosen: PrecisionSpec, seen: ActivationRanges | None, name: str
) -> dict[str, ir.Model]:
    """A component's variants."""
    plain = _model(checkpoint, chosen, seen, name)
    if name.startswith("text_encoder"):
        return {"plain": plain, "embedded": embedded_graph(plain)}
    if name in VAE and has_norms(checkpoint.parts["vae"].config):
        return {"plain": plain, TILED: _model(checkpoint, chosen, seen, name, tiled=True)}
    if name != "unet":
        return {"plain": plain}
    stage = cache_stage(UNetConfig.from_dict(checkpoint.parts["unet"].config))
    graphs = {"plain": plain}
    for downsampled, controlled in product((False, True), repeat=2):
        names = [*["downsampled"] * downsampled, *["controlled"] * controlled]
        choices = {"token_downsampling": downsampled, "controlled": controlled}
        whole = _model(checkpoint, chosen, seen, name, **choices) if names else plain
        found = {"": whole, **cache_graphs(whole, stage)}
        graphs |= {"-".join([*[variant] * bool(variant), *names]) or "plain": graph for variant, graph in found.items()}
    return graphs


def _model(
    checkpoint: Checkpoint, chosen: PrecisionSpec, seen: ActivationRanges | None, name: str, **choices: bool
) -> ir.Model:
    """The model of a component; kernels compute in 8 bits where they have been observed."""
    part = checkpoint.parts[COMPONENTS[name].part]
    find = precision_of(chosen, name)
    make = partial(build, name, part, chosen, **choices)
    if not any(find(layer) == "int8" for layer in layers(name, part.config)):
        return make()
    return make(partial(Int8Operators, ranges={} if seen is None else seen.get(name, {})))


def _observed(
    checkpoint: Checkpoint,
    chosen: PrecisionSpec,
    calibration: Calibration | None,
    output: Path,
    defaults: Mapping[str, Any],
    report: Report,
) -> ActivationRanges | None:
    """What `calibrate` saw; should it be stopped, the same export goes on where it was."""
    if calibration is None:
        return None
    work = _kept_at(output)
    try:
        return calibrate(checkpoint, chosen, calibration, work, defaults, report)
    except KeyboardInterrupt:
        logger.warning("the calibration so far is kept in %s; the same command goes on from there", work)
        raise


def _kept_at(output: Path) -> Path:
    """Where a calibration keeps what it has seen, until the package is whole."""
    return output.with_name(f".{output.name}.calibration")


def _export_optimum(
    source: str | None, directory: Path, precision: PrecisionSpec, vae: str | None, revision: str | None, report: Report
) -> Manifest:
    from sdonnx_export.torch_bridge import export_with_optimum

    if source is None or precision != "fp32" or vae is not None:
        raise ExportError("--via optimum writes fp32 and the checkpoint's own VAE; leave out --precision and --vae")
    check_pipeline(source, revision)
    report("tracing with optimum", 0.0)
    export_with_optimum(source, directory, revision)
    files = {path.parent.name: files_of(directory, path.parent.name) for path in directory.glob(f"*/{GRAPH}")}
    name = Path(source).name if Path(source).exists() else source
    exporter = f"optimum-onnx {version('optimum-onnx')}, sdonnx {version('sdonnx')}"
    return manifest_of(directory, files, precision, Source(name=name, revision=revision, exporter=exporter))


def _source(checkpoint: Checkpoint) -> Source:
    exporter = f"sdonnx {version('sdonnx')}"
    return Source(name=checkpoint.source, revision=checkpoint.revision, exporter=exporter)


@contextmanager
def _finished_at(output: Path, *, replacing: bool) -> Generator[Path, None, None]:
    """A temporary sibling of ``output`` that takes its place at the end, or is gone after a failure."""
    if output.exists() and not replacing:
        raise ExportError(f"{output} exists; choose another directory with -o, or replace it with --force")
    if output.exists() and not (output.is_dir() and (_is_package(output) or not any(output.iterdir()))):
        raise ExportError(f"{output} is not a package, so --force won't replace it; choose another directory with -o")
    temporary = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _swap(temporary, output)
    except OSError as error:
        raise ExportError(
            f"{output} can't be written: {error.strerror or error}; free some space or choose another place with -o"
        ) from None
    except SdonnxError as error:
        raise error if isinstance(error, ExportError) else ExportError(str(error)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, place: Path) -> None:
    """Puts ``new`` at ``place``; what was there is deleted last."""
    if not place.exists():
        new.rename(place)
        return
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    place.rename(old)
    try:
        new.rename(place)
    except OSError:
        old.rename(place)
        raise
    shutil.rmtree(old)


def _is_package(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("sdonnx.json", "model_index.json"))
