"""Builds a component's graph from its config and binds the checkpoint's weights to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.nn import Module
from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.packages.manifest import NORM_STATS, USE_NORM_STATS

from sdonnx_export.checkpoint_model import Checkpoint, Part, Weight
from sdonnx_export.models.clip import ClipTextEncoder
from sdonnx_export.models.configs import ClipTextConfig, ConfigReader, UNetConfig, VaeConfig
from sdonnx_export.models.controlnet import SIZES, ControlNet, ControlNetConfig
from sdonnx_export.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from sdonnx_export.models.tiny_vae import TinyVaeConfig, TinyVaeDecoder, TinyVaeEncoder
from sdonnx_export.models.unet import UNet, residual_names
from sdonnx_export.models.vae import VaeDecoder, VaeEncoder
from sdonnx_export.operators.base import (
    CONTRIB,
    IR_VERSION,
    IR_VERSION_4_BITS,
    OPSET,
    OPSET_4_BITS,
    Operators,
    TransposedWeight,
    sizes,
)  # fmt: skip
from sdonnx_export.operators.partition import name_edges
from sdonnx_export.operators.precision import PrecisionSpec, precision_of

_FLOAT, _HALF, _INT64 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input of a graph."""

    name: str
    dtype: ir.DataType
    shape: tuple[int | str, ...]
    """A name where a size is free."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """How one component's graph is made."""

    part: str
    """The part of a checkpoint that holds its config and weights."""
    prefixes: tuple[str, ...]
    """What the names of its weights in that part begin with; empty: all of them are its."""
    module: Callable[..., tuple[Any, tuple[Port, ...]]]
    """Makes it of its config and of what may be chosen."""
    outputs: tuple[str, ...]
    """Its first ones, of a module that names none; what more there is is called ``hidden_states.0`` and so on."""


def _text_encoder(config: Mapping[str, Any], *, projected: bool = False) -> tuple[ClipTextEncoder, tuple[Port, ...]]:
    parsed = ClipTextConfig.from_dict(config, projected=projected)
    return ClipTextEncoder(parsed), (Port(name="input_ids", dtype=_INT64, shape=("batch", parsed.positions)),)


def _unet(config: Mapping[str, Any], **choices: bool) -> tuple[UNet, tuple[Port, ...]]:
    parsed = replace(UNetConfig.from_dict(config), **choices)
    ports: dict[str, tuple[int | str, ...]] = {
        "sample": ("states", parsed.in_channels, "height", "width"),
        "timestep": (),
        "encoder_hidden_states": ("batch", "tokens", parsed.context_width),
    }
    if parsed.added_width is not None:
        ports |= {"text_embeds": ("batch", "pooled"), "time_ids": ("batch", "ids")}
    if parsed.guidance_width is not None:
        ports |= {"timestep_cond": ("batch", parsed.guidance_width)}
    for name in residual_names(parsed):
        ports[name] = tuple(f"{name}.{axis}" for axis in ("batch", "channels", "height", "width"))
    return UNet(parsed), tuple(Port(name=name, dtype=_FLOAT, shape=shape) for name, shape in ports.items())


def _controlnet(config: Mapping[str, Any]) -> tuple[ControlNet, tuple[Port, ...]]:
    parsed = ControlNetConfig.from_dict(config)
    unet = parsed.unet
    ports: dict[str, tuple[int | str, ...]] = {
        "sample": ("states", unet.in_channels, "height", "width"),
        "timestep": (),
        "encoder_hidden_states": ("batch", "tokens", unet.context_width),
        "controlnet_cond": ("pictures", parsed.picture_channels, "picture_height", "picture_width"),
    }
    if unet.added_width is not None:
        ports |= {"text_embeds": ("batch", unet.added_width - SIZES * unet.id_width), "time_ids": ("batch", SIZES)}
    return ControlNet(parsed), tuple(Port(name=name, dtype=_FLOAT, shape=shape) for name, shape in ports.items())


