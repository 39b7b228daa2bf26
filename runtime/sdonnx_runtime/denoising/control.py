"""ControlNets (arXiv:2302.05543) and T2I-Adapters (arXiv:2302.08453): what a picture adds to a U-Net, step by step."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import numpy as np

from sdonnx_runtime.arrays import AnyArray, Array
from sdonnx_runtime.denoising.denoiser import is_within_steps
from sdonnx_runtime.errors import PackageError, RequestError
from sdonnx_runtime.images.crop import CropRegion
from sdonnx_runtime.images.preprocess import flatten_alpha, resize_to_fit
from sdonnx_runtime.packages.manifest import read_json
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.request import Control, Request, given

Run: TypeAlias = Callable[[Mapping[str, AnyArray], str], Mapping[str, AnyArray]]
"""Runs one of a U-Net's graphs on its inputs by name."""

_BESIDE, _MIDDLE = "down_block_additional_residuals", "mid_block_additional_residual"
_INSIDE = "down_intrablock_additional_residuals"
_UNETS: Mapping[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "addition_embed_type": None,
}
"""diffusers' defaults of what is compared."""


def component_prefix(index: int) -> str:
    """What the names of a control's components begin with."""
    return f"control.{index}/"


def control_components(nets: Sequence[Package]) -> list[str]:
    """The names of the nets' components."""
    return [f"{component_prefix(index)}{net.control}" for index, net in enumerate(nets)]


def adapter_levels(kind: str, channels: Sequence[int], downscale: int) -> tuple[tuple[int, int], ...]:
    """Channels of what each level of a T2I-Adapter gives, and how many times smaller than its picture it is.

    Args:
        kind: full_adapter, full_adapter_xl (four levels, halved once) or light_adapter (the last level is there twice).
        channels: of its config.
        downscale: pixels for each cell of the first level.
    """
    widths = [*channels, channels[-1]] if kind == "light_adapter" else [*channels]
    halvings = (0, 0, 1, 1) if kind == "full_adapter_xl" else range(len(widths))
    return tuple((width, downscale * 2**times) for width, times in zip(widths, halvings, strict=True))


@dataclass(frozen=True, kw_only=True)
class ResidualSpec:
    """Where a U-Net can be added to."""

    beside: tuple[int, ...]
    """Channels of each skip connection."""
    inside: tuple[tuple[int, int], ...]
    """Channels at the end of each level and of the middle, and pixels for each cell there."""
    context: int = 0
    """Width of the text's states."""
    told: bool = False
    """Whether sizes are told it, as SDXL is."""

    @classmethod
    def of(cls, config: Mapping[str, Any], downscale: int = 8) -> "ResidualSpec":
        """Those of a U-Net or a ControlNet by diffusers' config.json; ``downscale`` is the latents'."""
        values = {key: default if config.get(key) is None else config[key] for key, default in _UNETS.items()}
        channels, kinds, layers = (
            values[key] for key in ("block_out_channels", "down_block_types", "layers_per_block")
        )
        layers = [layers] * len(channels) if isinstance(layers, int) else layers
        beside, inside, last = [channels[0]], list[tuple[int, int]](), len(channels) - 1
        for level, (width, kind, count) in enumerate(zip(channels, kinds, layers, strict=True)):
            beside += [width] * (count + (level < last))
            inside.append((width, downscale * 2 ** (level + (not kind.startswith("CrossAttn") and level < last))))
        return cls(
            beside=tuple(beside),
            inside=(*inside, (channels[-1], downscale * 2**last)),
            context=values["cross_attention_dim"],
            told=values["addition_embed_type"] is not None,
        )


def described(net: Package) -> str:
    """What a control is for, in one line."""
    config = _config(net)
    if net.control == "adapter":
        levels = ", ".join(f"{width} channels at 1/{scale}" for width, scale in _levels(config))
        return f"U-Nets with {levels}"
    places = ResidualSpec.of(config)
    family = "SDXL" if places.told else "Stable Diffusion 1 or 2"
    return (
        f"{family}: text of {places.context} numbers, U-Nets with {len(places.beside)} skips of {places.beside[0]} to "
        + (f"{places.beside[-1]} channels")
    )


