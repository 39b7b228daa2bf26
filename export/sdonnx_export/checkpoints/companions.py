"""The VAE, base model and prediction type given in addition to a source, which fill in what it lacks."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sdonnx_runtime.errors import ExportError

from sdonnx_export.checkpoint_model import Checkpoint, Part

MISSING = Part(config={}, weights={})
"""A component that a source lacks. Its config may have what is known of it nevertheless."""

BASE_MODEL = "base model"
"""What a ControlNet's `stated` has, if it is stored relative to one."""

_NO_PARTS: Mapping[str, Part] = {}


@dataclass(frozen=True, kw_only=True)
class Companions:
    """What is given in addition to a source."""

    vae: Part | None = None
    """Replaces the source's VAE."""
    base: Checkpoint | None = None
    """Lends the components that the source lacks, and the U-Net that a ControlNet is stored relative to."""
    prediction_type: str | None = None
    """One of PREDICTION_TYPES, whatever the source says."""


ALONE = Companions()
"""The source alone."""


def complete(checkpoint: Checkpoint, companions: Companions, name: str) -> Checkpoint:
    """Return a checkpoint with the companions' components; ``name`` is that of its source in errors.

    Raises:
        ExportError: it lacks a component nevertheless, or it generates no images and takes no companions.
    """
    if "unet" not in checkpoint.parts:
        _refuse(checkpoint, companions, name)
        return checkpoint
    base = companions.base
    lent, tokenizers = (_NO_PARTS, {}) if base is None else (base.parts, base.tokenizers)
    if base is not None and not all(own.weights for own in checkpoint.parts.values()):
        check_base(checkpoint.parts["unet"], base)
    parts = {
        part: own if own.weights or part == "unet" else lent.get(part, own) for part, own in checkpoint.parts.items()
    }
    if companions.vae is not None:
        parts["vae"] = _with_scaling_factor(companions.vae, checkpoint.parts["vae"])
    missing = [part for part, found in parts.items() if not found.weights]
    if missing:
        raise _missing_error(missing, list(parts), name)
    tokenizers = {**tokenizers, **checkpoint.tokenizers}
    needed = [part.replace("text_encoder", "tokenizer") for part in parts if part.startswith("text_encoder")]
    completed = replace(checkpoint, parts=parts, tokenizers={each: tokenizers[each] for each in needed})
    return _with_prediction_type(completed, companions.prediction_type)


def missing_vae(scaling_factor: float | None) -> Part:
    """Return the place of a VAE that a source lacks; its U-Net was trained with this scaling factor."""
    return replace(MISSING, config={"_class_name": "AutoencoderKL", "scaling_factor": scaling_factor})


def check_base(unet: Part, base: Checkpoint) -> None:
    """Check that a U-Net reads text as wide as that of a base model.

    Raises:
        ExportError: it doesn't.
    """
    found, expected = _text_widths(unet), _text_widths(base.parts["unet"])
    if unet.weights and found != expected:
        raise ExportError(
            f"the U-Net reads text of {found}, that of the base model {base.source} text of {expected}; "
            "give a base model of the same family"
        )


def _text_widths(unet: Part) -> str:
    """Describe the text that a U-Net reads: the width of its tokens, and of SDXL's pooled text with time ids."""
    tokens, pooled = unet.config.get("cross_attention_dim"), unet.weights.get("add_embedding.linear_1.weight")
    return f"{tokens} channels" if pooled is None else f"{tokens} channels and {pooled.shape[1]} for the whole"


def _refuse(checkpoint: Checkpoint, companions: Companions, name: str) -> None:
    kinds = {"vae": "a VAE", "upscaler": "an upscaler"}
    what = next((kind for part, kind in kinds.items() if part in checkpoint.parts), "a ControlNet or a T2I-Adapter")
    given = {
        "--vae": companions.vae is not None,
        "--base": companions.base is not None and BASE_MODEL not in checkpoint.stated,
        "--prediction-type": companions.prediction_type is not None,
    }
    for option, is_given in given.items():
        if is_given:
            raise ExportError(f"{name} is {what}, which takes no {option}; leave it out")


def _missing_error(missing: list[str], parts: list[str], name: str) -> ExportError:
    texts = [part for part in parts if part.startswith("text_encoder")]
    lacking = [part for part in missing if part in texts]
    listed = [what for part, what in {"unet": "a U-Net", "vae": "a VAE"}.items() if part in missing]
    if lacking:
        listed.append("a text encoder" if len(lacking) == len(texts) else "one text encoder")
    if "unet" in missing:
        remedy = "download it again"
    elif missing == ["vae"]:
        remedy = "give one with --vae SRC, or a whole checkpoint of its family with --base SRC"
    else:
        remedy = "give a whole checkpoint of its family with --base SRC, which lends what is missing"
    return ExportError(f"{name} lacks {' and '.join(listed)}; {remedy}")


def _with_scaling_factor(vae: Part, own: Part) -> Part:
    """Give a VAE that has no scaling factor that of the checkpoint's own, which the U-Net was trained with."""
    factor = own.config.get("scaling_factor")
    if factor is None or own.config.get("_class_name") != vae.config.get("_class_name"):
        return vae
    return replace(vae, config={"scaling_factor": factor, **vae.config})


def _with_prediction_type(checkpoint: Checkpoint, prediction_type: str | None) -> Checkpoint:
    """Return a checkpoint whose scheduler has the prediction type that the user gives, if any."""
    if prediction_type is None:
        return checkpoint
    stated = {"prediction type": f"{prediction_type}, from the option --prediction-type", **checkpoint.stated}
    scheduler = {**checkpoint.scheduler, "prediction_type": prediction_type}
    return replace(checkpoint, scheduler=scheduler, stated=stated)
