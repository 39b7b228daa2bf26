"""What the graphs take from a checkpoint's config files; a value they can't honour is an error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdonnx_runtime.errors import ExportError

_REQUIRED: Any = object()


class ConfigReader:
    """Takes a config file's values one by one, and at the end objects to those nobody took."""

    def __init__(self, component: str, config: Mapping[str, Any]) -> None:
        self._component = component
        self._config = config
        self._unread = {key for key in config if not key.startswith("_")}

    def value(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value under ``key``, or ``default`` where it is absent or null."""
        self._unread.discard(key)
        found = self._config.get(key)
        if found is not None:
            return found
        if default is _REQUIRED:
            raise ExportError(f"{self._component}: the config has no '{key}'; it is needed to build the graph")
        return default

    def integer(self, key: str, default: Any = _REQUIRED, *, low: int = 1) -> int:
        """A whole number of at least ``low``."""
        found = self.value(key, default)
        if not isinstance(found, int) or isinstance(found, bool) or found < low:
            raise self.refusal(key, found, f"a whole number of at least {low}")
        return found

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A finite number."""
        found = self.value(key, default)
        if not isinstance(found, (int, float)) or isinstance(found, bool) or not abs(found) < float("inf"):
            raise self.refusal(key, found, "a number")
        return float(found)

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        """True or false."""
        return bool(self.one_of(key, (True, False), default))

    def one_of(self, key: str, works: Sequence[Any], default: Any = _REQUIRED) -> Any:
        """One of ``works``."""
        found = self.value(key, default)
        if not any(found is option or (found == option and type(found) is type(option)) for option in works):
            raise self.refusal(key, found, " or ".join(repr(option) for option in works))
        return found

    def integers(self, key: str, count: int | None = None, default: Any = _REQUIRED) -> tuple[int, ...]:
        """A list of whole numbers of at least 1, ``count`` of them; a single number stands for all."""
        found = self.value(key, default)
        if count is not None and type(found) is int:
            found = [found] * count
        whole = isinstance(found, (list, tuple)) and all(type(item) is int and item > 0 for item in found)
        if not whole or len(found) != (count if count is not None else max(len(found), 1)):
            expected = "a list of whole numbers" if count is None else f"a whole number, or a list of {count}"
            raise self.refusal(key, found, expected)
        return tuple(found)

    def names(self, key: str, works: Sequence[str], count: int) -> tuple[str, ...]:
        """A list of ``count`` names, each one of ``works``."""
        found = self.value(key)
        if not isinstance(found, (list, tuple)) or len(found) != count:
            raise self.refusal(key, found, f"a list of {count} (one for each of block_out_channels)")
        for name in found:
            if name not in works:
                raise self.refusal(key, name, " or ".join(works))
        return tuple(found)

    def fixed(self, key: str, only: Any) -> None:
        """Only ``only`` works (or the key's absence, or null)."""
        found = self.value(key, only)
        if found != only:
            raise self.refusal(key, found, repr(only))

    def ignore(self, *keys: str) -> None:
        """These don't change what the graph computes."""
        self._unread.difference_update(keys)

    def finish(self) -> None:
        """Objects to a key that nobody took, unless its value is one that switches something off."""
        unknown = {key: self._config[key] for key in sorted(self._unread)}
        for key, found in unknown.items():
            if found is not None and found is not False:
                raise self.refusal(key, found, "no such key (or null, or false)")

    def refusal(self, key: str, found: Any, expected: str) -> ExportError:
        """The error that says what was found under a key and what works."""
        return ExportError(f"{self._component}: '{key}' is {found!r}; what works here is {expected}")


@dataclass(frozen=True, kw_only=True)
class ClipTextConfig:
    """A CLIP text encoder."""

    vocab_size: int
    positions: int
    """Tokens in a prompt, 77 in every published model."""
    width: int
    inner_width: int
    layers: int
    heads: int
    activation: str
    """quick_gelu or gelu."""
    eps: float
    eos_token_id: int
    """2 stands for "the largest id", as in configs written before transformers 4.30."""
    projection: int | None
    """Width of the projected state of the whole text; None where there is no projection."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, projected: bool = False) -> "ClipTextConfig":
        """Parse a transformers config.json, with ``projected`` of an encoder that projects; raises ExportError."""
        read = ConfigReader("text_encoder_2" if projected else "text_encoder", config)
        read.fixed("model_type", "clip_text_model")
        # No finish(): transformers writes its general settings here too, and none of them is the encoder's.
        parsed = cls(
            vocab_size=read.integer("vocab_size", 49408),
            positions=read.integer("max_position_embeddings", 77),
            width=read.integer("hidden_size", 512),
            inner_width=read.integer("intermediate_size", 2048),
            layers=read.integer("num_hidden_layers", 12),
            heads=read.integer("num_attention_heads", 8),
            activation=read.one_of("hidden_act", ("quick_gelu", "gelu"), "quick_gelu"),
            eps=read.number("layer_norm_eps", 1e-5),
            eos_token_id=read.integer("eos_token_id", 49407, low=0),
            projection=read.integer("projection_dim", 512) if projected else None,
        )
        if parsed.width % parsed.heads != 0:
            raise read.refusal("num_attention_heads", parsed.heads, f"a divisor of hidden_size {parsed.width}")
        return parsed


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """A conditional U-Net; one entry of each tuple for a resolution, the highest first."""

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    down_attention: tuple[bool, ...]
    up_attention: tuple[bool, ...]
    """In the order of the up path: the lowest resolution first."""
    mid_block: str | None
    """UNetMidBlock2DCrossAttn; UNetMidBlock2D is one residual block alone."""
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    down_transformers: tuple[tuple[int, ...], ...]
    """How many layers each block's attention to the text has."""
    mid_transformer: int
    up_transformers: tuple[tuple[int, ...], ...]
    """In the order of the up path."""
    context_width: int
    groups: int
    eps: float
    linear_projection: bool
    downsample_padding: int
    cosine_first: bool
    """Time embedding order: cosines before sines."""
    frequency_shift: float
    added_width: int | None
    """SDXL's: the width of the text's pooled state and of the sinusoids of sizes, which are added to the time."""
    id_width: int
    """Numbers in the sinusoids of each size."""
    guidance_width: int | None
    """Numbers in which the guidance scale is told beside the time, arXiv:2310.04378."""
    token_downsampling: bool = False
    """Whether the self-attention of the highest resolution that has one reads every other row and column alone."""
    controlled: bool = False
    """Whether it is given what a ControlNet or a T2I-Adapter adds to it."""

    @property
    def skips(self) -> int:
        """How many skip connections there are."""
        return sum(self.layers) + len(self.channels)

    @property
    def downsampled_level(self) -> int | None:
        """The level whose tokens are downsampled."""
        attends = [down or up for down, up in zip(self.down_attention, self.up_attention[::-1], strict=True)]
        highest = attends.index(True) if True in attends else len(attends) - 1
        return highest if self.token_downsampling else None

    @property
    def first_attention(self) -> int | None:
        """The first level of the down path that attends to the text; None leaves it to the mid block or the up path."""
        return self.down_attention.index(True) if True in self.down_attention else None

    @property
    def shares_rows(self) -> bool:
        """Whether rows that differ in their text alone are equal up to the first attention to it."""
        return self.added_width is None and (self.first_attention is not None or self.attends_in_the_middle)

    @property
    def attends_in_the_middle(self) -> bool:
        """Whether the mid block attends to the text."""
        return self.mid_block == "UNetMidBlock2DCrossAttn"

    def skips_before_text(self, count: int) -> int:
        """How many of ``count`` skip connections have the rows of the states, and not yet those of the text."""
        if not self.shares_rows:
            return 0
        if self.first_attention is None:
            return count
        return 1 + sum(layers + 1 for layers in self.layers[: self.first_attention])

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """Parse a diffusers UNet2DConditionModel config.json; raises ExportError."""
        read = ConfigReader("unet", config)
        read.fixed("_class_name", "UNet2DConditionModel")
        channels = read.integers("block_out_channels", default=(320, 640, 1280, 1280))
        levels = len(channels)
        _refuse_other_unets(read)
        down = read.names("down_block_types", ("CrossAttnDownBlock2D", "DownBlock2D"), levels)
        up = read.names("up_block_types", ("CrossAttnUpBlock2D", "UpBlock2D"), levels)
        layers = read.integers("layers_per_block", levels, 2)
        down_transformers, mid_transformer, up_transformers = _transformers(read, layers)
        added = read.one_of("addition_embed_type", ("text_time", None), None) is not None
        parsed = cls(
            in_channels=read.integer("in_channels", 4),
            out_channels=read.integer("out_channels", 4),
            channels=channels,
            down_attention=tuple(name.startswith("CrossAttn") for name in down),
            up_attention=tuple(name.startswith("CrossAttn") for name in up),
            mid_block=_mid_block(read, config),
            layers=layers,
            heads=read.integers("attention_head_dim", levels, 8),  # head counts, whatever the name says
            down_transformers=down_transformers,
            mid_transformer=mid_transformer,
            up_transformers=up_transformers,
            context_width=read.integer("cross_attention_dim", 1280),
            groups=read.integer("norm_num_groups", 32),
            eps=read.number("norm_eps", 1e-5),
            linear_projection=read.boolean("use_linear_projection", False),
            downsample_padding=read.one_of("downsample_padding", (0, 1), 1),
            cosine_first=read.boolean("flip_sin_to_cos", True),
            frequency_shift=read.number("freq_shift", 0),
            added_width=read.integer("projection_class_embeddings_input_dim") if added else None,
            id_width=read.integer("addition_time_embed_dim") if added else 0,
            guidance_width=None if config.get("time_cond_proj_dim") is None else read.integer("time_cond_proj_dim"),
        )
        if not (any(parsed.down_attention) or any(parsed.up_attention) or parsed.attends_in_the_middle):
            raise read.refusal("down_block_types", down, "one with a CrossAttnDownBlock2D, or a mid block")
        for level, (width, heads) in enumerate(zip(channels, parsed.heads, strict=True)):
            if width % parsed.groups != 0:
                raise read.refusal("norm_num_groups", parsed.groups, f"a divisor of {width} channels")
            attends = parsed.down_attention[level] or parsed.up_attention[levels - 1 - level]
            attends = attends or (parsed.attends_in_the_middle and level == levels - 1)
            if attends and width % heads != 0:
                raise read.refusal("attention_head_dim", heads, f"a divisor of {width} channels")
        read.finish()
        return parsed


def _transformers(
    read: ConfigReader, layers: tuple[int, ...]
) -> tuple[tuple[tuple[int, ...], ...], int, tuple[tuple[int, ...], ...]]:
    """Layers of each block's attention on the way down, in the middle, and on the way up."""
    key, reverse = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    given, turned = read.value(key, 1), read.value(reverse, None)
    given = [given] * len(layers) if type(given) is int else given
    turned = turned if turned is not None else given[::-1] if isinstance(given, (list, tuple)) else given
    down = _per_block(read, key, given, layers)
    up = _per_block(read, reverse, turned, [count + 1 for count in layers[::-1]])
    if len(set(down[-1])) > 1:
        raise read.refusal(key, given, "one number for the lowest level, which the mid block has too")
    return down, down[-1][0], up


def _per_block(read: ConfigReader, key: str, found: Any, counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """For each level a number for each of its blocks; one number stands for all."""
    levels: list[tuple[int, ...]] = []
    for each, count in zip(found, counts, strict=False) if isinstance(found, (list, tuple)) else ():
        blocks = [each] * count if type(each) is int else each
        if isinstance(blocks, (list, tuple)) and all(type(item) is int and item > 0 for item in blocks):
            levels += [tuple(blocks)] if len(blocks) == count else []
    if len(levels) != len(counts) or len(found) != len(counts):
        raise read.refusal(key, found, f"a whole number, or a list of {len(counts)}: numbers, or lists for the blocks")
    return tuple(levels)


def _mid_block(read: ConfigReader, config: Mapping[str, Any]) -> str | None:
    """Null is a value here: distilled models leave the middle out."""
    if "mid_block_type" in config and config["mid_block_type"] is None:
        return read.value("mid_block_type", None)
    return read.one_of("mid_block_type", ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"), "UNetMidBlock2DCrossAttn")


def _refuse_other_unets(read: ConfigReader) -> None:
    """Keys of UNet2DConditionModel that change the graph and whose other values have no written graph."""
    for key, only in {
        "act_fn": "silu",
        "attention_type": "default",
        "center_input_sample": False,
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "dual_cross_attention": False,
        "mid_block_scale_factor": 1,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
        "time_embedding_type": "positional",
    }.items():
        read.fixed(key, only)
    # The arithmetic is float32 throughout, which is what upcast_attention asks for.
    read.ignore("addition_embed_type_num_heads", "dropout", "sample_size", "upcast_attention")


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """A KL autoencoder; one entry of ``channels`` for a resolution, the highest first."""

    in_channels: int
    out_channels: int
    latent_channels: int
    channels: tuple[int, ...]
    layers: int
    groups: int
    mid_attention: bool
    quant_conv: bool
    post_quant_conv: bool
    scaling_factor: float
    """Latents the U-Net sees are the encoder's, less the shift, times this."""
    shift_factor: float
    tiled: bool = False
    """Whether it works on tiles, with norms over the whole picture."""

    @property
    def downscale(self) -> int:
        """Pixels for each latent cell, per axis."""
        return 2 ** (len(self.channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VaeConfig":
        """Parse a diffusers AutoencoderKL config.json; raises ExportError."""
        read = ConfigReader("vae", config)
        read.fixed("_class_name", "AutoencoderKL")
        channels = read.integers("block_out_channels", default=(64,))
        read.names("down_block_types", ("DownEncoderBlock2D",), len(channels))
        read.names("up_block_types", ("UpDecoderBlock2D",), len(channels))
        read.fixed("act_fn", "silu")
        read.ignore("sample_size", "force_upcast")  # float32 throughout
        parsed = cls(
            in_channels=read.integer("in_channels", 3),
            out_channels=read.integer("out_channels", 3),
            latent_channels=read.integer("latent_channels", 4),
            channels=channels,
            layers=read.integer("layers_per_block", 1),
            groups=read.integer("norm_num_groups", 32),
            mid_attention=read.boolean("mid_block_add_attention", True),
            quant_conv=read.boolean("use_quant_conv", True),
            post_quant_conv=read.boolean("use_post_quant_conv", True),
            scaling_factor=read.number("scaling_factor", 0.18215),
            shift_factor=read.number("shift_factor", 0.0),
        )
        for width in channels:
            if width % parsed.groups != 0:
                raise read.refusal("norm_num_groups", parsed.groups, f"a divisor of {width} channels")
        read.finish()
        return parsed
