"""Read an upscaler's file, of any of its key spellings, into BasicSR's keys, and infer its config from the shapes."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdonnx_runtime.errors import ExportError

from sdonnx_export.checkpoint_model import Part, Weight
from sdonnx_export.checkpoints.ldm.keys import Weights, apply_renames, count, with_prefix
from sdonnx_export.models.components import UPSCALERS, parameter_names

_WRAPPERS = ("params_ema.", "params.", "module.")
"""Prefixes of a network's keys; of a file with several, those of the first count."""

_RRDB, _COMPACT = re.compile(r".*\brdb\d\.conv\d", re.IGNORECASE), re.compile(r"body\.\d+\.(weight|bias)")

_RENAMES = (
    (r"^RRDB_trunk\.", "body."),
    (r"\.RDB(\d)\.conv(\d)(\.0)?\.", r".rdb\1.conv\2."),
    (r"^trunk_conv\.", "conv_body."),
    (r"^upconv(\d)\.", r"conv_up\1."),
    (r"^HRconv\.", "conv_hr."),
)
"""Patterns of the keys of ESRGAN's and BSRGAN's code, and BasicSR's."""


def read_upscaler(path: Path, weights: Weights) -> Part | None:
    """Return an upscaler; None if the file is something else.

    Raises:
        ExportError: weights are missing, unknown or of unsupported shapes.
    """
    prefix = next((each for each in _WRAPPERS if any(name.startswith(each) for name in weights)), "")
    own = with_prefix(weights, prefix) if prefix else weights
    if any(_RRDB.match(name) for name in own):
        kind, rename, infer = "an RRDBNet", _rename, _rrdb_config
    elif own and all(_COMPACT.fullmatch(name) for name in own):
        kind, rename, infer = "an SRVGGNetCompact", dict, _compact_config
    else:
        return None
    try:
        _check(named := rename(own), config := infer({name: each.shape for name, each in named.items()}))
    except KeyError as missing:
        raise ExportError(f"{path} looks like {kind}, but lacks the weight {missing}; download it again") from None
    except (ArithmeticError, ExportError, IndexError, ValueError) as error:
        raise ExportError(f"{path} looks like {kind}, but can't be read: {error}") from None
    return Part(config=config, weights=named)


def _rename(weights: Weights) -> dict[str, Weight]:
    """Rename the keys of ESRGAN, where layers are numbered, and those of BSRGAN to BasicSR's."""
    if any(".conv1x1." in name for name in weights):
        raise ExportError("it is of ESRGAN+; supported: ESRGAN, BSRGAN, Real-ESRGAN")
    if "model.0.weight" not in weights:
        return {apply_renames(name, _RENAMES): weight for name, weight in weights.items()}
    blocks, last = count(weights, r"model\.1\.sub\.(\d+)\.") - 1, count(weights, r"model\.(\d+)\.") - 1
    if last > _MAX_LAYERS:
        raise ExportError(f"it has a layer 'model.{last}'; supported: {_MAX_LAYERS} at most")
    numbers = {"0": "conv_first", f"1.sub.{blocks}": "conv_body", f"{last - 2}": "conv_hr", f"{last}": "conv_last"}
    numbers |= {str(index): f"conv_up{index // 3}" for index in range(3, last - 2, 3)}
    names = {f"model.{number}.{kind}": f"{name}.{kind}" for number, name in numbers.items() for kind in _KINDS}
    rest = ((r"^model\.1\.sub\.", "body."), *_RENAMES)
    return {names.get(name) or apply_renames(name, rest): weight for name, weight in weights.items()}


_KINDS = ("weight", "bias")
_MAX_LAYERS = 13
"""The highest number of a layer of ESRGAN's code: that of scale 8."""

Shapes = Mapping[str, tuple[int, ...]]


def _rrdb_config(shapes: Shapes) -> dict[str, Any]:
    inputs, outputs = shapes["conv_first.weight"][1], shapes["conv_last.weight"][0]
    multiple = {outputs * side**2: side for side in (1, 2, 4)}.get(inputs, 1)
    growth, width = shapes["body.0.rdb1.conv1.weight"][:2]
    scale = 2 ** sum(f"conv_up{index}.weight" in shapes for index in range(1, 4)) // multiple
    _check_channels(inputs // multiple**2, outputs)
    if scale < 1:
        raise ExportError(f"it takes squares of {multiple} pixels and returns a smaller image; supported: scale 1 to 8")
    return _with_receptive_field({
        "_class_name": "RRDBNet",
        "num_feat": width,
        "num_block": count(shapes, r"body\.(\d+)\."),
        "num_grow_ch": growth,
        "scale": scale,
        "multiple": multiple,
    })  # fmt: skip


def _compact_config(shapes: Shapes) -> dict[str, Any]:
    last = count(shapes, r"body\.(\d+)\.") - 1
    width, inputs = shapes["body.0.weight"][:2]
    scale = round((shapes[f"body.{last}.weight"][0] / inputs) ** 0.5)
    _check_channels(inputs, shapes[f"body.{last}.weight"][0] // scale**2)
    return _with_receptive_field({
        "_class_name": "SRVGGNetCompact",
        "num_feat": width,
        "num_conv": (last - 2) // 2,
        "act_type": "prelu",
        "scale": scale,
    })  # fmt: skip


def _check_channels(inputs: int, outputs: int) -> None:
    if (inputs, outputs) != (3, 3):
        raise ExportError(f"it has {inputs} channels in and {outputs} out; supported: 3, of RGB")


def _with_receptive_field(config: dict[str, Any]) -> dict[str, Any]:
    parser, _ = UPSCALERS[config["_class_name"]]
    return {"multiple": 1, **config, "receptive_field": parser.from_dict(config).receptive_field}


def _check(weights: Weights, config: Mapping[str, Any]) -> None:
    """Raise KeyError for the first weight that is missing, ExportError for one that is unknown."""
    expected = parameter_names("upscaler", config)
    for name in expected:
        weights[name]
    unknown = sorted(weights.keys() - expected)
    if unknown:
        raise ExportError(f"{len(unknown)} of its weights are unknown ({', '.join(unknown[:3])})")
