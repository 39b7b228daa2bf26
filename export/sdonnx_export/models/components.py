"""The registry of components: build a component's graph from its config, and bind the checkpoint's weights to it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.nn import Module
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.packages.families import FAMILIES
from sdonnx_runtime.packages.variant import IMAGE_KEYS, IMAGE_VALUES, NORM_STATS, USE_NORM_STATS

from sdonnx_export.checkpoint_model import Checkpoint, Part, Weight, checked
from sdonnx_export.models.clip import ClipTextConfig, ClipTextEncoder
from sdonnx_export.models.clip_vision import ClipVisionConfig, ClipVisionEncoder
from sdonnx_export.models.config_reader import ConfigReader
from sdonnx_export.models.controlnet import ControlNet, ControlNetConfig
from sdonnx_export.models.ip_adapter import IPAdapter, IPAdapterConfig
from sdonnx_export.models.safety_checker import SafetyChecker
from sdonnx_export.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from sdonnx_export.models.tiny_vae import TinyVaeConfig, TinyVaeDecoder, TinyVaeEncoder
from sdonnx_export.models.unet import UNet, residual_names
from sdonnx_export.models.unet_config import UNetConfig
from sdonnx_export.models.upscaler import RRDBNet, RRDBNetConfig, SRVGGNet, SRVGGNetConfig
from sdonnx_export.models.vae import VaeConfig, VaeDecoder, VaeEncoder
from sdonnx_export.operators.base import CONTRIB, IR_VERSION, IR_VERSION_4_BITS, OPSET, OPSET_4_BITS, Operators
from sdonnx_export.operators.layouts import checkpoint_shape, sizes, to_graph_layout
from sdonnx_export.operators.partition import name_edges
from sdonnx_export.operators.precision import PrecisionSpec, make_precision_lookup
from sdonnx_export.operators.stored import FLOAT, FLOAT16
from sdonnx_export.operators.targets import INT8_OPERATORS, find_operators

_INLINE = 256
"""Bytes up to which `onnx_ir.save` keeps a weight in the graph's own file."""

_INT64 = ir.DataType.INT64


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input of a graph."""

    name: str
    dtype: ir.DataType
    shape: tuple[int | str, ...]
    """A name for a dynamic size."""


@dataclass(frozen=True, kw_only=True)
class ComponentSpec:
    """How one component's graph is built."""

    part: str
    """The part of a checkpoint that holds its config and weights."""
    prefixes: tuple[str, ...]
    """Prefixes of its keys in that part; empty means all keys."""
    module: Callable[..., tuple[Any, tuple[Port, ...]]]
    """Make the module and its inputs from the config and the options of `build`."""
    outputs: tuple[str, ...]
    """Names of the first outputs, unless the module has ``outputs``; further ones are ``hidden_states.0`` and so on."""
    float32_layers: Callable[[Mapping[str, Any]], Sequence[str]] = lambda _config: ()
    """Patterns of layers that a graph of float16 computes in float32, from the config."""


def _text_encoder(config: Mapping[str, Any], *, projected: bool = False) -> tuple[ClipTextEncoder, tuple[Port, ...]]:
    parsed = ClipTextConfig.from_dict(config, projected=projected)
    return ClipTextEncoder(parsed), (
        Port(name="input_ids", dtype=_INT64, shape=("batch", parsed.max_position_embeddings)),
    )


def _image_encoder(config: Mapping[str, Any]) -> tuple[ClipVisionEncoder, tuple[Port, ...]]:
    parsed = ClipVisionConfig.from_dict(config)
    return ClipVisionEncoder(parsed), (pixel_values(parsed),)


def _safety_checker(config: Mapping[str, Any]) -> tuple[SafetyChecker, tuple[Port, ...]]:
    parsed = ClipVisionConfig.from_dict(config, "safety_checker")
    return SafetyChecker(parsed), (pixel_values(parsed),)


def pixel_values(config: ClipVisionConfig) -> Port:
    """Return the input of a CLIP image encoder: normalized images of the size it was trained at."""
    shape = ("batch", config.num_channels, config.image_size, config.image_size)
    return Port(name="pixel_values", dtype=FLOAT, shape=shape)


