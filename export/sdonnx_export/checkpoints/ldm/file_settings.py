"""Read what a single file says of its model besides the weights: prediction type, noise schedule, size, architecture.

It says so in marker tensors (ComfyUI, AUTOMATIC1111), in its metadata (Stability AI's ModelSpec, kohya's ``ss_`` keys),
in the original config next to it, or in its name.
"""

import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.packages.families import FAMILIES, Family
from sdonnx_runtime.sampling.scheduler_config import PREDICTION_TYPES

from sdonnx_export.checkpoint_model import Checkpoint
from sdonnx_export.checkpoints.few_steps import few_steps
from sdonnx_export.checkpoints.ldm.keys import Weights

logger = logging.getLogger(__name__)

_EPSILON, _V, _SAMPLE = PREDICTION_TYPES
_SPELLINGS = {
    "epsilon": _EPSILON, "eps": _EPSILON, "v": _V, "v_prediction": _V, "vprediction": _V, "v_pred": _V, "vpred": _V,
    "velocity": _V, "sample": _SAMPLE, "x0": _SAMPLE,
}  # fmt: skip
"""Prediction types as programs write them, with underscores."""

_PREDICTION = "prediction type"
_SPEC, _TRAINER = "the file's ModelSpec metadata", "the file's training metadata"


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """A single file's content."""

    path: Path
    weights: Weights
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    """A safetensors file's ``__metadata__``."""
    original: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The original config next to it, see `read_original_config`."""

    @property
    def name(self) -> str:
        """Its name, in lower case."""
        return self.path.name.lower()

    @property
    def architecture(self) -> str:
        """ModelSpec's identifier of its architecture, in lower case; empty if there is none."""
        return self.metadata.get("modelspec.architecture", "").strip().lower()

    @property
    def few_steps(self) -> Mapping[str, Any]:
        """Defaults of a model distilled to a few steps, as its name or its architecture tells."""
        return few_steps(self.path.stem) or few_steps(self.architecture.partition("/")[0])


@dataclass(frozen=True, kw_only=True)
class FileSettings:
    """What a single file says of its model."""

    prediction_type: str
    """One of PREDICTION_TYPES."""
    zero_snr: bool
    """Whether its noise schedule ends in pure noise (arXiv:2305.08891)."""
    size: int | None
    """Width and height of its images, in pixels; None if it doesn't say."""
    stated: Mapping[str, str]
    """Each of these that is not simply the family's, and where it is said."""


def read_settings(
    file: SingleFile, family: Family, channels: int, *, option: str | None = None, base: Checkpoint | None = None
) -> FileSettings:
    """Read a file's settings.

    Args:
        file: the file.
        family: the family of its weights.
        channels: input channels of its U-Net.
        option: the prediction type that the user gives.
        base: the base model, where it lends the text encoders.

    Raises:
        ExportError: the prediction type is one that can't be run.
    """
    prediction, place = _prediction_type(file, family, channels, option, base)
    stated = {_PREDICTION: f"{prediction}, {place}"}
    zero_snr = next(_zero_snr_places(file), None)
    if zero_snr is not None and prediction == _EPSILON:
        stated["noise schedule"] = f"{zero_snr} says zero terminal SNR; ignored, since epsilon can't be predicted there"
    elif zero_snr is not None:
        stated["noise schedule"] = f"zero terminal SNR, from {zero_snr}"
    size = _size(file)
    if size is not None:
        stated["size"] = f"{size}x{size}, from {_SPEC}"
    own = _architecture_family(file.architecture)
    if file.architecture and own is not family:
        stated["architecture"] = f"{family.title}, from the weights; {_SPEC} says {file.architecture}"
    is_zero_snr = zero_snr is not None and prediction != _EPSILON
    return FileSettings(prediction_type=prediction, zero_snr=is_zero_snr, size=size, stated=stated)


