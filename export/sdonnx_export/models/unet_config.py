"""The config of a conditional U-Net: diffusers' UNet2DConditionModel."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdonnx_export.models.config_reader import ConfigReader

_DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
_UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
"""diffusers' defaults."""

_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DConditionModel",),
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
"""Keys that change the graph, with the values that have a written graph."""

_IGNORED = ("addition_embed_type_num_heads", "dropout", "sample_size")
"""Keys that don't change it: of "text" embeddings and of training; the default size."""


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """A conditional U-Net, with diffusers' keys as names.

    Tuples have one entry per level, from the highest resolution to the lowest; on the up path from the lowest.
    """

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    down_attention: tuple[bool, ...]
    """Whether a level of the down path has cross-attention: its ``down_block_types``."""
    up_attention: tuple[bool, ...]
    """The same of the up path."""
    mid_block_type: str | None
    """UNetMidBlock2DCrossAttn; or UNetMidBlock2D, a single residual block."""
    layers_per_block: tuple[int, ...]
    num_attention_heads: tuple[int, ...]
    down_transformer_layers: tuple[tuple[int, ...], ...]
    """Transformer layers of each attention of a level."""
    mid_transformer_layers: int
    up_transformer_layers: tuple[tuple[int, ...], ...]
    cross_attention_dim: int
    norm_num_groups: int
    norm_eps: float
    use_linear_projection: bool
    downsample_padding: int
    time_embedding_dim: int
    """Width of the embedded timestep."""
    flip_sin_to_cos: bool
    """Whether the timestep embedding has cosines before sines."""
    freq_shift: float
    projection_class_embeddings_input_dim: int | None
    """For SDXL the width of pooled text and embedded time ids, which are added to the timestep embedding."""
    addition_time_embed_dim: int
    """Width of the sinusoidal embedding of each time id; 0 without any."""
    time_cond_proj_dim: int | None
    """Width of the embedded guidance scale, arXiv:2310.04378."""
    upcast_attention: bool
    """Whether the scores of attention overflow float16, and are float32 where all else is float16."""
    token_downsampling: bool = False
    """Whether keys and values of the highest self-attention are downsampled by 2 per axis (ToDo, arXiv:2402.13573)."""
    controlled: bool = False
    """Whether it has inputs for the residuals of ControlNets and T2I-Adapters, and for what IP-Adapters return."""

    @property
    def num_skips(self) -> int:
        """The number of skip connections."""
        return sum(self.layers_per_block) + len(self.block_out_channels)

    @property
    def downsampled_level(self) -> int | None:
        """The level whose tokens are downsampled."""
        attends = [down or up for down, up in zip(self.down_attention, self.up_attention[::-1], strict=True)]
        highest = attends.index(True) if True in attends else len(attends) - 1
        return highest if self.token_downsampling else None

    @property
    def first_attention_level(self) -> int | None:
        """The first level of the down path with cross-attention; None if only the mid block or the up path has any."""
        return self.down_attention.index(True) if True in self.down_attention else None

    @property
    def mid_block_has_attention(self) -> bool:
        """Whether the mid block has cross-attention."""
        return self.mid_block_type == "UNetMidBlock2DCrossAttn"

    @property
    def shares_batch_before_text(self) -> bool:
        """Whether batch entries with the same latents are equal up to the first cross-attention, and computed once."""
        has_attention = self.first_attention_level is not None or self.mid_block_has_attention
        return self.projection_class_embeddings_input_dim is None and has_attention

    def num_skips_before_text(self, count: int) -> int:
        """Return how many of ``count`` skip connections have the batch of the latents, and not yet that of the text."""
        if not self.shares_batch_before_text:
            return 0
        if self.first_attention_level is None:
            return count
        return 1 + sum(layers + 1 for layers in self.layers_per_block[: self.first_attention_level])

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """Parse a diffusers UNet2DConditionModel config.json; raises ExportError."""
        read = ConfigReader("unet", config)
        for key, supported in _SUPPORTED.items():
            read.require_value(key, *supported)
        read.ignore(*_IGNORED)
        channels = read.integers("block_out_channels", default=(320, 640, 1280, 1280))
        levels = len(channels)
        layers = read.integers("layers_per_block", levels, 2)
        down = read.enum_list("down_block_types", ("CrossAttnDownBlock2D", "DownBlock2D"), levels, _DOWN)
        up = read.enum_list("up_block_types", ("CrossAttnUpBlock2D", "UpBlock2D"), levels, _UP)
        has_time_ids = read.one_of("addition_embed_type", ("text_time", None), None) is not None
        if not has_time_ids:  # nor does diffusers read them then
            read.ignore("addition_time_embed_dim", "projection_class_embeddings_input_dim")
        has_guidance = config.get("time_cond_proj_dim") is not None
        parsed = cls(
            in_channels=read.integer("in_channels", 4),
            out_channels=read.integer("out_channels", 4),
            block_out_channels=channels,
            down_attention=tuple(name.startswith("CrossAttn") for name in down),
            up_attention=tuple(name.startswith("CrossAttn") for name in up),
            mid_block_type=_mid_block_type(read, config),
            layers_per_block=layers,
            num_attention_heads=read.integers("attention_head_dim", levels, 8),  # head counts, whatever the name says
            **_transformer_layers(read, layers, down, up, _mid_block_type(read, config)),
            cross_attention_dim=_cross_attention_dim(read, levels),
            norm_num_groups=_norm_num_groups(read, config),
            norm_eps=read.number("norm_eps", 1e-5),
            use_linear_projection=read.boolean("use_linear_projection", False),
            downsample_padding=read.one_of("downsample_padding", (0, 1), 1),
            time_embedding_dim=read.integer("time_embedding_dim", 4 * channels[0]),
            flip_sin_to_cos=read.boolean("flip_sin_to_cos", True),
            freq_shift=read.number("freq_shift", 0),
            projection_class_embeddings_input_dim=(
                read.integer("projection_class_embeddings_input_dim") if has_time_ids else None
            ),
            addition_time_embed_dim=read.integer("addition_time_embed_dim") if has_time_ids else 0,
            time_cond_proj_dim=read.integer("time_cond_proj_dim") if has_guidance else None,
            upcast_attention=read.boolean("upcast_attention", False),
        )
        only_cross = read.value("only_cross_attention", False)
        if only_cross is not False and only_cross != [False] * levels:
            raise read.invalid("only_cross_attention", only_cross, "False, for every level")
        parsed._check(read)
        read.finish()
        return parsed

    def _check(self, read: ConfigReader) -> None:
        """Raise ExportError for values that contradict each other."""
        if not (any(self.down_attention) or any(self.up_attention) or self.mid_block_has_attention):
            down = read.value("down_block_types")
            raise read.invalid("down_block_types", down, "one with a CrossAttnDownBlock2D, or a mid block")
        lowest = len(self.block_out_channels) - 1
        for level, (width, heads) in enumerate(zip(self.block_out_channels, self.num_attention_heads, strict=True)):
            if width % self.norm_num_groups != 0:
                raise read.invalid("norm_num_groups", self.norm_num_groups, f"a divisor of {width} channels")
            attends = self.down_attention[level] or self.up_attention[lowest - level]
            attends = attends or (self.mid_block_has_attention and level == lowest)
            if attends and width % heads != 0:
                raise read.invalid("attention_head_dim", heads, f"a divisor of {width} channels")


