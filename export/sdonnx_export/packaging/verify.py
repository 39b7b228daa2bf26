"""The last step of an export: run every graph of every component once, or let ONNX Runtime check it."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import DeviceError, ExportError, PackageError
from sdonnx_runtime.execution.devices.table import DEVICES, DeviceName
from sdonnx_runtime.execution.ort import candidates
from sdonnx_runtime.execution.session import Port, Session
from sdonnx_runtime.graphs.partition import read_stages
from sdonnx_runtime.packages.concat import CONCAT
from sdonnx_runtime.packages.families import FAMILIES, PackageKind
from sdonnx_runtime.packages.manifest import Manifest, read_json
from sdonnx_runtime.packages.upscaler_config import UpscalerConfig
from sdonnx_runtime.packages.variant import CACHED_FEATURES, PLAIN, VARIANT_NAMES
from sdonnx_runtime.request import CompleteRequest
from sdonnx_runtime.safety.checkers import SAFETY_CHECKER
from sdonnx_runtime.text.conditioning import make_conditioning
from sdonnx_runtime.text.prompt_schedule import StepPrompts

logger = logging.getLogger(__name__)

_LATENT_SIZE = 8
"""Width and height of the latents: enough for a U-Net of four resolutions to halve it thrice."""


def verify(directory: Path, manifest: Manifest, report: Callable[[str, float], None]) -> None:
    """Run all graphs of a package just written, each component on the outputs of those before it.

    They run on the CPU, or on the device that they are made for. Where this machine does not have it, ONNX Runtime
    checks operators, shapes and types. A graph of several stages runs a stage at a time, so that no more than one
    stage's weights are in memory.

    Raises:
        ExportError: an output has another shape than its neighbours need.
        SdonnxError: a component can't be loaded, or returns values that are not finite.
    """
    device = _find_device(manifest.target)
    if device is None:
        title = DEVICES[manifest.target].title
        logger.warning("the package is checked, but was not run: %s is not available on this machine", title)
        _check_types(directory, manifest, report)
        return
    channels, pixels = manifest.latents.channels, _LATENT_SIZE * manifest.latents.downscale
    image: AnyArray = np.zeros((1, 3, pixels, pixels), np.float32)
    latents: AnyArray = np.ones((1, channels, _LATENT_SIZE, _LATENT_SIZE), np.float32)
    feeds: dict[str, AnyArray] = {"timestep": np.array(500, np.float32), "latent_sample": latents, "image": image}

    def run(component: str) -> dict[str, AnyArray]:
        report(f"checking {component}", 0.0)
        outputs: dict[str, dict[str, AnyArray]] = {}
        stage_outputs: dict[bytes, dict[str, AnyArray]] = {}
        graphs = manifest.components[component].graphs
        for variant in sorted(graphs, key=VARIANT_NAMES.index):
            outputs[variant] = _run_graph(directory / graphs[variant], feeds, stage_outputs, device)
            if CACHED_FEATURES in outputs[variant]:
                feeds[CACHED_FEATURES] = outputs[variant].pop(CACHED_FEATURES)
            _expect_shape(f"{component} ({variant})", _first(outputs[variant]), _first(outputs[PLAIN]).shape)
        return outputs[PLAIN]

    kind = FAMILIES[manifest.family].kind
    if SAFETY_CHECKER in manifest.components:
        run(SAFETY_CHECKER)
    if kind is PackageKind.MODEL:
        encoded = {encoder.component: run(encoder.component) for encoder in manifest.text_encoders}
        feeds.update(_unet_inputs(manifest, latents, encoded))
        _expect_shape("unet", _first(run("unet")), latents.shape)
    if kind is PackageKind.UPSCALER:
        config = UpscalerConfig.read(directory)
        sides = [side * config.scale for side in image.shape[2:]]
        _expect_shape("upscaler", _first(run("upscaler")), (1, 3, *sides))
        return
    if kind.is_control:
        feeds.update(_control_inputs(read_json(directory / kind.value / "config.json")))
        run(kind.value)
        return
    if kind is PackageKind.IP_ADAPTER:
        feeds.update(run("image_encoder"))
        run("ip_adapter")
        return
    _expect_shape("vae_decoder", _first(run("vae_decoder")), image.shape)
    feeds["sample"] = image
    if "vae_encoder" in manifest.components:
        shapes = [(1, count * channels, *latents.shape[2:]) for count in (2, 1)]  # a tiny autoencoder returns latents
        _expect_shape("vae_encoder", _first(run("vae_encoder")), *shapes)


def _find_device(target: str) -> str | None:
    """Return the device to run a target's graphs on; None if this machine has none."""
    if target in _CPU_TARGETS:
        return "cpu"
    try:
        return candidates("auto", target)[0]
    except DeviceError:
        return None