def _prediction_type(
    file: SingleFile, family: Family, channels: int, option: str | None, base: Checkpoint | None
) -> tuple[str, str]:
    """Return the prediction type, and where it is said."""
    statements = list(_statements(file, option))
    if statements:
        (place, value), *others = [(place, _normalize(value)) for place, value in statements]
        if value not in PREDICTION_TYPES:
            raise ExportError(
                f"{file.path} predicts '{value}', says {place}; supported: {', '.join(PREDICTION_TYPES)}; "
                "give another checkpoint, or the right type with --prediction-type"
            )
        found = f"from {place}" + "".join(f"; {other} says {each}" for other, each in others if each != value)
        if "; " in found:
            logger.warning("%s: the prediction type is %s, %s", file.path, value, found)
        return value, found
    guess = next(_guesses(file, channels, base), None)
    default = next(iter(family.sample_sizes))
    return guess or (default, f"the default of {family.title}")


def _normalize(value: str) -> str:
    value = re.sub(r"[- ]", "_", value.strip().lower())
    return _SPELLINGS.get(value, value)


def _statements(file: SingleFile, option: str | None) -> Iterator[tuple[str, str]]:
    """Yield where the prediction type is said in so many words, the most reliable place first, and what is said there.

    kohya's scripts write "epsilon" into what they merge, whatever it is made of; so a marker tensor comes first.
    """
    metadata = file.metadata
    values = {
        "the option --prediction-type": option,
        "the tensor 'v_pred'": _V if "v_pred" in file.weights else None,
        "the .yaml config next to it": file.original.get("prediction_type"),
        _SPEC: metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key"),
        "the architecture in the file's ModelSpec metadata": _of_architecture(file.architecture),
        _TRAINER: _of_trainer(metadata),
    }
    for place, value in values.items():
        if value is not None and str(value).strip():
            yield place, str(value)


def _of_architecture(architecture: str) -> str | None:
    """Return the prediction type that an architecture of Stable Diffusion 2 has in its identifier."""
    if architecture.startswith("stable-diffusion-v2-768-v"):
        return _V
    return _EPSILON if architecture.startswith("stable-diffusion-v2-512") else None


def _of_trainer(metadata: Mapping[str, str]) -> str | None:
    if metadata.get("ss_base_model_version") == "sd_v2_v":
        return _V
    return {"true": _V, "false": _EPSILON}.get(metadata.get("ss_v_parameterization", "").lower())


def _guesses(file: SingleFile, channels: int, base: Checkpoint | None) -> Iterator[tuple[str, str]]:
    """Yield what a file's name, training step and original config suggest, the best guess first.

    Of Stable Diffusion 2, models for 512 pixels predict epsilon: those with extra input channels, Turbo, and those that
    the training step or the name tells. Other families predict it by default.
    """
    for pattern, value in _NAMES.items():
        if re.search(pattern, file.name):
            yield value, "from the file's name"
    if base is not None:
        value = base.scheduler.get("prediction_type", _EPSILON)
        yield (
            value,
            base.stated.get(_PREDICTION, f"{value}, of the base model {base.source}").removeprefix(f"{value}, "),
        )
    if file.original:
        yield _EPSILON, "the default of the .yaml config next to it"
    step = file.weights.get("global_step")
    if step is not None and int(step.read().max()) == 875000:
        yield _EPSILON, "from the file's training step"
    if channels != 4:
        yield _EPSILON, "as in all models with extra input channels"
    if re.search(r"(?<!\d)512(?!\d)|turbo", file.name):
        yield _EPSILON, "from the file's name"


_NAMES = {
    r"v[-_ ]?pred": _V,
    r"lightning_1step(_unet)?_x0": _SAMPLE,
    r"epsilon|eps[-_ ]?pred": _EPSILON,
}
"""Pattern of the name of a file, and its prediction type."""


def _zero_snr_places(file: SingleFile) -> Iterator[str]:
    """Yield where a file says that its noise schedule has zero terminal SNR."""
    if "ztsnr" in file.weights:
        yield "the tensor 'ztsnr'"
    if file.metadata.get("ss_zero_terminal_snr", "").lower() == "true":
        yield _TRAINER
    schedule = file.weights.get("alphas_cumprod")
    if schedule is not None and math.prod(schedule.shape) and float(schedule.read().min()) < _NO_SIGNAL:
        yield "the tensor 'alphas_cumprod'"
    if re.search(r"zt?snr|terminal[-_ ]?snr", file.name):
        yield "the file's name"