def _transformer_layers(
    read: ConfigReader, layers: tuple[int, ...], down_types: Sequence[str], up_types: Sequence[str], mid: str | None
) -> dict[str, Any]:
    """Read the transformer layers of each attention on the down path, in the mid block and on the up path."""
    attends_down, attends_up = ([name.startswith("CrossAttn") for name in types] for types in (down_types, up_types))
    attends_down[-1] |= mid == "UNetMidBlock2DCrossAttn"
    key, reverse_key = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    value, reverse = read.value(key, 1), read.value(reverse_key, None)
    value = [value] * len(layers) if type(value) is int else value
    reverse = reverse if reverse is not None else value[::-1] if isinstance(value, list) else value
    down = _per_block(read, key, value, layers, attends_down)
    up = _per_block(read, reverse_key, reverse, [count + 1 for count in layers[::-1]], attends_up)
    if len(set(down[-1])) > 1:
        raise read.invalid(key, value, "one number for the lowest level, which is also the mid block's")
    return {"down_transformer_layers": down, "mid_transformer_layers": down[-1][0], "up_transformer_layers": up}


def _per_block(
    read: ConfigReader, key: str, value: Any, counts: Sequence[int], attends: Sequence[bool]
) -> tuple[tuple[int, ...], ...]:
    """Return for each level a number for each of its blocks; a single number stands for all of them.

    The number of a level without attention has no meaning: diffusers takes any, also 0.
    """
    levels: list[tuple[int, ...]] = []
    for each, count, used in zip(value, counts, attends, strict=False) if isinstance(value, list) else ():
        blocks = [each if used else 1] * count if type(each) is int else each
        if isinstance(blocks, list) and all(type(item) is int and item > 0 for item in blocks):
            levels += [tuple(blocks)] if len(blocks) == count else []
    if len(levels) != len(counts) or len(value) != len(counts):
        expected = f"a whole number, or a list of {len(counts)}: numbers, or lists for the blocks"
        raise read.invalid(key, value, expected)
    return tuple(levels)


def _cross_attention_dim(read: ConfigReader, levels: int) -> int:
    """Read the text's width: one number, or the same for every level."""
    widths = read.integers("cross_attention_dim", levels, 1280)
    if len(set(widths)) > 1:
        raise read.invalid("cross_attention_dim", list(widths), "the same number for every level")
    return widths[0]


def _norm_num_groups(read: ConfigReader, config: Mapping[str, Any]) -> int:
    """Read the groups of the norms; null is a value here, of a U-Net without norms."""
    if "norm_num_groups" in config and config["norm_num_groups"] is None:
        raise read.invalid("norm_num_groups", None, "a whole number of at least 1")
    return read.integer("norm_num_groups", 32)


def _mid_block_type(read: ConfigReader, config: Mapping[str, Any]) -> str | None:
    """Read the type of the mid block; null is a value here, as distilled models leave the block out."""
    if "mid_block_type" in config and config["mid_block_type"] is None:
        return read.value("mid_block_type", None)
    return read.one_of("mid_block_type", ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"), "UNetMidBlock2DCrossAttn")
