"""ControlNets (arXiv:2302.05543) and T2I-Adapters (arXiv:2302.08453): residuals of a U-Net from conditioning images."""

from collections.abc import Callable, Collection, Container, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import PackageError, RequestError
from sdonnx_runtime.execution.running.device_array import ALL_OUTPUTS, Tensor, as_numpy, freeze, last_entries
from sdonnx_runtime.images.crop import CropRegion
from sdonnx_runtime.images.preprocess import flatten_alpha, resize_to_fit
from sdonnx_runtime.packages.families import PackageKind
from sdonnx_runtime.packages.manifest import read_json
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.request import CompleteRequest, Control

SKIP, MIDDLE = "down_block_additional_residuals", "mid_block_additional_residual"
LEVEL = "down_intrablock_additional_residuals"
"""Names of a U-Net's residual inputs, those of skips and levels before their index."""

_DEFAULTS: Mapping[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "addition_embed_type": None,
}
"""diffusers' defaults of the compared keys of a U-Net's config."""


def component_prefix(index: int) -> str:
    """Return the prefix of the names of a control's components."""
    return f"control.{index}/"


def adapter_levels(kind: str, channels: Sequence[int], downscale: int) -> tuple[tuple[int, int], ...]:
    """Return (channels, downscale from the image) of the residual of each level of a T2I-Adapter.

    ``kind`` is full_adapter, full_adapter_xl (four levels, halved once) or light_adapter (the last level is there
    twice), ``channels`` are its config's, ``downscale`` is the first level's.
    """
    widths = [*channels, channels[-1]] if kind == "light_adapter" else [*channels]
    halvings = (0, 0, 1, 1) if kind == "full_adapter_xl" else range(len(widths))
    return tuple((width, downscale * 2**times) for width, times in zip(widths, halvings, strict=True))


@dataclass(frozen=True, kw_only=True)
class ResidualSpec:
    """The residuals that a U-Net takes, and the conditioning that a ControlNet shares with it."""

    skips: tuple[int, ...]
    """Channels of each skip connection."""
    levels: tuple[tuple[int, int], ...]
    """Channels at the end of each level and of the middle block, and image pixels per pixel there."""
    cross_attention_dim: int
    added_cond: bool
    """Whether it takes pooled embeddings and sizes, as SDXL does."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], downscale: int = 8) -> "ResidualSpec":
        """Read that of a U-Net or a ControlNet from diffusers' config.json; ``downscale`` is the latents'.

        Raises:
            PackageError: the config has values of other types or sizes.
        """
        with config_errors():
            return cls._parse(config, downscale)

    @classmethod
    def _parse(cls, config: Mapping[str, Any], downscale: int) -> "ResidualSpec":
        values = {key: default if config.get(key) is None else config[key] for key, default in _DEFAULTS.items()}
        channels, kinds = values["block_out_channels"], values["down_block_types"]
        layers = values["layers_per_block"]
        layers = [layers] * len(channels) if isinstance(layers, int) else layers
        _check_numbers(*channels, values["cross_attention_dim"], *(100 * count for count in layers))
        skips, levels, last = [channels[0]], list[tuple[int, int]](), len(channels) - 1
        for level, (width, kind, count) in enumerate(zip(channels, kinds, layers, strict=True)):
            skips += [width] * (count + (level < last))
            levels.append((width, downscale * 2 ** (level + (not kind.startswith("CrossAttn") and level < last))))
        return cls(
            skips=tuple(skips),
            levels=(*levels, (channels[-1], downscale * 2**last)),
            cross_attention_dim=values["cross_attention_dim"],
            added_cond=values["addition_embed_type"] is not None,
        )

    def describe(self) -> str:
        """Describe in a phrase what a U-Net and its ControlNet have in common."""
        skips = f"{len(self.skips)} skip connections of {self.skips[0]} to {self.skips[-1]} channels"
        return f"cross_attention_dim {self.cross_attention_dim}, {skips}"


def _describe_levels(levels: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{width} at 1/{scale}" for width, scale in levels)


def describe_control(control: Package) -> str:
    """Describe in one line the U-Nets that a control is for."""
    config = _config(control)
    if control.kind is PackageKind.T2I_ADAPTER:
        return f"for U-Nets with channels of {_describe_levels(_levels(config))}"
    spec = ResidualSpec.from_config(config)
    return f"for {'SDXL' if spec.added_cond else 'Stable Diffusion 1 or 2'}: {spec.describe()}"


def check_control(package: Package, control: Package) -> None:
    """Check that a control fits a package's U-Net.

    Raises:
        PackageError: it is not a ControlNet or T2I-Adapter, or is for other U-Nets.
    """
    if not control.kind.is_control:
        raise PackageError(
            f"{control.root} is {control.title}, not a ControlNet or T2I-Adapter; give the package of one"
        )
    unet = ResidualSpec.from_config(_config(package, "unet"), package.manifest.latents.downscale)
    if control.kind is PackageKind.T2I_ADAPTER:
        levels = _levels(_config(control))
        if levels == unet.levels[: len(levels)]:
            return
        channels, expected = _describe_levels(levels), _describe_levels(unet.levels)
        raise PackageError(
            f"{control.name} has channels of {channels}; the U-Net of {package.name} requires {expected}; "
            "give a T2I-Adapter that was made for it"
        )
    other = ResidualSpec.from_config(_config(control))
    if replace(other, levels=unet.levels) != unet:
        raise PackageError(
            f"{control.name} is {describe_control(control)}; {package.name} has {unet.describe()}; "
            "give a ControlNet that was made for it"
        )


def check_sizes(controls: Sequence[Package], width: int, height: int) -> None:
    """Check that the sides of a pass are multiples of T2I-Adapters' downscale; raises RequestError."""
    for control in controls:
        multiple = _levels(_config(control))[0][1] if control.kind is PackageKind.T2I_ADAPTER else 1
        for name, side in (("width", width), ("height", height)):
            if side % multiple:
                raise RequestError(f"{name} {side} is not a multiple of {multiple}, which {control.name} requires")


