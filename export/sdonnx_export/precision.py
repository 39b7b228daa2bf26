"""Which precision a layer has: the one table that says what each of a package's precisions means."""

import re
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

Precision: TypeAlias = Literal["fp32", "fp16", "int8", "int8-weights", "int4"]
"""Of a layer: int8 computes in 8 bits; fp16, int8-weights and int4 store the weights so and compute in float32."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

PrecisionOf: TypeAlias = Callable[[str], Precision]
"""The precision of a layer by its weight's name."""

_EXCEPTIONS: dict[Precision, tuple[tuple[str, Precision], ...]] = {
    "fp32": (),
    "fp16": (),
    "int8": (
        (r"(^|\.)(conv_in|conv_out|quant_conv|post_quant_conv)\.", "fp32"),  # what comes in and goes out
        (r"time_emb|\.attn2\.to_[kv]\.|^text_model\.", "int8-weights"),  # few rows: the weights are the work
    ),
    "int8-weights": ((r"(^|\.)(conv_in|conv_out|quant_conv|post_quant_conv)\.", "fp32"),),
    "int4": (
        (r"(^|\.)(conv_in|conv_out|quant_conv|post_quant_conv)\.", "fp32"),
        (r"time_emb|^text_model\.|^decoder\.|^encoder\.|conv_shortcut", "int8-weights"),
    ),
}
"""First match; layers that none matches have the package's own."""


def precision_of(package: Precision) -> PrecisionOf:
    """What the layers of a package of a precision have."""
    exceptions: list[tuple[re.Pattern[str], Precision]] = [
        (re.compile(pattern), precision) for pattern, precision in _EXCEPTIONS[package]
    ]

    def find(name: str) -> Precision:
        found: list[Precision] = [precision for pattern, precision in exceptions if pattern.search(name)]
        return found[0] if found else package

    return find