def _adapter(config: Mapping[str, Any]) -> tuple[T2IAdapter, tuple[Port, ...]]:
    parsed = T2IAdapterConfig.from_dict(config)
    shape = ("batch", parsed.in_channels, "height", "width")
    return T2IAdapter(parsed), (Port(name="control_image", dtype=_FLOAT, shape=shape),)


VAES = {
    "AutoencoderKL": (VaeConfig, VaeDecoder, VaeEncoder),
    "AutoencoderTiny": (TinyVaeConfig, TinyVaeDecoder, TinyVaeEncoder),
}
"""Config, decoder and encoder of each of diffusers' classes."""


def _vae(config: Mapping[str, Any]) -> tuple[Any, ...]:
    kind = ConfigReader("vae", config).one_of("_class_name", tuple(VAES), "AutoencoderKL")
    parse, decoder, encoder = VAES[kind]
    return parse.from_dict(config), decoder, encoder


def has_norms(config: Mapping[str, Any]) -> bool:
    """Whether a VAE normalizes over a picture, so that a tile of it has to be told of the whole."""
    return config.get("_class_name", "AutoencoderKL") == "AutoencoderKL"


def _vae_decoder(config: Mapping[str, Any], **choices: bool) -> tuple[Module, tuple[Port, ...]]:
    parsed, decoder, _ = _vae(config)
    port = Port(name="latent_sample", dtype=_FLOAT, shape=("batch", parsed.latent_channels, "height", "width"))
    return _half(decoder(replace(parsed, **choices)), port)


def _vae_encoder(config: Mapping[str, Any], **choices: bool) -> tuple[Module, tuple[Port, ...]]:
    parsed, _, encoder = _vae(config)
    port = Port(name="sample", dtype=_FLOAT, shape=("batch", parsed.in_channels, "height", "width"))
    return _half(encoder(replace(parsed, **choices)), port)


def _half(module: Any, picture: Port) -> tuple[Module, tuple[Port, ...]]:
    """One half of a VAE, with what its norms are given where it works on tiles."""
    moments: tuple[int, int] | None = getattr(module, "moments", None)
    if moments is None:
        return module, (picture,)
    norms = (
        Port(name=NORM_STATS, dtype=_FLOAT, shape=("batch", *moments)),
        Port(name=USE_NORM_STATS, dtype=_FLOAT, shape=()),
    )
    return module, (picture, *norms)


COMPONENTS = {
    "text_encoder": Component(
        part="text_encoder", prefixes=(), module=_text_encoder, outputs=("last_hidden_state", "pooler_output")
    ),
    "text_encoder_2": Component(
        part="text_encoder_2",
        prefixes=(),
        module=partial(_text_encoder, projected=True),
        outputs=("text_embeds", "last_hidden_state"),
    ),
    "unet": Component(part="unet", prefixes=(), module=_unet, outputs=("out_sample",)),
    "vae_decoder": Component(
        part="vae", prefixes=("decoder.", "post_quant_conv."), module=_vae_decoder, outputs=("sample",)
    ),
    "vae_encoder": Component(
        part="vae", prefixes=("encoder.", "quant_conv."), module=_vae_encoder, outputs=("latent_parameters",)
    ),
    "controlnet": Component(part="controlnet", prefixes=(), module=_controlnet, outputs=()),
    "adapter": Component(part="adapter", prefixes=(), module=_adapter, outputs=()),
}
"""Input and output names are those of optimum's exports, so that a package opens there."""


def components_of(checkpoint: Checkpoint) -> dict[str, Component]:
    """Those that a checkpoint has the parts for."""
    return {name: component for name, component in COMPONENTS.items() if component.part in checkpoint.parts}