def _config(package: Package, component: str | None = None) -> dict[str, Any]:
    return read_json(package.root / (component or package.kind.value) / "config.json")


def _levels(config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    channels = cast("Sequence[int]", config.get("channels", (320, 640, 1280, 1280)))
    with config_errors():
        _check_numbers(*channels, config.get("downscale_factor", 8))
        return adapter_levels(config.get("adapter_type", "full_adapter"), channels, config.get("downscale_factor", 8))


_MAX_SIZE, _MAX_LEVELS = 10_000, 16
"""Of the numbers in a config, and how many there may be."""


def _check_numbers(*sizes: Any) -> None:
    if len(sizes) > 3 * _MAX_LEVELS or not all(type(size) is int and 0 < size <= _MAX_SIZE for size in sizes):
        raise ValueError(f"sizes are {sizes!r:.100}")


@contextmanager
def config_errors() -> Generator[None, None, None]:
    """Turn what a damaged config.json raises into PackageError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise PackageError(
            f"the config.json of a U-Net, a control or an IP-Adapter is damaged ({error}); export again"
        ) from None


@dataclass(kw_only=True)
class ControlModel:
    """A ControlNet or T2I-Adapter with its conditioning image in one pass."""

    kind: str
    """controlnet or adapter."""
    run: Callable[[Mapping[str, Tensor], Container[str]], Mapping[str, Tensor]]
    """Returns its outputs, of which those in the second argument may be in a device's memory."""
    image: Array
    """(1, C, H, W), 0 to 1, read-only."""
    added_cond: tuple[str, ...] = ()
    """Further inputs that it shares with the U-Net (SDXL's)."""
    channels: int = 4
    """How many of the U-Net's input channels it takes; those of concat conditioning are not among them."""
    control: Control
    features: Mapping[str, Array] | None = field(default=None, init=False)
    """An adapter's residuals, the same in each step."""

    def __call__(self, inputs: Mapping[str, Tensor], *, guess: bool) -> Mapping[str, Tensor]:
        """Compute the residuals for a U-Net's ``inputs``, by its names, with one batch entry or as many as the text."""
        if self.kind == "adapter":
            if self.features is None:
                outputs = self.run({"control_image": self.image}, ())
                self.features = {
                    name: freeze(as_numpy(_scaled(value, self.control.scale))) for name, value in outputs.items()
                }
            return self.features
        feeds = {name: inputs[name] for name in ("sample", "encoder_hidden_states", *self.added_cond)}
        feeds = {name: last_entries(value, 1) for name, value in feeds.items()} if guess else feeds
        feeds["sample"] = as_numpy(feeds["sample"])[:, : self.channels]
        feeds |= {"timestep": inputs["timestep"], "controlnet_cond": self.image}
        outputs = self.run(feeds, ALL_OUTPUTS if self.control.scale == 1 and not guess else ())
        weights = np.logspace(-1, 0, len(outputs)) if guess else np.ones(len(outputs))
        residuals = {
            name: _scaled(value, self.control.scale * weight)
            for name, value, weight in zip(residual_names(self.kind, outputs), outputs.values(), weights, strict=True)
        }
        if not guess:
            return residuals
        others = len(inputs["encoder_hidden_states"]) - 1  # guess mode doesn't control the unconditional batch entries
        return {
            name: np.concatenate([*[np.zeros_like(value)] * others, as_numpy(value)])
            for name, value in residuals.items()
        }


def _scaled(value: Tensor, factor: float) -> Tensor:
    """A residual times a factor; itself, wherever it is, times 1."""
    return value if factor == 1 else np.float32(factor) * as_numpy(value)


def residual_names(kind: str, outputs: Collection[str]) -> list[str]:
    """Return the U-Net's names of the outputs of a control of a kind, in their order."""
    skips = [f"{SKIP}.{index}" for index in range(len(outputs) - 1)]
    return [*outputs] if kind == "adapter" else [*skips, MIDDLE]


def make_control(
    index: int,
    package: Package,
    run: Callable[..., Any],
    request: CompleteRequest,
    size: tuple[int, int],
    region: CropRegion | None,
) -> ControlModel:
    """Make the request's control of an index, with its conditioning image in the size (width, height) of a pass.

    ``region`` is the crop of the request's image, which the conditioning image has too.
    """
    control, config, kind = request.controls[index], _config(package), package.kind.value
    with config_errors():
        _check_numbers(config.get("in_channels", 4))
    image = flatten_alpha(control.image)
    image = resize_to_fit(image, size, request.fit) if region is None else region.crop(image)
    gray = config.get("in_channels", 3) == 1 and kind == "adapter"
    pixels = np.asarray(image.convert("L"))[..., None] if gray else np.asarray(image)
    return ControlModel(
        kind=kind,
        run=lambda feeds, keep: run(f"{component_prefix(index)}{kind}", feeds, keep=keep),
        image=freeze(np.array(np.moveaxis(pixels.astype(np.float32) / np.float32(255), 2, 0)[None], order="C")),
        added_cond=("text_embeds", "time_ids") if config.get("addition_embed_type") is not None else (),
        channels=config.get("in_channels", 4),
        control=control,
    )
