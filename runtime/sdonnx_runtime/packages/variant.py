"""Variants of a component's graph over one weights file: their names, order, and the inputs and outputs they add."""

from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeAlias

PLAIN = "plain"
"""The graph that every component has, with the inputs and outputs of optimum's exports."""

EMBEDDED, EMBEDS = "embedded", "inputs_embeds"
"""A text encoder that also takes its token embeddings, (N, S, C)."""

TILED = "tiled"
"""Half of a VAE that works on a tile of an image with the norm statistics of the whole image."""

NORM_STATS, USE_NORM_STATS, MEASURED_STATS = "norm_stats", "use_norm_stats", "measured_stats"
"""What a tiled graph takes and returns: of each norm the means and mean squares, (N, 2 K, groups), that it uses if
``use_norm_stats`` () is 1; and those of the tile itself."""

CacheStep: TypeAlias = Literal["caching", "cached"]
"""A step of DeepCache, arXiv:2312.00858: the whole U-Net, which also returns its deep features; or its outermost
blocks, which take them."""

CACHED_FEATURES = "cached_features"
"""What the U-Net's graph ``caching`` returns with its prediction, and its graph ``cached`` takes."""

IMAGE_KEYS, IMAGE_VALUES = "image_keys", "image_values"
"""What an IP-Adapter (arXiv:2308.06721) returns for an image, (N, T, W), and a controlled U-Net takes for A of them,
(N, A, T, W): keys and values of T tokens for all cross-attentions, W wide together; on the way down, then up, then in
the middle."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A variant of the U-Net's graph."""

    cache: CacheStep | None = None
    """None neither returns features nor takes them."""
    token_downsampling: bool = False
    """Whether the largest self-attention has its keys and values downsampled (ToDo, arXiv:2402.13573)."""
    controlled: bool = False
    """Whether it takes the residuals of ControlNets and T2I-Adapters, and the keys and values of IP-Adapters."""

    @property
    def name(self) -> str:
        """Its name in the manifest."""
        choices = {"downsampled": self.token_downsampling, "controlled": self.controlled}
        words = [*([] if self.cache is None else [self.cache]), *(word for word, chosen in choices.items() if chosen)]
        return "-".join(words) or PLAIN


UNET_VARIANTS: tuple[Variant, ...] = tuple(
    Variant(cache=cache, token_downsampling=downsampled, controlled=controlled)
    for downsampled, controlled in product((False, True), repeat=2)
    for cache in (None, "caching", "cached")
)
"""All of a U-Net's, in the order of running: ``cached`` takes what ``caching`` returns."""

VARIANT_NAMES: tuple[str, ...] = (*(variant.name for variant in UNET_VARIANTS), EMBEDDED, TILED)
"""Every component's, in the order of running."""