def layers(name: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The weights of component ``name`` that have a precision: their names, and their shapes in the graph.

    Raises:
        ExportError: the config has a value without a written graph.
    """
    return _layers(COMPONENTS[name].module(config)[0])


def _layers(module: Module) -> dict[str, tuple[int, ...]]:
    return {key: sizes(weight) for key, weight in module.named_parameters() if len(sizes(weight)) > 1}


def build(
    name: str,
    part: Part,
    precision: PrecisionSpec,
    operators: Callable[..., Operators] = Operators,
    **choices: bool,
) -> ir.Model:
    """The model of component ``name`` (a key of COMPONENTS); its weights are read when it is saved.

    Args:
        name: of the component.
        part: its config and weights.
        precision: of the package.
        operators: what the graph is written in; called as `Operators` is.
        **choices: of the U-Net, ``token_downsampling`` and ``controlled``; of a KL autoencoder's halves, ``tiled``.

    Raises:
        ExportError: the config has a value without a written graph; a weight is missing, is left over, or has
            another shape than the config says.
    """
    component = COMPONENTS[name]
    module, ports = component.module(part.config, **choices)
    find = precision_of(precision, name)
    in_4_bits = any(find(layer) == "int4" for layer in _layers(module))
    opset, version = (OPSET_4_BITS, IR_VERSION_4_BITS) if in_4_bits else (OPSET, IR_VERSION)
    graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": opset, CONTRIB: 1})
    mine = {
        key: weight
        for key, weight in part.weights.items()
        if not component.prefixes or key.startswith(component.prefixes)
    }
    op = operators(graph, mine, find)
    inputs = [op.builder.input(port.name, port.dtype, port.shape) for port in ports]
    results = module(op, *inputs)
    results = results if isinstance(results, tuple) else (results,)
    first = getattr(module, "outputs", component.outputs)
    more = (f"hidden_states.{index}" for index in range(len(results) - len(first)))
    for value, output in zip(results, (*first, *more), strict=True):
        op.builder.add_output(value, output)
    name_edges(graph)
    _bind(graph, name, mine)
    return ir.Model(graph, ir_version=version, producer_name="sdonnx")


def _bind(graph: ir.Graph, component: str, weights: Mapping[str, Weight]) -> None:
    unused = set(weights)
    for name, value in list(graph.initializers.items()):
        if value.const_value is not None:
            continue
        weight = weights.get(name)
        if weight is None:
            raise ExportError(f"{component}: the weight '{name}' is missing; the checkpoint and its config disagree")
        unused.discard(name)
        value.const_value = _lazy(name, value, weight, component)
        if not value.uses():  # its codes are there instead
            del graph.initializers[name]
    if unused:
        listed = ", ".join(sorted(unused)[:3])
        raise ExportError(
            f"{component}: {len(unused)} weights have no place in the graph that the config describes ({listed}); "
            "try --via optimum"
        )


def _lazy(name: str, value: ir.Value, weight: Weight, component: str) -> ir.LazyTensor:
    shape = tuple(value.shape.numpy()) if value.shape is not None else ()
    expected = shape[::-1] if isinstance(value, TransposedWeight) else shape
    if weight.shape != expected:
        raise ExportError(f"{component}: '{name}' has shape {weight.shape}; the config asks for {expected}")
    dtype = np.dtype(np.float16 if value.dtype == _HALF else np.float32)

    def read() -> ir.Tensor:
        return ir.Tensor(_convert(name, weight.read(), dtype, transpose=isinstance(value, TransposedWeight)), name=name)

    return ir.LazyTensor(read, dtype=ir.DataType.from_numpy(dtype), shape=ir.Shape(shape), name=name)


def _convert(name: str, data: AnyArray, dtype: np.dtype[Any], *, transpose: bool) -> AnyArray:
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray((data.T if transpose else data).astype(dtype, copy=False))
    if not np.isfinite(converted).all():
        cause = "fp16 can't hold them; use --precision fp32" if np.isfinite(data).all() else "the file is damaged"
        raise ExportError(f"'{name}' has values that are not finite: {cause}")
    return converted