def _unet(config: Mapping[str, Any], **options: bool) -> tuple[UNet, tuple[Port, ...]]:
    parsed = replace(UNetConfig.from_dict(config), **options)
    ports: dict[str, tuple[int | str, ...]] = {
        "sample": ("states", parsed.in_channels, "height", "width"),
        "timestep": (),
        "encoder_hidden_states": ("batch", "tokens", parsed.cross_attention_dim),
    }
    if parsed.projection_class_embeddings_input_dim is not None:
        ports |= {"text_embeds": ("batch", "pooled"), "time_ids": ("batch", "ids")}
    if parsed.time_cond_proj_dim is not None:
        ports |= {"timestep_cond": ("batch", parsed.time_cond_proj_dim)}
    for name in residual_names(parsed):
        ports[name] = tuple(f"{name}.{axis}" for axis in ("batch", "channels", "height", "width"))
    unet = UNet(parsed)
    if parsed.controlled:
        ports |= dict.fromkeys((IMAGE_KEYS, IMAGE_VALUES), ("batch", "image_prompts", "image_tokens", unet.image_width))
    return unet, tuple(Port(name=name, dtype=FLOAT, shape=shape) for name, shape in ports.items())


def _controlnet(config: Mapping[str, Any]) -> tuple[ControlNet, tuple[Port, ...]]:
    parsed = ControlNetConfig.from_dict(config)
    unet = parsed.unet
    ports: dict[str, tuple[int | str, ...]] = {
        "sample": ("states", unet.in_channels, "height", "width"),
        "timestep": (),
        "encoder_hidden_states": ("batch", "tokens", unet.cross_attention_dim),
        "controlnet_cond": ("images", parsed.conditioning_channels, "image_height", "image_width"),
    }
    if unet.projection_class_embeddings_input_dim is not None:
        time_ids = FAMILIES["sdxl"].time_ids
        pooled = unet.projection_class_embeddings_input_dim - time_ids * unet.addition_time_embed_dim
        ports |= {"text_embeds": ("batch", pooled), "time_ids": ("batch", time_ids)}
    return ControlNet(parsed), tuple(Port(name=name, dtype=FLOAT, shape=shape) for name, shape in ports.items())


def _adapter(config: Mapping[str, Any]) -> tuple[T2IAdapter, tuple[Port, ...]]:
    parsed = T2IAdapterConfig.from_dict(config)
    shape = ("batch", parsed.in_channels, "height", "width")
    return T2IAdapter(parsed), (Port(name="control_image", dtype=FLOAT, shape=shape),)


def _ip_adapter(config: Mapping[str, Any]) -> tuple[IPAdapter, tuple[Port, ...]]:
    parsed = IPAdapterConfig.from_dict(config)
    axes = ("batch",) if parsed.resampler is None else ("batch", "patches")
    return IPAdapter(parsed), (Port(name=parsed.image_state, dtype=FLOAT, shape=(*axes, parsed.image_width)),)


UPSCALERS = {"RRDBNet": (RRDBNetConfig, RRDBNet), "SRVGGNetCompact": (SRVGGNetConfig, SRVGGNet)}
"""BasicSR's class of an upscaler; its config and its module."""


def _upscaler(config: Mapping[str, Any]) -> tuple[Module, tuple[Port, ...]]:
    class_name = ConfigReader("upscaler", config).one_of("_class_name", tuple(UPSCALERS))
    parser, module = UPSCALERS[class_name]
    port = Port(name="image", dtype=FLOAT, shape=("batch", 3, "height", "width"))
    return module(parser.from_dict(config)), (port,)


VAES = {
    "AutoencoderKL": (VaeConfig, VaeDecoder, VaeEncoder),
    "AutoencoderTiny": (TinyVaeConfig, TinyVaeDecoder, TinyVaeEncoder),
}
"""diffusers' class of a VAE; its config, decoder and encoder."""


def _vae(config: Mapping[str, Any]) -> tuple[Any, ...]:
    class_name = ConfigReader("vae", config).one_of("_class_name", tuple(VAES), "AutoencoderKL")
    parser, decoder, encoder = VAES[class_name]
    return parser.from_dict(config), decoder, encoder


def has_norms(config: Mapping[str, Any]) -> bool:
    """Whether a VAE has norms over the whole image, whose statistics a tile needs."""
    return config.get("_class_name", "AutoencoderKL") == "AutoencoderKL"


