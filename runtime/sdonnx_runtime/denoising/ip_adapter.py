"""IP-Adapters (arXiv:2308.06721): images as prompts, by further keys and values of a U-Net's cross-attentions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.denoising.control import config_errors
from sdonnx_runtime.denoising.denoiser import is_within_steps
from sdonnx_runtime.errors import PackageError
from sdonnx_runtime.execution.components import Runner
from sdonnx_runtime.execution.running.device_array import freeze
from sdonnx_runtime.graphs.partition import read_stages
from sdonnx_runtime.images.clip import clip_pixels
from sdonnx_runtime.packages.families import PackageKind
from sdonnx_runtime.packages.manifest import read_json
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.packages.variant import IMAGE_KEYS, IMAGE_VALUES, Variant
from sdonnx_runtime.request import CompleteRequest, IPAdapter

_DEFAULTS: Mapping[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "cross_attention_dim": 1280,
}
"""diffusers' defaults of a U-Net's config."""

_ENCODER, _ADAPTER = "image_encoder", "ip_adapter"
_MAX_TOKENS, _MAX_WIDTH, _MAX_LAYERS = 10_000, 10_000, 1000
"""Of the numbers in a config."""


def component_prefix(index: int) -> str:
    """Return the prefix of the names of an IP-Adapter's components."""
    return f"ip_adapter.{index}/"


@dataclass(frozen=True, kw_only=True)
class CrossAttentions:
    """The cross-attentions of a U-Net, or those that an IP-Adapter is for."""

    text_width: int
    """Width of the text: diffusers' cross_attention_dim."""
    widths: tuple[int, ...]
    """Channels of each: on the way down, on the way up, in the middle."""

    @classmethod
    def of_unet(cls, config: Mapping[str, Any]) -> "CrossAttentions":
        """Read those of a U-Net from diffusers' config.json; raises PackageError."""
        with config_errors():
            values = {**_DEFAULTS, **{key: value for key, value in config.items() if value is not None}}
            channels = cast("list[int]", values["block_out_channels"])
            layers = _per_level(values["layers_per_block"], len(channels))
            depths = _per_level(values["transformer_layers_per_block"], len(channels))
            reverse = config.get("reverse_transformer_layers_per_block")
            depths_up = depths[::-1] if reverse is None else _per_level(reverse, len(channels))
            up_layers = [count + 1 for count in layers[::-1]]
            widths = _level_widths(channels, values["down_block_types"], layers, depths)
            widths += _level_widths(channels[::-1], values["up_block_types"], up_layers, depths_up)
            if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") == "UNetMidBlock2DCrossAttn":
                widths += [channels[-1]] * min(_per_block(depths[-1], 1)[0], _MAX_LAYERS)
            return cls(text_width=int(values["cross_attention_dim"]), widths=_checked(widths))

    @classmethod
    def of_adapter(cls, config: Mapping[str, Any]) -> "CrossAttentions":
        """Read those that an IP-Adapter is for from its package's config.json; raises PackageError."""
        with config_errors():
            return cls(text_width=int(config["cross_attention_dim"]), widths=_checked(config["layer_widths"]))

    def describe(self) -> str:
        """Describe them in a phrase."""
        narrow, wide = min(self.widths, default=0), max(self.widths, default=0)
        return f"{len(self.widths)} cross-attentions of {narrow} to {wide} channels to text of width {self.text_width}"


def _per_level(value: Any, levels: int) -> list[Any]:
    return cast("list[Any]", [value] * levels if isinstance(value, int) else list(value))


def _per_block(value: Any, blocks: int) -> list[int]:
    """The transformer layers of each block of a level."""
    return [value] * blocks if isinstance(value, int) else [int(each) for each in value]


def _level_widths(
    channels: Sequence[int], kinds: Sequence[str], layers: Sequence[int], depths: Sequence[Any]
) -> list[int]:
    """The channels of the cross-attentions on the way down or up."""
    levels = zip(channels, kinds, layers, depths, strict=True)
    return [
        width
        for width, kind, count, depth in levels
        if kind.startswith("CrossAttn")
        for blocks in _per_block(depth, count)
        for _ in range(min(blocks, _MAX_LAYERS))
    ]