_CPU_TARGETS = ("generic", "openvino", "webgpu")
"""Targets whose graphs have a kernel for each node on the CPU, too."""


def _check_types(directory: Path, manifest: Manifest, report: Callable[[str, float], None]) -> None:
    """Open all graphs on the CPU; that it has no kernel for a node means that ONNX Runtime has accepted the graph."""
    for name, component in manifest.components.items():
        report(f"checking {name}", 0.0)
        for path in component.graphs.values():
            try:
                Session(directory / path, device="cpu", no_arena=True)
            except PackageError as error:
                if _NO_KERNEL not in str(error):
                    raise


_NO_KERNEL = "NOT_IMPLEMENTED"
"""How ONNX Runtime names this reason."""


def _unet_inputs(
    manifest: Manifest, latents: AnyArray, encoded: Mapping[str, Mapping[str, AnyArray]]
) -> dict[str, AnyArray]:
    """The U-Net's inputs but the timestep, from the text encoders' outputs."""
    pixels = _LATENT_SIZE * manifest.latents.downscale
    request = CompleteRequest(
        prompt="", width=pixels, height=pixels, num_inference_steps=1, guidance_scale=1, seed=0, sampler="euler"
    )
    prompts = StepPrompts(negative="", conditional=("",))
    concat = manifest.conditions.concat
    extra = 0 if concat is None else CONCAT[concat].channels(manifest.latents.channels)
    return {
        **make_conditioning(
            manifest, request, prompts, lambda encoder, _text: encoded[encoder.component], (pixels, pixels)
        ),
        "sample": np.pad(latents, [(0, 0), (0, extra), (0, 0), (0, 0)]),
    }


def _control_inputs(config: Mapping[str, Any]) -> dict[str, AnyArray]:
    """The image of a ControlNet or a T2I-Adapter, and latents of its size."""
    side = _LATENT_SIZE * config.get(
        "downscale_factor", 2 ** (len(config.get("conditioning_embedding_out_channels", ".....")) - 1)
    )
    latents = np.ones((1, config.get("in_channels", 4), _LATENT_SIZE, _LATENT_SIZE), np.float32)
    zeros = {name: np.zeros((1, config.get(key, 3), side, side), np.float32) for name, key in _CONTROL_IMAGES.items()}
    return {"sample": latents, **zeros}


_CONTROL_IMAGES = {"control_image": "in_channels", "controlnet_cond": "conditioning_channels"}
"""Image inputs, and the configs' keys for their numbers of channels."""


def _first(outputs: Mapping[str, AnyArray]) -> AnyArray:
    return next(iter(outputs.values()))


def _expect_shape(component: str, output: AnyArray, *shapes: tuple[int, ...]) -> None:
    if output.shape not in shapes:
        raise ExportError(
            f"{component} returns shape {output.shape} instead of {shapes[0]}; its config contradicts the others"
        )


def _run_graph(
    path: Path,
    feeds: Mapping[str, AnyArray],
    stage_outputs: dict[bytes, dict[str, AnyArray]],
    device: str,
) -> dict[str, AnyArray]:
    """Run a graph stage by stage on a device; inputs that ``feeds`` lacks are zeros.

    A stage that is in another graph too runs once: ``stage_outputs`` has the outputs of each, by its encoded model.
    """
    values = dict(feeds)
    graph = read_stages(path)
    for stage in graph.stages:
        if stage.model not in stage_outputs:
            target = DeviceName.parse(device).device.targets[0]
            session = Session(path, model=stage.model, device=device, target=target, no_arena=True)
            outputs = session.run({port.name: _zeros(port) for port in session.inputs} | values)
            # Copies: the outputs themselves would keep the session's memory alive.
            stage_outputs[stage.model] = {name: value.copy() for name, value in outputs.items()}
        values.update(stage_outputs[stage.model])
    return {name: values[name] for name in graph.outputs}


def _zeros(port: Port) -> AnyArray:
    return np.zeros([size if isinstance(size, int) else 1 for size in port.shape], port.dtype)
