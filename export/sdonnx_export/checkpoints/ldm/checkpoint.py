"""Read the original single-file layout (CompVis and Stability AI), as on CivitAI, into components and configs.

Families, keys and configs follow from the file's keys and shapes. What those can't tell, such as the number of heads,
is as in the published models, unless the original config has it. A base model lends what the file lacks.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdonnx_runtime.errors import ExportError

from sdonnx_export.checkpoint_model import Checkpoint, Part
from sdonnx_export.checkpoints.companions import ALONE, MISSING, Companions, check_base, missing_vae
from sdonnx_export.checkpoints.ldm.file_settings import (
    SingleFile,
    check_architecture,
    read_settings,
    scaling_factor,
)
from sdonnx_export.checkpoints.ldm.keys import Weights, with_prefix
from sdonnx_export.checkpoints.ldm.layouts import (
    IGNORED,
    LAYOUTS,
    UNET,
    VAE,
    Layout,
    layout_of,
    layout_of_base,
    layout_of_file,
)
from sdonnx_export.checkpoints.ldm.pipeline_config import find_tokenizer, pipeline_class, sample_size, scheduler_config
from sdonnx_export.checkpoints.ldm.text_encoder import read_clip, read_open_clip
from sdonnx_export.checkpoints.ldm.unet import read_unet
from sdonnx_export.checkpoints.ldm.vae import read_vae
from sdonnx_export.checkpoints.text_encoders import FIRST, SECOND, assign, reads_pooled_text, text_width
from sdonnx_export.checkpoints.unsupported import EXPORTABLE, unsupported_files

_TEXT_ENCODERS = tuple(prefix for layout in LAYOUTS for prefix in layout.text_encoders.values())


def split_checkpoint(file: SingleFile, companions: Companions = ALONE) -> Checkpoint:
    """Split a Stable Diffusion model into its components; those that the file lacks are `MISSING`.

    Raises:
        ExportError: it is something else, or weights of it are missing or unknown.
    """
    check_architecture(file, EXPORTABLE)
    file = replace(file, weights=_with_unet_prefix(file.weights))
    layout = _find_layout(file, companions)
    if layout is None:
        return _unknown_family(file)
    try:
        parts = _split(layout, file, companions)
    except KeyError as missing:
        raise ExportError(f"{file.path} lacks the weight {missing}; download it again") from None
    except (ArithmeticError, IndexError, ValueError) as error:
        raise ExportError(f"{file.path} has weights of other shapes than any known model ({error})") from None
    return _assemble(layout, file, parts, companions)


def unet_checkpoint(name: str, unet: Part, companions: Companions) -> Checkpoint:
    """Return the checkpoint of a U-Net that is saved alone, as diffusers does; the base model lends the rest."""
    file = SingleFile(path=Path(name), weights=unet.weights)
    layout = _layout_of_companions(unet.weights, companions)
    if layout is None:
        return _incomplete(name, {"unet": unet, "vae": MISSING, "text_encoder": MISSING})
    vae = missing_vae(layout.family.scaling_factor)
    parts = {"unet": unet, "vae": vae, **dict.fromkeys(layout.text_encoders, MISSING)}
    return replace(_assemble(layout, file, parts, companions), source=name)


def _assemble(layout: Layout, file: SingleFile, parts: Mapping[str, Part], companions: Companions) -> Checkpoint:
    """Add to a file's components what follows from them and from what the file says of itself.

    Where the base model lends text encoders, its settings count before the family's.
    """
    unet, own_texts = parts["unet"].config, {each: parts[each] for each in layout.text_encoders if parts[each].weights}
    base = companions.base if len(own_texts) < len(layout.text_encoders) else None
    settings = read_settings(file, layout.family, unet["in_channels"], option=companions.prediction_type, base=base)
    size = sample_size(layout, file, settings, base)
    scheduler = scheduler_config(layout, file, settings, base, lcm=unet.get("time_cond_proj_dim") is not None)
    return Checkpoint(
        source=file.path.name,
        revision=None,
        parts={**parts, "unet": replace(parts["unet"], config={"sample_size": size, **unet})},
        scheduler=scheduler,
        tokenizers={
            name.replace("text_encoder", "tokenizer"): find_tokenizer(file.path, part.config)
            for name, part in own_texts.items()
        },
        settings={"_class_name": pipeline_class(layout, file, unet), **layout.settings},
        defaults=file.few_steps or ({} if base is None else _without_size(base.defaults)),
        stated={**(base.stated if base is not None and scheduler is base.scheduler else {}), **settings.stated},
    )


def _without_size(defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value for name, value in defaults.items() if name != "size"}


def _unknown_family(file: SingleFile) -> Checkpoint:
    """Return the checkpoint of a file that lacks a text encoder, which would tell its family."""
    prefixes = {"unet": (UNET,), "vae": (VAE,), "text_encoder_2": _TEXT_ENCODERS}
    found = {
        name: {key: weight for key, weight in file.weights.items() if key.startswith(prefix)}
        for name, prefix in prefixes.items()
    }
    parts = {name: replace(MISSING, weights=weights) for name, weights in found.items()}
    if not found["text_encoder_2"]:
        del parts["text_encoder_2"]
    return _incomplete(file.path.name, {**parts, "text_encoder": MISSING})


def _incomplete(source: str, parts: Mapping[str, Part]) -> Checkpoint:
    return Checkpoint(source=source, revision=None, parts=parts, scheduler={}, tokenizers={}, settings={})


def split_vae(file: SingleFile) -> Part:
    """Read a VAE from a file of its own or a whole checkpoint's, with LDM's keys or diffusers'.

    Its scaling factor is the original config's or the family's; a VAE alone that says neither has none.

    Raises:
        ExportError: the file has no VAE.
    """
    path = file.path
    weights = {name: weight for name, weight in file.weights.items() if not name.startswith(("loss.", *IGNORED))}
    vae = with_prefix(weights, VAE) or weights
    if "decoder.conv_in.weight" not in vae:
        raise ExportError(f"{path} has no VAE; expected a file with 'decoder.conv_in.weight'")
    layout = layout_of_file(weights)
    try:
        return read_vae(vae, scaling_factor(file, None if layout is None else layout.family))
    except KeyError as missing:
        raise ExportError(f"{path} lacks the weight {missing}; download it again") from None
    except (ArithmeticError, IndexError, ValueError) as error:
        raise ExportError(f"{path} has weights of other shapes than any known VAE ({error})") from None


_UNET_PREFIXES = (UNET, "diffusion_model.", "unet.", "")
"""Prefixes of a U-Net's keys; all but the first are those of a U-Net alone."""