def _checked(widths: Sequence[Any]) -> tuple[int, ...]:
    if len(widths) > _MAX_LAYERS or not all(type(each) is int and 0 < each <= _MAX_WIDTH for each in widths):
        raise ValueError("the widths of its cross-attentions")
    return tuple(widths)


def describe_ip_adapter(adapter: Package) -> str:
    """Describe in one line the U-Nets that an IP-Adapter is for."""
    config = _config(adapter)
    kind = "plain" if _is_projected(adapter) else "Plus"
    return f"{kind}, {num_tokens(adapter)} tokens, for U-Nets with {CrossAttentions.of_adapter(config).describe()}"


def check_ip_adapter(package: Package, adapter: Package) -> None:
    """Check that an IP-Adapter fits a package's U-Net, which takes its keys and values.

    Raises:
        PackageError: it is another package, or is for other U-Nets; or the U-Net was exported without its inputs.
    """
    if adapter.kind is not PackageKind.IP_ADAPTER:
        raise PackageError(f"{adapter.root} is {adapter.title}, not an IP-Adapter; give the package of one")
    unet = CrossAttentions.of_unet(read_json(package.root / "unet" / "config.json"))
    other = CrossAttentions.of_adapter(_config(adapter))
    if other != unet:
        raise PackageError(
            f"{adapter.name} is for U-Nets with {other.describe()}; {package.name} has {unet.describe()}; "
            "give an IP-Adapter that was made for it"
        )
    graphs, controlled = package.manifest.components["unet"].graphs, Variant(controlled=True).name
    if controlled not in graphs or IMAGE_KEYS not in read_stages(package.graph("unet", controlled), cut=False).inputs:
        raise PackageError(
            f"{package.name} has no U-Net graph for IP-Adapters; export its checkpoint again, not --via optimum"
        )


def num_tokens(adapter: Package) -> int:
    """How many tokens an IP-Adapter makes of an image; raises PackageError."""
    with config_errors():
        tokens = _config(adapter)["num_tokens"]
        if type(tokens) is not int or not 0 < tokens <= _MAX_TOKENS:
            raise ValueError(f"num_tokens is {tokens!r:.40}")
        return tokens


def all_tokens(adapters: Sequence[Package]) -> int:
    """How many tokens each of some IP-Adapters has beside the others, see `ImagePrompts`."""
    return math.lcm(*(num_tokens(adapter) for adapter in adapters))


def _config(adapter: Package) -> dict[str, Any]:
    return read_json(adapter.root / _ADAPTER / "config.json")


@dataclass(frozen=True, kw_only=True, eq=False)
class ImagePrompt:
    """An image as an IP-Adapter gives it to a U-Net."""

    keys: Array
    """(2, T, W): of no image, and of the image."""
    values: Array
    """The same, times the scale."""
    adapter: IPAdapter


def encode_image_prompts(run: Runner, adapters: Sequence[Package], request: CompleteRequest) -> list[ImagePrompt]:
    """Encode the images of a request's IP-Adapters, of which each is loaded and unloaded in turn.

    Raises:
        PackageError, DeviceError: as `Runner` does.
    """
    pairs = zip(adapters, request.ip_adapters, strict=True)
    return [_encode(run, component_prefix(index), *pair) for index, pair in enumerate(pairs)]


