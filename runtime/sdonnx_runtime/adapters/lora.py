"""LoRA (arXiv:2106.09685) and LyCORIS files: which to apply at which strength, and the change of each parameter."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from sdonnx_runtime.adapters.lora_kinds import Kind, Tensors, normalize
from sdonnx_runtime.adapters.peft_config import PeftConfig
from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.files.tensor_file import TensorFile


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA or LyCORIS file with its scale."""

    path: Path
    """A file of LoRA, LyCORIS or DoRA, by kohya, diffusers, peft, LyCORIS or OneTrainer; of safetensors or of torch."""
    scale: float = 1.0
    """-100 to 100; 0 has no effect."""
    text_encoder_scale: float | None = None
    """The scale for the text encoders; None is ``scale``."""

    def __post_init__(self) -> None:
        for scale in (self.scale, self.scale_of("text_encoder")):
            if not math.isfinite(scale) or abs(scale) > 100:
                raise RequestError(f"the LoRA {self.path} has the scale {scale}; give a number from -100 to 100")

    @classmethod
    def of(cls, lora: "AnyLora") -> "Lora":
        """Make a `Lora` of a path, or of a path and a scale."""
        if isinstance(lora, Lora):
            return lora
        path, scale = lora if isinstance(lora, tuple) else (lora, 1.0)
        return cls(path=Path(path), scale=scale)

    def scale_of(self, component: str) -> float:
        """The scale for a component."""
        return self.scale if component == "unet" or self.text_encoder_scale is None else self.text_encoder_scale

    @property
    def tag(self) -> str:
        """What names it in a prompt of AUTOMATIC1111, whose first number is the text encoders' scale."""
        scales = [self.scale_of("text_encoder"), self.scale]
        return ":".join(["<lora", self.path.stem, *(f"{scale:g}" for scale in dict.fromkeys(scales))]) + ">"


AnyLora: TypeAlias = Lora | tuple[Path | str, float] | Path | str
"""What `Lora.of` takes."""


_SUFFIXES = (".safetensors", ".pt", ".ckpt")
"""Of the files that a prompt can name, as AUTOMATIC1111's."""


def find_lora(folder: Path | None, name: str, scale: float, text_encoder_scale: float | None = None) -> Lora:
    """Find the file of a prompt's ``<lora:name:0.8>`` in a folder or below it.

    Raises:
        RequestError: there is no folder, or no file of that name in it, or several.
    """
    if folder is None:
        raise RequestError(
            f"<lora:{name}:{scale:g}> requires a folder of LoRA files; give it with --lora-dir (lora_folder=)"
        )
    found = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES and path.stem == name)
    if not found:
        raise RequestError(f"{folder} has no {name}.safetensors, which the prompt names; use the name of a file there")
    if len(found) > 1:
        raise RequestError(f"'{name}' is ambiguous in {folder} ({len(found)} files); rename one of them")
    return Lora(path=found[0], scale=scale, text_encoder_scale=text_encoder_scale)


@dataclass(frozen=True, kw_only=True)
class ParameterDelta:
    """The change of a layer's weight or bias by one file."""

    file: TensorFile
    layer: str
    """Its name in the file."""
    keys: Mapping[str, str]
    """The tensors' names in the file, by the values of PARAMETERS."""
    kind: Kind
    component: str
    module: str
    """The model's, such as ``mid_block.attentions.0.proj_in``."""
    config: PeftConfig
    is_bias: bool = False

    @property
    def parameter(self) -> str:
        """The name of the weight or bias that it changes."""
        return f"{self.module}.{'bias' if self.is_bias else 'weight'}"

    def apply(self, values: Array, scale: float) -> Array:
        """Add the delta to a weight (out, n), n being the product of its other sizes, or to a bias (out,).

        Raises:
            RequestError: the layer has another size, or the tensors are damaged.
        """
        try:
            with np.errstate(all="ignore"):  # what isn't finite is refused where all deltas are added
                difference = (self._bias_difference if self.is_bias else self._weight_difference)(values, scale)
        except (ValueError, TypeError, LookupError, ArithmeticError, MemoryError) as error:
            of_layer = f"{values.size} {'biases' if self.is_bias else 'weights'} of {len(values)} outputs"
            raise RequestError(
                f"{self.file.path}: the tensors of '{self.layer}' don't fit the model's {of_layer} ({error}); "
                "use one that was trained for this kind of model"
            ) from None
        difference += values
        return difference

    def _weight_difference(self, weight: Array, scale: float) -> Array:
        change = self.kind.change
        assert change is not None  # noqa: S101 — of a delta of a weight
        tensors = self._read({*self.keys} - {"up_bias", "bias_difference"})
        if self.kind.takes_scale:
            return _fit(change({**tensors, "scale": np.array(scale, np.float32)}, weight), weight)
        difference = _fit(change(tensors, weight), weight)
        difference *= np.float32(self._strength(tensors))
        difference = normalize(weight, difference, tensors)
        difference *= np.float32(scale)
        return difference

    def _bias_difference(self, bias: Array, scale: float) -> Array:
        tensors = self._read(self.keys.keys() & {"alpha", "scalar", "up_bias", "bias_difference", "ia3_l"})
        difference = np.zeros_like(bias)
        if "bias_difference" in tensors:
            difference += _fit(tensors["bias_difference"], bias)
        if "up_bias" in tensors:
            difference += _fit(tensors["up_bias"], bias) * np.float32(self._strength(tensors))
        if self.kind.change_bias is not None:
            difference += _fit(self.kind.change_bias(tensors, bias), bias)
        difference *= np.float32(scale)
        return difference

    def _read(self, names: set[str]) -> Tensors:
        tensors = {name: self.file.read(self.keys[name]) for name in names}
        if any(each.dtype.kind != "f" for name, each in tensors.items() if name not in _INTEGERS):
            raise ValueError("are integers")
        return tensors

    def _strength(self, tensors: Tensors) -> float:
        """Alpha by rank, or 1 without one of them, and LyCORIS' trained scalar."""
        rank = None if self.kind.rank is None else self.file.shapes[self.keys[self.kind.rank]][0]
        scalar = float(tensors["scalar"].reshape(-1)[0]) if "scalar" in tensors else 1.0
        if "alpha" not in tensors:
            return scalar * self.config.strength(self.component, self.module, rank)
        alphas = np.unique(tensors["alpha"])
        if len(alphas) != 1:
            raise ValueError("have several alphas")
        return scalar * (1.0 if rank is None else float(alphas[0]) / rank)


_INTEGERS = {"alpha", "on_input", "sparse_indices", "sparse_size"}
"""Tensors that may be integers."""


def _fit(difference: Array, values: Array) -> Array:
    """Reshape a difference like the values that it is for."""
    if difference.size != values.size or (difference.ndim > 1 and len(difference) != len(values)):
        outputs = len(difference) if difference.ndim else 1
        raise ValueError(f"are for {difference.size} of {outputs} outputs")
    return difference.reshape(values.shape)