def check_control(package: Package, net: Package) -> None:
    """Finds out whether a net steers a package's U-Net.

    Raises:
        PackageError: it is no ControlNet or T2I-Adapter, or is one of other U-Nets.
    """
    if net.control is None:
        raise PackageError(
            f"{net.root} is {net.kind}, no ControlNet or T2I-Adapter; give a package that 'sdonnx export' made of one"
        )
    unet, config = read_json(package.root / "unet" / "config.json"), _config(net)
    mine = ResidualSpec.of(unet, package.manifest.latents.downscale)
    if net.control == "adapter":
        levels = _levels(config)
        if levels == mine.inside[: len(levels)]:
            return
        found, wanted = (", ".join(f"{width} at 1/{scale}" for width, scale in each) for each in (levels, mine.inside))
        raise PackageError(
            f"{net.name} gives channels of {found}, the U-Net of {package.name} takes {wanted}; "
            "give a T2I-Adapter that was made for it"
        )
    its = ResidualSpec.of(config)
    if (its.beside, its.context, its.told) != (mine.beside, mine.context, mine.told):
        raise PackageError(
            f"{net.name} steers {described(net)}, but {package.name} has text of {mine.context} numbers and "
            f"{len(mine.beside)} skips of {mine.beside[0]} to {mine.beside[-1]} channels; "
            "give a ControlNet that was made for it"
        )


def check_sizes(nets: Sequence[Package], request: Request) -> None:
    """Finds out whether the nets can work at the size of a pass.

    Raises:
        RequestError: a side is no multiple of what a T2I-Adapter makes one cell of.
    """
    for net in nets:
        multiple = _levels(_config(net))[0][1] if net.control == "adapter" else 1
        for name in ("width", "height"):
            side = given(getattr(request, name))
            if side % multiple:
                raise RequestError(f"{name} {side} is not a multiple of {multiple}, which {net.name} needs")


def _config(net: Package) -> dict[str, Any]:
    return read_json(net.root / str(net.control) / "config.json")


