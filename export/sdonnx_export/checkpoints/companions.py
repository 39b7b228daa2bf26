"""What is given in addition to a source: VAE, text encoders, base model, prediction type."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sdonnx_runtime.errors import ExportError

from sdonnx_export.checkpoint_model import Checkpoint, Part
from sdonnx_export.checkpoints.text_encoders import TextEncoder, assign, reads_pooled_text, text_width

MISSING = Part(config={}, weights={})
"""A component that a source lacks. Its config may have what is known of it nevertheless."""

BASE_MODEL = "base model"
"""What a ControlNet's `stated` has, if it is stored relative to one."""


@dataclass(frozen=True, kw_only=True)
class Companions:
    """What is given in addition to a source."""

    vae: Part | None = None
    """Replaces the source's VAE."""
    text_encoders: Sequence[TextEncoder] = ()
    """Replace the source's; each is the one that the U-Net has of its width."""
    base: Checkpoint | None = None
    """Lends the components that the source lacks, and the U-Net that a ControlNet is stored relative to."""
    prediction_type: str | None = None
    """One of PREDICTION_TYPES, whatever the source says."""
    image_encoder: str | None = None
    """The directory or Hub id of the image encoder of an IP-Adapter."""


ALONE = Companions()
"""The source alone."""


def complete(checkpoint: Checkpoint, companions: Companions, name: str) -> Checkpoint:
    """Return a checkpoint with the companions' components; ``name`` is that of its source in errors.

    Raises:
        ExportError: it lacks a component nevertheless, or it generates no images and takes no companions.
    """
    _refuse(checkpoint, companions, name)
    if "unet" not in checkpoint.parts:
        return checkpoint
    checkpoint = lend(checkpoint, companions.base)
    parts, tokenizers = dict(checkpoint.parts), dict(checkpoint.tokenizers)
    given = assign(companions.text_encoders, parts["unet"].weights) if parts["unet"].weights else {}
    for part, encoder in given.items():
        parts[part] = encoder.read(part)
        tokenizers[part.replace("text_encoder", "tokenizer")] = encoder.find_tokenizer(parts[part])
    if companions.vae is not None:
        parts["vae"] = _with_scaling_factor(companions.vae, checkpoint.parts["vae"])
    missing = [part for part, found in parts.items() if not found.weights]
    if missing:
        raise _missing_error(missing, list(parts), name)
    if given:
        _check_text_encoders(parts)
    needed = [part.replace("text_encoder", "tokenizer") for part in parts if part.startswith("text_encoder")]
    completed = replace(checkpoint, parts=parts, tokenizers={each: tokenizers[each] for each in needed})
    return _with_prediction_type(completed, companions.prediction_type)


def lend(checkpoint: Checkpoint, base: Checkpoint | None) -> Checkpoint:
    """Return a checkpoint with the components and tokenizers of a base model that it lacks.

    Raises:
        ExportError: the base model is of another family.
    """
    if base is None:
        return checkpoint
    if not all(own.weights for own in checkpoint.parts.values()):
        check_base(checkpoint.parts["unet"], base)
    parts = {
        part: own if own.weights or part == "unet" else base.parts.get(part, own)
        for part, own in checkpoint.parts.items()
    }
    return replace(checkpoint, parts=parts, tokenizers={**base.tokenizers, **checkpoint.tokenizers})


def _check_text_encoders(parts: Mapping[str, Part]) -> None:
    """Check that the text encoders are together as wide as the text that the U-Net reads.

    Raises:
        ExportError: they aren't.
    """
    unet = parts["unet"]
    texts = [part.config for name, part in parts.items() if name.startswith("text_encoder")]
    widths, expected = [_number(config, "hidden_size") for config in texts], text_width(unet.weights)
    if sum(widths) != expected:
        what = "text encoder has" if len(widths) == 1 else "text encoders have"
        raise ExportError(
            f"the {what} {' + '.join(map(str, widths))} channels, the U-Net reads text of {expected}; "
            "give the text encoder of its family with --text-encoder"
        )
    if reads_pooled_text(unet.weights):
        projected, width = _number(texts[-1], "projection_dim"), _number(unet.config, "addition_time_embed_dim")
        ids = _number(unet.config, "projection_class_embeddings_input_dim") - projected
        if width < 1 or ids < 1 or ids % width:
            raise ExportError(
                f"the second text encoder has a projection to {projected} channels, which isn't that of the U-Net; "
                "give the text encoder of its family with --text-encoder"
            )


def _number(config: Mapping[str, Any], key: str) -> int:
    """Return a whole number of a config; 0 for anything else, which the model refuses later."""
    value = config.get(key)
    return value if isinstance(value, int) else 0


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
    what = next(title for part, title in _TITLES.items() if part in checkpoint.parts)
    alone = "unet" not in checkpoint.parts
    given = {
        "--vae": alone and companions.vae is not None,
        "--text-encoder": alone and bool(companions.text_encoders),
        "--base": alone and companions.base is not None and BASE_MODEL not in checkpoint.stated,
        "--prediction-type": alone and companions.prediction_type is not None,
        "--image-encoder": "ip_adapter" not in checkpoint.parts and companions.image_encoder is not None,
    }
    for option, is_given in given.items():
        if is_given:
            raise ExportError(f"{name} is {what}, which takes no {option}; leave it out")


_TITLES = {
    "unet": "a whole checkpoint",
    "vae": "a VAE",
    "ip_adapter": "an IP-Adapter",
    "upscaler": "an upscaler",
    "controlnet": "a ControlNet or a T2I-Adapter",
    "adapter": "a ControlNet or a T2I-Adapter",
}
"""What a checkpoint with a part is; the first match counts."""


def _missing_error(missing: list[str], parts: list[str], name: str) -> ExportError:
    texts = [part for part in parts if part.startswith("text_encoder")]
    lacking = [part for part in missing if part in texts]
    listed = [what for part, what in {"unet": "a U-Net", "vae": "a VAE"}.items() if part in missing]
    if lacking:
        listed.append("a text encoder" if len(lacking) == len(texts) else "one text encoder")
    options = [
        f"{option} SRC"
        for option, is_missing in {"--vae": "vae" in missing, "--text-encoder": lacking}.items()
        if is_missing
    ]
    if "unet" in missing:
        remedy = "download it again, or give one with --unet SRC"
    else:
        remedy = f"give {' and '.join(options)}, or a whole checkpoint of its family with --base SRC"
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