def _vae_float32_layers(config: Mapping[str, Any]) -> Sequence[str]:
    parsed, _, _ = _vae(config)
    return parsed.float32_layers if isinstance(parsed, VaeConfig) else ()


def _vae_decoder(config: Mapping[str, Any], **options: bool) -> tuple[Module, tuple[Port, ...]]:
    parsed, decoder, _ = _vae(config)
    port = Port(name="latent_sample", dtype=FLOAT, shape=("batch", parsed.latent_channels, "height", "width"))
    return _vae_half(decoder(replace(parsed, **options)), port)


def _vae_encoder(config: Mapping[str, Any], **options: bool) -> tuple[Module, tuple[Port, ...]]:
    parsed, _, encoder = _vae(config)
    port = Port(name="sample", dtype=FLOAT, shape=("batch", parsed.in_channels, "height", "width"))
    return _vae_half(encoder(replace(parsed, **options)), port)


def _vae_half(module: Any, image: Port) -> tuple[Module, tuple[Port, ...]]:
    """Return one half of a VAE with its inputs: the image or latents and, if it is tiled, the norms' statistics."""
    shape: tuple[int, int] | None = getattr(module, "norm_stats_shape", None)
    if shape is None:
        return module, (image,)
    norms = (
        Port(name=NORM_STATS, dtype=FLOAT, shape=("batch", *shape)),
        Port(name=USE_NORM_STATS, dtype=FLOAT, shape=()),
    )
    return module, (image, *norms)


COMPONENTS = {
    "text_encoder": ComponentSpec(
        part="text_encoder", prefixes=(), module=_text_encoder, outputs=("last_hidden_state", "pooler_output")
    ),
    "text_encoder_2": ComponentSpec(
        part="text_encoder_2",
        prefixes=(),
        module=partial(_text_encoder, projected=True),
        outputs=("text_embeds", "last_hidden_state"),
    ),
    "unet": ComponentSpec(part="unet", prefixes=(), module=_unet, outputs=("out_sample",)),
    "vae_decoder": ComponentSpec(
        part="vae",
        prefixes=("decoder.", "post_quant_conv."),
        module=_vae_decoder,
        outputs=("sample",),
        float32_layers=_vae_float32_layers,
    ),
    "vae_encoder": ComponentSpec(
        part="vae",
        prefixes=("encoder.", "quant_conv."),
        module=_vae_encoder,
        outputs=("latent_parameters",),
        float32_layers=_vae_float32_layers,
    ),
    "controlnet": ComponentSpec(part="controlnet", prefixes=(), module=_controlnet, outputs=()),
    "image_encoder": ComponentSpec(part="image_encoder", prefixes=(), module=_image_encoder, outputs=()),
    "safety_checker": ComponentSpec(part="safety_checker", prefixes=(), module=_safety_checker, outputs=()),
    "adapter": ComponentSpec(part="adapter", prefixes=(), module=_adapter, outputs=()),
    "ip_adapter": ComponentSpec(part="ip_adapter", prefixes=(), module=_ip_adapter, outputs=(IMAGE_KEYS, IMAGE_VALUES)),
    "upscaler": ComponentSpec(part="upscaler", prefixes=(), module=_upscaler, outputs=("upscaled",)),
}
"""Input and output names are those of optimum's exports, so that a package opens there."""


def components_in(checkpoint: Checkpoint) -> dict[str, ComponentSpec]:
    """Return the components of a checkpoint's parts."""
    return {name: component for name, component in COMPONENTS.items() if component.part in checkpoint.parts}