def _levels(config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    channels = cast("Sequence[int]", config.get("channels", (320, 640, 1280, 1280)))
    return adapter_levels(config.get("adapter_type", "full_adapter"), channels, config.get("downscale_factor", 8))


@dataclass(kw_only=True)
class ControlModel:
    """One net and its picture in one pass."""

    kind: str
    """controlnet or adapter."""
    run: Callable[[Mapping[str, AnyArray]], Mapping[str, AnyArray]]
    picture: Array
    """(1, C, H, W), 0 to 1."""
    told: tuple[str, ...] = ()
    """What it is told as the U-Net is, besides latents, time and text."""
    channels: int = 4
    """The latents' that it sees; what follows them is not its."""
    control: Control
    features: Mapping[str, Array] | None = field(default=None, init=False)
    """An adapter's, the same in each step."""

    def __call__(self, inputs: Mapping[str, AnyArray], *, guess: bool) -> dict[str, Array]:
        """What it adds to a U-Net that is given ``inputs``, by the U-Net's names, in one row or in the text's."""
        if self.kind == "adapter":
            if self.features is None:
                self.features = dict(self.run({"control_image": self.picture}))
            return {name: self.control.scale * value for name, value in self.features.items()}
        rows = slice(-1, None) if guess else slice(None)
        feeds = {name: inputs[name][rows] for name in ("sample", "encoder_hidden_states", *self.told)}
        feeds["sample"] = feeds["sample"][:, : self.channels]
        made = self.run({**feeds, "timestep": inputs["timestep"], "controlnet_cond": self.picture})
        found = dict(zip(residual_names(self.kind, made), made.values(), strict=True))
        weights = np.logspace(-1, 0, len(found)) if guess else np.ones(len(found))
        count = len(inputs["encoder_hidden_states"])
        scaled = {
            name: np.float32(self.control.scale * weight) * value
            for (name, value), weight in zip(found.items(), weights, strict=True)
        }
        return {name: _last_of(count, value) for name, value in scaled.items()} if guess else scaled


def residual_names(kind: str, outputs: Collection[str]) -> list[str]:
    """What a U-Net calls the outputs of a net of a kind, in their order."""
    beside = [f"{_BESIDE}.{index}" for index in range(len(outputs) - 1)]
    return [*outputs] if kind == "adapter" else [*beside, _MIDDLE]


def _last_of(count: int, row: Array) -> Array:
    """``count`` rows, zeros but for the last: guess mode leaves the unconditional one alone."""
    return np.concatenate([np.zeros((count - 1, *row.shape[1:]), row.dtype), row])


def make_control(
    index: int, package: Package, run: Callable[..., Any], request: Request, region: CropRegion | None
) -> ControlModel:
    """A net with its picture in the size of a checked request's pass.

    Args:
        index: which of the request's controls.
        package: the net's.
        run: runs components by their name.
        request: of the pass.
        region: what part of the request's image is worked in, and so of the picture.
    """
    control, config, kind = request.controls[index], _config(package), str(package.control)
    size = given(request.width), given(request.height)
    picture = flatten_alpha(control.image)
    picture = resize_to_fit(picture, size, request.fit) if region is None else region.cut(picture)
    gray = config.get("in_channels", 3) == 1 and kind == "adapter"
    pixels = np.asarray(picture.convert("L"))[..., None] if gray else np.asarray(picture)
    told = ("text_embeds", "time_ids") if config.get("addition_embed_type") is not None else ()
    return ControlModel(
        kind=kind,
        run=lambda feeds: run(f"{component_prefix(index)}{kind}", feeds),
        picture=np.moveaxis(pixels.astype(np.float32) / np.float32(255), 2, 0)[None],
        told=told,
        channels=config.get("in_channels", 4),
        control=control,
    )


class ControlledUNet:
    """A U-Net that nets add to; without any it is the U-Net alone.

    In steps that reuse another's inner part (`StepReuse`) the nets don't run, and what they gave last is added.

    Args:
        run: the U-Net.
        package: its package.
        nets: each with its picture.
        guess: whether a ControlNet runs on the conditional row alone, and less at higher resolutions: its guess mode.
        steps: how many there will be.
    """

    def __init__(self, run: Run, package: Package, nets: Sequence[ControlModel], *, guess: bool, steps: int) -> None:
        unet = (
            ResidualSpec.of(read_json(package.root / "unet" / "config.json"))
            if nets
            else ResidualSpec(beside=(), inside=())
        )
        self._run, self._nets, self._guess, self._steps = run, nets, guess, steps
        nothing = np.zeros((1, 1, 1, 1), np.float32)
        beside = (f"{_BESIDE}.{index}" for index in range(len(unet.beside)))
        inside = (f"{_INSIDE}.{index}" for index in range(len(unet.inside)))
        self._nothing: dict[str, Array] = dict.fromkeys((*beside, _MIDDLE, *inside), nothing)
        self._last, self._step = self._nothing, 0

    def next_step(self) -> None:
        """The step's runs are done."""
        self._step += 1

    def __call__(self, inputs: Mapping[str, AnyArray], graph: str) -> Mapping[str, AnyArray]:
        """What the U-Net gives."""
        if not self._nets:
            return self._run(inputs, graph)
        rows = len(inputs["encoder_hidden_states"])
        if not graph.startswith("reusing"):
            self._last = self._residuals(inputs)
        return self._run({**inputs, **{name: value[-rows:] for name, value in self._last.items()}}, graph)

    def _residuals(self, inputs: Mapping[str, AnyArray]) -> dict[str, Array]:
        total = dict(self._nothing)
        for net in self._nets:
            control = net.control
            if control.scale == 0 or not is_within_steps((control.start, control.end), self._step, self._steps):
                continue
            for name, value in net(inputs, guess=self._guess).items():
                total[name] = total[name] + value
        return total