_NO_SIGNAL = 1e-6
"""Cumulative alpha below which a timestep is pure noise; the usual schedule ends at 5e-3."""


def _size(file: SingleFile) -> int | None:
    """Return the side of a square of the pixels of ModelSpec's resolution, in steps of 64; None without a sound one."""
    match = re.fullmatch(r"\s*(\d{2,5})\s*[x,]\s*(\d{2,5})\s*", file.metadata.get("modelspec.resolution", "").lower())
    if match is None:
        return None
    size = round(math.sqrt(int(match[1]) * int(match[2])) / 64) * 64
    return size if 256 <= size <= 2048 else None


_ARCHITECTURES = {
    r"stable-diffusion-v1(?![.\d])": "sd1",
    r"stable-diffusion-v2(?!.*unclip)": "sd2",
    r"stable-diffusion-xl.*refiner": "sdxl-refiner",
    r"stable-diffusion-xl": "sdxl",
}
"""Pattern of ModelSpec's identifiers, and the family."""

_UNSUPPORTED = (
    r"unclip|stable-diffusion-(v?3|4x|x4|upscal)|sd-?3|stable-(video|cascade|audio)|w(ue|ü)rstchen|flux|chroma|pixart|sana\b|"
    r"hunyuan|lumina|anima\b|anima-|hidream|kandinsky|kolors|auraflow|playground|cosxl|qwen|z-image|krea|ernie|ideogram|"
    r"wan\b|wan[-_]?2|ltx|mochi|cogv|cosmos|deepfloyd|gpt-"
)
"""Pattern of the identifiers of other architectures that their trainers write."""


def _architecture_family(architecture: str) -> Family | None:
    key = next((key for pattern, key in _ARCHITECTURES.items() if re.match(pattern, architecture)), None)
    return None if key is None else FAMILIES[key]


def check_architecture(file: SingleFile, exportable: str) -> None:
    """Check that a file isn't of an architecture that can't be exported, by the file's ModelSpec metadata.

    Raises:
        ExportError: it is; the message ends with ``exportable``.
    """
    if re.search(_UNSUPPORTED, file.architecture):
        raise ExportError(
            f"{file.path} is of the architecture '{file.architecture}' (the file's ModelSpec metadata), which is not "
            f"supported; {exportable}; give one of those"
        )


def scaling_factor(file: SingleFile, family: Family | None) -> float | None:
    """Return the scaling factor of a file's VAE: its original config's, else its family's; None if both are unknown."""
    family = family or _architecture_family(file.architecture)
    return file.original.get("scale_factor", None if family is None else family.scaling_factor)


_MAX_CONFIG = 100_000
"""Characters of an original config; the published ones have 5,000."""


def read_original_config(path: Path) -> Mapping[str, Any]:
    """Read the parameters of ``model.yaml`` for ``model.safetensors``, flattened; empty without that file.

    Raises:
        ExportError: it is not an original config.
    """
    config = path.with_suffix(".yaml")
    if not config.is_file():
        return {}
    try:
        text = config.read_text(encoding="utf-8")
        if len(text) > _MAX_CONFIG or any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it is not one that training wrote")  # aliases can double its values with each line
        model = yaml.safe_load(text)["model"]["params"]
        unet = model["unet_config" if "unet_config" in model else "network_config"]["params"]
        vae = model["first_stage_config"]["params"]
        return {
            **vae.get("ddconfig", {}),
            **unet,
            "prediction_type": _original_prediction_type(model),
            **{k: v for k, v in model.items() if not isinstance(v, dict)},
        }
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError, RecursionError):
        raise ExportError(f"{config} is not an original Stable Diffusion config; fix or remove it") from None


def _original_prediction_type(model: Mapping[str, Any]) -> str | None:
    """Return what an original config says: SDXL's by how its "denoiser" scales; None if it says nothing."""
    target = str(model.get("denoiser_config", {}).get("params", {}).get("scaling_config", {}).get("target", ""))
    scaling = target.rpartition(".")[2].removesuffix("Scaling").lower()
    return scaling or model.get("parameterization")