def _encode(run: Runner, prefix: str, package: Package, adapter: IPAdapter) -> ImagePrompt:
    config = _config(package)
    state = str(config.get("image_state"))
    pixels = clip_pixels(adapter.image, image_size(package))
    negative = np.zeros_like(pixels)
    projected = _is_projected(package)
    outputs = run(f"{prefix}{_ENCODER}", {"pixel_values": pixels if projected else np.concatenate([negative, pixels])})
    run.components.unload(f"{prefix}{_ENCODER}")
    if state not in outputs:
        raise PackageError(f"{package.root}: {_ENCODER} has no output '{state}'; export again")
    # As in diffusers: no image is an embedding of zeros, or the hidden state of an image of zeros.
    states = np.concatenate([np.zeros_like(outputs[state]), outputs[state]]) if projected else outputs[state]
    made = run(f"{prefix}{_ADAPTER}", {state: states})
    run.components.unload(f"{prefix}{_ADAPTER}")
    shape = (2, num_tokens(package), sum(CrossAttentions.of_adapter(config).widths))
    for name in (IMAGE_KEYS, IMAGE_VALUES):
        if name not in made or made[name].shape != shape:
            raise PackageError(f"{package.root}: {_ADAPTER} has no '{name}' of shape {shape}; export again")
    return ImagePrompt(keys=made[IMAGE_KEYS], values=np.float32(adapter.scale) * made[IMAGE_VALUES], adapter=adapter)


def encoded_images(package: Package) -> int:
    """How many images an IP-Adapter's encoder sees at a time: the image, and for a Plus also one of zeros."""
    return 1 if _is_projected(package) else 2


def _is_projected(package: Package) -> bool:
    """Whether an IP-Adapter reads the encoder's projected embedding, as all but a Plus do."""
    return _config(package).get("image_projection") == "linear"


def image_size(package: Package) -> int:
    """Width and height of the images that an IP-Adapter's encoder takes; raises PackageError."""
    size = read_stages(package.graph(_ENCODER), cut=False).inputs["pixel_values"].shape[-1]
    if not isinstance(size, int) or not 0 < size <= _MAX_WIDTH:
        raise PackageError(f"{package.root}: {_ENCODER} takes images of size {size!r}; export again")
    return size


class ImagePrompts:
    """The keys and values that a U-Net takes at each step: (N, A, T, W) for A images.

    An image with fewer tokens than another has each of them several times, which changes no attention: the weights of
    equal keys add up to that of one.

    Args:
        prompts: the images; none is one image whose values are zeros.
        width: W of the U-Net.
        num_conditional: how many of the last batch entries are conditional; the others see no image.
        steps: of the pass.
    """

    def __init__(self, prompts: Sequence[ImagePrompt], width: int, *, num_conditional: int, steps: int) -> None:
        self._prompts, self._steps, self._num_conditional = prompts, steps, num_conditional
        absent = freeze(np.zeros((1, 1, 1, width), np.float32))
        self._absent: Mapping[str, Array] = {IMAGE_KEYS: absent, IMAGE_VALUES: absent}
        self._made: dict[tuple[int, ...], Mapping[str, Array]] = {}

    def __call__(self, step: int, entries: int) -> Mapping[str, Array]:
        """The inputs of a step for so many batch entries, by name."""
        active = [each for each in self._prompts if self._is_active(each.adapter, step)]
        if not active:
            return self._absent
        key = (entries, *map(id, active))
        if key not in self._made:
            self._made = {key: self._stack(active, entries)}
        return self._made[key]

    def _is_active(self, adapter: IPAdapter, step: int) -> bool:
        return adapter.scale != 0 and is_within_steps((adapter.start, adapter.end), step, self._steps)

    def _rows(self, entries: int) -> list[int]:
        """Whether each batch entry sees the images, 0 or 1."""
        seeing = min(entries, self._num_conditional)
        return [0] * (entries - seeing) + [1] * seeing

    def _stack(self, active: Sequence[ImagePrompt], entries: int) -> dict[str, Array]:
        tokens = math.lcm(*(each.keys.shape[1] for each in active))
        rows = self._rows(entries)

        def stack(arrays: Sequence[Array]) -> Array:
            repeated = [np.repeat(each, tokens // each.shape[1], axis=1)[rows] for each in arrays]
            return freeze(np.stack(repeated, axis=1))  # (N, A, T, W)

        return {
            IMAGE_KEYS: stack([each.keys for each in active]),
            IMAGE_VALUES: stack([each.values for each in active]),
        }