def _with_unet_prefix(weights: Weights) -> Weights:
    """Give the keys of a U-Net alone, in the original or diffusers' spelling, the prefix of whole files."""
    first = ("input_blocks.0.0.weight", "time_embedding.linear_1.weight")
    prefix = next((each for each in _UNET_PREFIXES if any(each + name in weights for name in first)), UNET)
    others = (UNET, VAE, *_TEXT_ENCODERS, *IGNORED)
    return {
        name if name.startswith(others) or not name.startswith(prefix) else UNET + name.removeprefix(prefix): weight
        for name, weight in weights.items()
    }


def _find_layout(file: SingleFile, companions: Companions) -> Layout | None:
    """Return the layout of the file's text encoders or, if it lacks one, of the base model; None if there is none."""
    path, weights = file.path, file.weights
    message = unsupported_files(path, weights)
    if message is not None:
        raise ExportError(message)
    layout = layout_of_file(weights)
    text_encoders = _TEXT_ENCODERS if layout is None else tuple(layout.text_encoders.values())
    unknown = sorted(name for name in weights if not name.startswith((UNET, VAE, *text_encoders, *IGNORED)))
    if unknown:
        listed = ", ".join(unknown[:3])
        raise ExportError(f"{path} has {len(unknown)} unexpected keys ({listed}); {EXPORTABLE}")
    return layout or _layout_of_companions(with_prefix(weights, UNET), companions)


def _layout_of_companions(unet: Weights, companions: Companions) -> Layout | None:
    """Return the layout of the family with a U-Net and what is given in addition; None if that has no text encoder."""
    given = assign(companions.text_encoders, unet)
    if not given:
        return None if companions.base is None else layout_of_base(companions.base)
    if not reads_pooled_text(unet):
        return layout_of("sd2" if given[FIRST].is_open_clip else "sd1")
    return layout_of("sdxl-refiner" if SECOND in given and given[SECOND].width == text_width(unet) else "sdxl")


def _split(layout: Layout, file: SingleFile, companions: Companions) -> dict[str, Part]:
    family, original = layout.family, file.original
    used = {name: weight for name, weight in file.weights.items() if not name.startswith(IGNORED)}
    unet, vae, factor = with_prefix(used, UNET), with_prefix(used, VAE), scaling_factor(file, family)
    if not unet:
        raise ExportError(f"{file.path} lacks a U-Net; {EXPORTABLE}")
    parts = {
        "unet": read_unet(unet, original, heads=family.attention_heads, is_linear=layout.is_linear),
        "vae": read_vae(vae, factor) if vae and companions.vae is None else missing_vae(factor),
    }
    for name, prefix in layout.text_encoders.items():
        text_encoder = with_prefix(used, prefix)
        parts[name] = (
            _read_text_encoder(prefix, text_encoder, projected=family.time_ids > 0) if text_encoder else MISSING
        )
    parts["unet"] = _with_conditioning(layout, parts, companions)
    return parts


def _read_text_encoder(prefix: str, weights: Weights, *, projected: bool) -> Part:
    return read_open_clip(weights, projected=projected) if prefix.endswith(".model.") else read_clip(weights)


def _with_conditioning(layout: Layout, parts: Mapping[str, Part], companions: Companions) -> Part:
    """Return the U-Net, for SDXL with the config's keys for pooled text and time ids.

    The text encoders tell the width of the pooled text.
    """
    unet, family, base = parts["unet"], layout.family, companions.base
    given = assign(companions.text_encoders, unet.weights)
    if base is not None and not all(parts[name].weights or name in given for name in layout.text_encoders):
        check_base(unet, base)
    if family.time_ids:
        lent = parts[SECOND] if base is None or parts[SECOND].weights else base.parts[SECOND]
        second = given[SECOND].read(SECOND) if SECOND in given else lent
        if not second.weights:
            return unet
        return _with_sdxl_conditioning(unet, second.config["projection_dim"], family.time_ids)
    if reads_pooled_text(unet.weights):
        raise ExportError("unexpected key 'label_emb': not a U-Net of Stable Diffusion 1 or 2")
    return unet


def _with_sdxl_conditioning(unet: Part, pooled_width: int, time_ids: int) -> Part:
    """Add the keys for pooled text and time ids to the U-Net's config."""
    width = unet.weights["add_embedding.linear_1.weight"].shape[1]
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (width - pooled_width) // time_ids,
        "projection_class_embeddings_input_dim": width,
    }
    return replace(unet, config={**unet.config, **added})
