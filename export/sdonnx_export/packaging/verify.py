"""The last step of an export: every component is loaded and run once, on a small picture."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.execution.session import Port, Session
from sdonnx_runtime.packages.manifest import CACHED_FEATURES, CONTROLS, Manifest, channels_beside, read_json
from sdonnx_runtime.request import Request
from sdonnx_runtime.text.conditioning import condition
from sdonnx_runtime.text.prompt_schedule import StepPrompts

from sdonnx_export.operators.partition import cut

_CELLS = 8
"""Latent cells per side: enough for a U-Net of four resolutions to halve thrice."""


def verify(directory: Path, manifest: Manifest, report: Callable[[str, float], None]) -> None:
    """Runs each component of a package just written, on the CPU, each on what the one before gave, by all its graphs.

    A graph of several stages runs a stage at a time, so that no more than one stage's weights are in memory.

    Raises:
        ExportError: an output has another shape than its neighbours need.
        SdonnxError: a component can't be loaded, or gives values that are not finite.
    """
    channels, pixels = manifest.latents.channels, _CELLS * manifest.latents.downscale
    picture: AnyArray = np.zeros((1, 3, pixels, pixels), np.float32)
    latents: AnyArray = np.ones((1, channels, _CELLS, _CELLS), np.float32)
    beside = np.zeros((1, channels_beside(manifest.conditions.beside, channels), _CELLS, _CELLS), np.float32)
    feeds: dict[str, AnyArray] = {"timestep": np.array(500, np.float32), "latent_sample": latents}

    def run(component: str) -> dict[str, AnyArray]:
        report(f"checking {component}", 0.0)
        found: dict[str, dict[str, AnyArray]] = {}
        seen: dict[bytes, dict[str, AnyArray]] = {}
        for variant, path in sorted(manifest.components[component].graphs.items()):  # what keeps, then what reuses
            outputs = found[variant] = _run(directory / path, feeds, seen)
            feeds.update({CACHED_FEATURES: outputs.pop(CACHED_FEATURES)} if CACHED_FEATURES in outputs else {})
            _expect(f"{component} ({variant})", _first(outputs), _first(next(iter(found.values()))).shape)
        return found["plain"]

    if "unet" in manifest.components:
        encoded = {encoder.component: run(encoder.component) for encoder in manifest.text_encoders}
        request = Request(prompt="", width=pixels, height=pixels, guidance_scale=1)
        rows = StepPrompts(negative="", conditional=("",))
        feeds.update(condition(manifest, request, rows, lambda encoder, _text: encoded[encoder.component]))
        feeds["sample"] = np.concatenate([latents, beside], axis=1)
        _expect("unet", _first(run("unet")), latents.shape)
    for component in CONTROLS:
        if component in manifest.components:
            feeds.update(_controls_feeds(read_json(directory / component / "config.json")))
            run(component)
    if "vae_decoder" not in manifest.components:
        return
    _expect("vae_decoder", _first(run("vae_decoder")), picture.shape)
    feeds["sample"] = picture
    if "vae_encoder" in manifest.components:
        works = [(1, count * channels, _CELLS, _CELLS) for count in (2, 1)]  # a tiny autoencoder gives latents
        _expect("vae_encoder", _first(run("vae_encoder")), *works)


def _controls_feeds(config: Mapping[str, Any]) -> dict[str, AnyArray]:
    """A ControlNet's or a T2I-Adapter's picture, and latents of its size."""
    side = _CELLS * config.get(
        "downscale_factor", 2 ** (len(config.get("conditioning_embedding_out_channels", ".....")) - 1)
    )
    latents = np.ones((1, config.get("in_channels", 4), _CELLS, _CELLS), np.float32)
    zeros = {name: np.zeros((1, config.get(key, 3), side, side), np.float32) for name, key in _PICTURES.items()}
    return {"sample": latents, **zeros}


_PICTURES = {"control_image": "in_channels", "controlnet_cond": "conditioning_channels"}
"""Inputs for pictures, and the configs' keys of how many channels those have."""


def _first(outputs: Mapping[str, AnyArray]) -> AnyArray:
    return next(iter(outputs.values()))


def _expect(component: str, found: AnyArray, *works: tuple[int, ...]) -> None:
    if found.shape not in works:
        raise ExportError(f"{component} gives {found.shape} instead of {works[0]}; its config contradicts the others")


def _run(path: Path, feeds: Mapping[str, AnyArray], seen: dict[bytes, dict[str, AnyArray]]) -> dict[str, AnyArray]:
    """The outputs of a graph that is run stage by stage; inputs that ``feeds`` lacks are zeros.

    A stage that is in another graph too runs once: ``seen`` is what each gave.
    """
    values = dict(feeds)
    model = ir.load(path)
    stage = path.with_name("stage.onnx")  # beside the weights that it points into
    try:
        for piece in cut(model):
            ir.save(piece, stage)
            content = stage.read_bytes()
            if content not in seen:
                session = Session(stage, device="cpu", frugal=True)
                outputs = session.run({port.name: _zeros(port) for port in session.inputs} | values)
                seen[content] = {name: value.copy() for name, value in outputs.items()}  # they'd keep its memory alive
            values.update(seen[content])
    finally:
        stage.unlink(missing_ok=True)
    return {str(output.name): values[str(output.name)] for output in model.graph.outputs}


def _zeros(port: Port) -> AnyArray:
    return np.zeros([size if isinstance(size, int) else 1 for size in port.shape], port.dtype)
