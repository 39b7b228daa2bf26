"""Text encoders given in addition to a source, and which of its model's encoders each of them is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sdonnx_runtime.errors import ExportError

from sdonnx_export.checkpoint_model import Checkpoint, Part
from sdonnx_export.checkpoints.files import canonical_key, is_used_key
from sdonnx_export.checkpoints.ldm.keys import CLIP_WIDTH, Weights, with_prefix
from sdonnx_export.checkpoints.ldm.layouts import LAYOUTS
from sdonnx_export.checkpoints.ldm.pipeline_config import find_tokenizer
from sdonnx_export.checkpoints.ldm.text_encoder import read_clip, read_open_clip

FIRST, SECOND = "text_encoder", "text_encoder_2"
_EMBEDDINGS = ("text_model.embeddings.token_embedding.weight", "token_embedding.weight")
_PROJECTION = "text_projection.weight"


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text encoder whose weights are read for the place that it gets."""

    source: str
    """What the user gave."""
    place: Path
    """A file in its directory, beside which its tokenizer may lie."""
    weights: Weights
    """With transformers' keys or OpenCLIP's."""
    config: Mapping[str, Any] | None = None
    """transformers'; None if only the weights tell it."""
    tokenizer: Path | str | None = None
    """As in `Checkpoint`; None if its own directory has it, or it is CLIP's."""

    @cached_property
    def width(self) -> int:
        """Channels of a token."""
        return next(self.weights[name] for name in _EMBEDDINGS if name in self.weights).shape[1]

    @property
    def is_open_clip(self) -> bool:
        """Whether it is OpenCLIP's, of Stable Diffusion 2 and XL; else OpenAI's CLIP."""
        if self.config is not None:
            return self.config.get("hidden_act") == "gelu"
        return "positional_embedding" in self.weights or self.width > CLIP_WIDTH

    @property
    def is_projected(self) -> bool:
        """Whether it has a projection of the whole text."""
        return _PROJECTION in self.weights or "text_projection" in self.weights

    def read(self, part: str) -> Part:
        """Return the component.

        Raises:
            ExportError: it lacks weights that this one has.
        """
        if part == SECOND and not self.is_projected:
            raise ExportError(
                f"{self.source} has no projection ('{_PROJECTION}'), which the second text encoder of SDXL "
                "has; give a file with it"
            )
        try:
            if self.config is not None:
                used = {name: weight for name, weight in self.weights.items() if is_used_key(name, part)}
                width = {"projection_dim": self.weights[_PROJECTION].shape[0]} if part == SECOND else {}
                return Part(config={**width, **self.config}, weights=used)
            if part == SECOND or self.is_open_clip:
                return read_open_clip(self.weights, projected=part == SECOND)
            return read_clip(self.weights)
        except KeyError as missing:
            raise ExportError(f"{self.source} lacks the weight {missing}; download it again") from None
        except (ArithmeticError, IndexError, ValueError) as error:
            raise ExportError(f"{self.source} has weights of other shapes than any known CLIP ({error})") from None

    def find_tokenizer(self, part: Part) -> Path | str:
        """Return the tokenizer of the component, as `Checkpoint` has it."""
        return find_tokenizer(self.place, part.config) if self.tokenizer is None else self.tokenizer


def text_encoders_of_file(source: str, weights: Weights) -> list[TextEncoder]:
    """Return the text encoders of a whole file, or that of a file of its own.

    Raises:
        ExportError: there is none.
    """
    prefixes = dict.fromkeys(prefix for layout in LAYOUTS for prefix in layout.text_encoders.values())
    parts = [part for part in (with_prefix(weights, prefix) for prefix in prefixes) if part] or [weights]
    named = [{canonical_key(name): weight for name, weight in part.items()} for part in parts]
    return [text_encoder(source, Path(source), part) for part in named]


def text_encoders_of_checkpoint(source: str, checkpoint: Checkpoint) -> list[TextEncoder]:
    """Return the text encoders of a checkpoint.

    Raises:
        ExportError: there is none.
    """
    found = {name: part for name, part in checkpoint.parts.items() if name in (FIRST, SECOND) and part.weights}
    if not found:
        raise ExportError(f"{source} has no text encoder; give a checkpoint, a package or a file with one")
    tokenizers = {name: checkpoint.tokenizers.get(name.replace("text_encoder", "tokenizer")) for name in found}
    return [
        text_encoder(source, Path(source), part.weights, part.config, tokenizers[name]) for name, part in found.items()
    ]


def text_encoder(
    source: str,
    place: Path,
    weights: Weights,
    config: Mapping[str, Any] | None = None,
    tokenizer: Path | str | None = None,
) -> TextEncoder:
    """Return a text encoder.

    Raises:
        ExportError: the weights are of something else.
    """
    embedding = next((weights[name] for name in _EMBEDDINGS if name in weights), None)
    if embedding is None or len(embedding.shape) != 2:
        raise ExportError(f"{source} has no text encoder of CLIP; expected a file with '{_EMBEDDINGS[0]}'")
    return TextEncoder(source=source, place=place, weights=weights, config=config, tokenizer=tokenizer)


def assign(encoders: Sequence[TextEncoder], unet: Weights) -> dict[str, TextEncoder]:
    """Return the text encoders by the names of their parts in the model of a U-Net, whose keys are LDM's or diffusers'.

    A U-Net of SDXL reads both, so that the wider one is the second, or the one with a projection if they are equal.
    The refiner reads the second alone.

    Raises:
        ExportError: two are the same part.
    """
    found: dict[str, TextEncoder] = {}
    for encoder in encoders:
        name = _part(encoder, text_width(unet)) if reads_pooled_text(unet) else FIRST
        if name in found:
            both = (
                f"{found[name].source} ({found[name].width} channels) and {encoder.source} ({encoder.width} channels)"
            )
            raise ExportError(f"{both} are the same text encoder of this U-Net; give one of each")
        found[name] = encoder
    return found


def _part(encoder: TextEncoder, width: int) -> str:
    is_second = 2 * encoder.width > width or (2 * encoder.width == width and encoder.is_projected)
    return SECOND if is_second else FIRST


def text_width(unet: Weights) -> int:
    """Return the channels of the text that a U-Net reads; 0 if it reads none."""
    keys = (weight.shape for name, weight in unet.items() if name.endswith("attn2.to_k.weight"))
    return next((shape[1] for shape in keys if len(shape) == 2), 0)


def reads_pooled_text(unet: Weights) -> bool:
    """Whether a U-Net is one of SDXL, which reads a projection of the whole text."""
    return any(name.startswith(("label_emb.", "add_embedding.")) for name in unet)
