"""What a request has open at one time, and in which sizes: what `planning` makes a plan for."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from types import MappingProxyType

from sdonnx_runtime.adapters.merging import Adapters
from sdonnx_runtime.denoising.control import component_prefix, residual_names
from sdonnx_runtime.denoising.step_cache import unet_graphs
from sdonnx_runtime.execution.components import REFINER
from sdonnx_runtime.graphs.partition import read_stages
from sdonnx_runtime.graphs.shape_inference import ITEMSIZES, TensorInfo, UnsupportedGraph
from sdonnx_runtime.memory.planner import Graph, LoadedComponent, MemoryPhase, graph_outputs, make_plan
from sdonnx_runtime.packages.manifest import TILED
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.request import Request, given
from sdonnx_runtime.text.conditioning import encoder_texts
from sdonnx_runtime.text.prompt_schedule import PromptSchedule

_PICTURES = 6
"""How many times a picture is there, in float32, while it is put together of tiles and turned into bytes."""


def memory_phases(
    package: Package,
    request: Request,
    said: PromptSchedule,
    *,
    refiner: Package | None = None,
    controls: Sequence[Package] = (),
    adapters: Adapters | None = None,
    preview: Package | None = None,
) -> list[MemoryPhase]:
    """What is open at a time, in the order of running.

    Args:
        package: whose model draws.
        request: the largest pass of a checked request.
        said: what it says.
        refiner: whose U-Net takes the last steps.
        controls: what steers the package's U-Net.
        adapters: what is applied to the package.
        preview: whose VAE makes previews, and stays.

    Raises:
        UnknownGraph: a graph is of another program, with inputs or operators that aren't known here.
        PackageError: a graph is damaged.
    """
    applied = Adapters() if adapters is None else adapters
    space = package.manifest.latents
    rows = max(sum(map(len, encoder_texts(package.manifest, request, row))) for each in said.passes for row in each)
    height, width = given(request.height), given(request.width)
    sizes = {"batch": rows, "states": rows if package.manifest.conditions.beside == "picture" else 1, "timestep": 1}
    sizes |= {"height": height // space.downscale, "width": width // space.downscale}
    phases = list[MemoryPhase]()
    for prefix, model in {"": package, **({} if refiner is None else {REFINER: refiner})}.items():
        for encoder in model.manifest.text_encoders:
            graph = _graph(model.graph(encoder.component), {"batch": 1})
            phases.append([_part(f"{prefix}{encoder.component}", [graph], applied)])
            told = graph_outputs(graph)
            sizes["tokens"] = encoder.length
            sizes["pooled"] = 0 if encoder.pooled is None else told[encoder.pooled].shape[1]
        sizes["ids"] = 5 if model.manifest.family == "sdxl-refiner" else 6
        nets = list(controls) if prefix == "" else []
        phases.append(_unets(prefix, model, nets, request, sizes, applied))
    if request.image is not None or request.hires_upscaler == "lanczos":
        phases.append([_vae(package, "vae_encoder", height, width, scale=space.downscale, pixels=height * width)])
    cells = height // space.downscale, width // space.downscale
    phases.append(decode_phase(package, *cells, request.num_images))
    if preview is None:
        return phases
    shown = make_plan([decode_phase(preview, *cells, 1)], inf, 0).peak
    return [[replace(first, beside=first.beside + shown), *others] for first, *others in phases]


def decode_phase(package: Package, height: int, width: int, pictures: int) -> MemoryPhase:
    """What a package's VAE decoder has open for latents of a size in cells.

    Raises:
        UnknownGraph, PackageError: as `memory_phases` does.
    """
    pixels = height * width * package.manifest.latents.downscale**2 * pictures
    return [_vae(package, "vae_decoder", height, width, scale=1, pixels=pixels)]


def _vae(package: Package, component: str, height: int, width: int, *, scale: int, pixels: int) -> LoadedComponent:
    """A VAE's half, whose input has ``scale`` places to a cell's side; it makes, or is given, so many ``pixels``."""
    sizes = {"batch": 1, "height": height, "width": width}
    plain = _graph(package.graph(component), sizes)
    there = TILED in package.manifest.components[component].graphs
    tiled = _graph(package.graph(component, TILED), sizes) if there else plain
    return LoadedComponent(
        component=component, graphs=(plain,), tiled=tiled, scale=scale, beside=12 * _PICTURES * pixels
    )


def _unets(
    prefix: str, model: Package, nets: Sequence[Package], request: Request, sizes: Mapping[str, int], applied: Adapters
) -> MemoryPhase:
    """A U-Net with what steers it."""
    found, added = list[LoadedComponent](), dict[str, TensorInfo]()
    height, width = given(request.height), given(request.width)
    seen = {
        "adapter": {"batch": 1, "height": height, "width": width},
        "controlnet": {**sizes, "pictures": 1, "picture_height": height, "picture_width": width},
    }
    for index, net in enumerate(nets):
        kind = str(net.control)
        graph = _graph(net.graph(kind), seen[kind])
        found.append(_part(f"{component_prefix(index)}{kind}", [graph], Adapters()))
        added |= dict(zip(residual_names(kind, graph_outputs(graph)), graph_outputs(graph).values(), strict=True))
    whole, again = unet_graphs(request.reuse, token_downsampling=request.token_downsampling, controlled=len(nets) > 0)
    graphs = [_graph(model.graph("unet", whole), sizes, added)]
    if again != whole:
        graphs.append(_graph(model.graph("unet", again), sizes, {**added, **graph_outputs(graphs[0])}))
    return [*found, _part(f"{prefix}unet", graphs, applied)]


def _part(component: str, graphs: Sequence[Graph], applied: Adapters) -> LoadedComponent:
    adapted = frozenset(applied.changes.get(component, {}))
    return LoadedComponent(component=component, graphs=tuple(replace(graph, adapted=adapted) for graph in graphs))


def _graph(path: Path, sizes: Mapping[str, int], known: Mapping[str, TensorInfo] = MappingProxyType({})) -> Graph:
    """A graph with its inputs' free sizes filled in; of what nothing is ``known`` of, by what they are called."""
    inputs = dict[str, TensorInfo]()
    for name, port in read_stages(path).inputs.items():
        free = {f"{name}.{axis}": 1 for axis in ("batch", "channels", "height", "width")}
        called = {**free, **sizes}
        shape = [size if isinstance(size, int) else called.get(size) for size in port.sizes]
        if name in known:
            inputs[name] = known[name]
        elif None in shape or port.data_type not in ITEMSIZES:
            raise UnsupportedGraph(f"the input {name}")
        else:
            inputs[name] = TensorInfo(tuple(given(size) for size in shape), ITEMSIZES[port.data_type])
    return Graph(path=path, inputs=tuple(inputs.items()))