def layer_shapes(name: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes in the graph, by name, of the weights of component ``name`` that have a precision.

    Raises:
        ExportError: the config has a value without a written graph.
    """
    return _layers(COMPONENTS[name].module(config)[0])


def parameter_names(name: str, config: Mapping[str, Any]) -> list[str]:
    """Return the names of all weights of component ``name``, in the order of running; raises as `layer_shapes`."""
    return [key for key, _ in COMPONENTS[name].module(config)[0].named_parameters()]


def _layers(module: Module) -> dict[str, tuple[int, ...]]:
    return {key: sizes(weight) for key, weight in module.named_parameters() if len(sizes(weight)) > 1}


def build(
    name: str,
    part: Part,
    precision: PrecisionSpec,
    operators: Callable[..., Operators] | None = None,
    *,
    target: str = "generic",
    **options: bool,
) -> ir.Model:
    """Build the model of a component; its weights are read, and checked to be finite, when it is saved.

    Args:
        name: a key of COMPONENTS.
        part: its config and weights.
        precision: the package's.
        operators: the class of operators to write the graph in; None is that of the target.
        target: what the graph is made for, one of TARGETS; those for GPUs compute fp16 layers in float16.
        **options: ``token_downsampling`` and ``controlled`` for the U-Net; ``tiled`` for a half of a KL autoencoder.

    Raises:
        ExportError: the config or the precision has an unsupported value; or a weight is missing, unexpected, or of a
            shape that contradicts the config.
    """
    component = COMPONENTS[name]
    module, ports = component.module(part.config, **options)
    float32_layers = () if target in INT8_OPERATORS else component.float32_layers(part.config)
    find = make_precision_lookup(precision, name, float32_layers)
    in_4_bits = any(find(layer) == "int4" for layer in _layers(module))
    opset, version = (OPSET_4_BITS, IR_VERSION_4_BITS) if in_4_bits else (OPSET, IR_VERSION)
    graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": opset, CONTRIB: 1})
    weights = {
        key: checked(key, weight)
        for key, weight in part.weights.items()
        if not component.prefixes or key.startswith(component.prefixes)
    }
    if operators is None:
        operators = find_operators(target, {find(layer) for layer in _layers(module)})
    op = operators(graph, weights, find)
    inputs = [op.builder.input(port.name, port.dtype, port.shape) for port in ports]
    _add_outputs(op, module(op, *inputs), getattr(module, "outputs", component.outputs))
    name_edges(graph)
    _bind(graph, name, weights)
    return ir.Model(graph, ir_version=version, producer_name="sdonnx")


def _add_outputs(op: Operators, results: ir.Value | tuple[ir.Value, ...], names: tuple[str, ...]) -> None:
    results = results if isinstance(results, tuple) else (results,)
    hidden_states = (f"hidden_states.{index}" for index in range(len(results) - len(names)))
    for value, name in zip(results, (*names, *hidden_states), strict=True):
        op.builder.add_output(op.cast(value, FLOAT), name)


def _bind(graph: ir.Graph, component: str, weights: Mapping[str, Weight]) -> None:
    """Give the graph's parameters their tensors, and check that no weight is missing or left over."""
    unused = set(weights)
    for name, value in list(graph.initializers.items()):
        if value.const_value is not None:
            continue
        weight = weights.get(name)
        if weight is None:
            raise ExportError(f"{component}: the weight '{name}' is missing; the checkpoint and its config disagree")
        unused.discard(name)
        value.const_value = _tensor(name, value, weight, component)
        if not value.uses():  # its quantized values are used instead
            del graph.initializers[name]
    if unused:
        listed = ", ".join(sorted(unused)[:3])
        raise ExportError(
            f"{component}: {len(unused)} weights are not in the graph that the config describes ({listed}); "
            "try --via optimum"
        )


def _tensor(name: str, value: ir.Value, weight: Weight, component: str) -> ir.TensorProtocol:
    """Return a weight as a tensor that is read when it is saved; a small one is read at once.

    Small ones are saved by the graph's serializer, which replaces the errors of reading by its own.
    """
    expected = checkpoint_shape(value)
    if weight.shape != expected:
        raise ExportError(f"{component}: '{name}' has shape {weight.shape}; the config requires {expected}")
    dtype = np.dtype(np.float16 if value.dtype == FLOAT16 else np.float32)

    def read() -> ir.Tensor:
        return ir.Tensor(_convert(name, to_graph_layout(value, weight.read()), dtype), name=name)

    lazy = ir.LazyTensor(read, dtype=ir.DataType.from_numpy(dtype), shape=ir.Shape(sizes(value)), name=name)
    return read() if lazy.nbytes <= _INLINE else lazy


def _convert(name: str, data: AnyArray, dtype: np.dtype[Any]) -> AnyArray:
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(data.astype(dtype, copy=False))
    if dtype.itemsize < data.dtype.itemsize and not np.isfinite(converted).all():
        raise ExportError(f"'{name}' has values beyond the range of fp16; use --precision fp32")
    return converted
