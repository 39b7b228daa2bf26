"""LoRA (arXiv:2106.09685) and LyCORIS files: their layers, and the weight deltas of these."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

from sdonnx_runtime.adapters.lora_keys import PARAMETERS, split_component, split_name
from sdonnx_runtime.adapters.tensor_files import TensorFile, open_safetensors
from sdonnx_runtime.arrays import Array
from sdonnx_runtime.errors import RequestError

Tensors: TypeAlias = Mapping[str, Array]
"""A layer's tensors by the values of PARAMETERS."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA or LyCORIS file with its scale."""

    path: Path
    """A ``.safetensors`` file of LoRA, LoCon, LoHa, LoKr or DoRA, by kohya, diffusers, peft or LyCORIS."""
    scale: float = 1.0
    """-100 to 100; 0 has no effect."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or abs(self.scale) > 100:
            raise RequestError(f"the LoRA {self.path} has the scale {self.scale}; give a number from -100 to 100")

    @classmethod
    def of(cls, lora: "AnyLora") -> "Lora":
        """Make a `Lora` of a path, or of a path and a scale."""
        if isinstance(lora, Lora):
            return lora
        path, scale = lora if isinstance(lora, tuple) else (lora, 1.0)
        return cls(path=Path(path), scale=scale)


AnyLora: TypeAlias = Lora | tuple[Path | str, float] | Path | str
"""What `Lora.of` takes."""


def find_lora(folder: Path | None, name: str, scale: float) -> Lora:
    """Find the file of a prompt's ``<lora:name:scale>`` in a folder or below it.

    Raises:
        RequestError: there is no folder, or no file of that name in it, or several.
    """
    if folder is None:
        raise RequestError(
            f"<lora:{name}:{scale:g}> requires a folder of LoRA files; give it with --lora-dir (lora_folder=)"
        )
    found = sorted(path for path in folder.rglob("*.safetensors") if path.stem == name)
    if not found:
        raise RequestError(f"{folder} has no {name}.safetensors, which the prompt names; use the name of a file there")
    if len(found) > 1:
        raise RequestError(f"'{name}' is ambiguous in {folder} ({len(found)} files); rename one of them")
    return Lora(path=found[0], scale=scale)


@dataclass(frozen=True, kw_only=True)
class LayerDelta:
    """The change of one layer's weight by one file."""

    layer: str
    """Its name in the file."""
    names: Mapping[str, str]
    """The tensors' names in the file, by the values of PARAMETERS."""
    file: TensorFile
    compute: Callable[[Tensors], Array]
    """Computes the delta of its kind from the tensors."""
    alpha: float | None
    """Alpha from the file's settings; None if they have none."""
    use_rslora: bool
    """Whether alpha is divided by the square root of the rank, arXiv:2312.03732."""

    def apply(self, weight: Array, scale: float) -> Array:
        """Add the delta to a weight (out, n), n being the product of its other sizes.

        Raises:
            RequestError: the layer has another size.
        """
        tensors = {name: self.file.read(key) for name, key in self.names.items()}
        try:
            difference = self.compute(tensors)
            if difference.size != weight.size or len(difference) != len(weight):
                raise ValueError(f"are for {difference.size} weights of {len(difference)} outputs")
            difference = difference.reshape(weight.shape)
            difference *= np.float32(self._strength(tensors))
            difference = _dora(weight, difference, tensors)
        except (ValueError, KeyError) as error:
            raise RequestError(
                f"{self.file.path}: the tensors of '{self.layer}' don't fit the model's {weight.size} weights of "
                f"{len(weight)} outputs ({error}); use one that was trained for this kind of model"
            ) from None
        difference *= np.float32(scale)
        difference += weight
        return difference

    def _strength(self, tensors: Tensors) -> float:
        """``alpha / rank``, or 1 without alpha or rank."""
        alpha = float(tensors["alpha"].reshape(-1)[0]) if "alpha" in tensors else self.alpha
        ranks = [len(tensors[name]) for name in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b") if name in tensors]
        if alpha is None or not ranks:
            return 1.0
        return alpha / (math.sqrt(ranks[0]) if self.use_rslora else ranks[0])


def _low_rank(tensors: Tensors) -> Array:
    """LoRA, and LoCon (arXiv:2309.14859) with or without a core: (out, in * k * k)."""
    down = tensors["down"]
    if "mid" in tensors:
        down = np.einsum("mnkl,ni->mikl", tensors["mid"], _flat(down))
    return _flat(tensors["up"]) @ _flat(down)


def _hadamard(tensors: Tensors) -> Array:
    """LoHa (arXiv:2108.06098): the element-wise product of two low-rank matrices."""
    first, second = (
        _low_rank_factor(tensors.get(f"hada_t{index}"), tensors[f"hada_w{index}_a"], tensors[f"hada_w{index}_b"])
        for index in (1, 2)
    )
    first *= second
    return _flat(first)


def _kronecker(tensors: Tensors) -> Array:
    """LoKr (arXiv:2212.10650): the Kronecker product of two weights, of low rank or not."""
    first, second = (
        tensors[name]
        if (name := f"lokr_w{index}") in tensors
        else _low_rank_factor(tensors.get(f"lokr_t{index}"), tensors[f"{name}_a"], tensors[f"{name}_b"])
        for index in (1, 2)
    )
    return _flat(np.kron(first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)), second))


def _low_rank_factor(core: Array | None, a: Array, b: Array) -> Array:
    """``a @ b``; or a conv weight from its Tucker core (r, r, k, k), ``a`` (r, out) and ``b`` (r, in)."""
    if core is None:
        return (a @ _flat(b)).reshape(len(a), *b.shape[1:])
    return np.einsum("ijkl,jr,ip->prkl", core, b, a)


def _dora(weight: Array, difference: Array, tensors: Tensors) -> Array:
    """DoRA (arXiv:2402.09353): the delta to the sum rescaled to the trained norms, per output or per input."""
    norms = tensors.get("output_norms", tensors.get("norms"))
    if norms is None:
        return difference
    difference = np.ascontiguousarray(difference)
    difference += weight
    by_output = "output_norms" in tensors or len(norms) == len(weight)
    blocks = difference.reshape(len(weight), 1 if by_output else norms.size, -1)
    squares = [np.square(block).sum(axis=1) for block in blocks]  # (outputs, inputs), one output at a time: large
    sums = np.sqrt(squares if by_output else np.sum(squares, axis=0, keepdims=True))
    blocks *= (norms.reshape(sums.shape) / sums)[:, :, None]
    difference -= weight
    return difference


def _flat(data: Array) -> Array:
    return data.reshape(len(data), -1)


_ANY = {"alpha", "norms", "output_norms"}
_HADA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_KINDS: tuple[tuple[Callable[[Tensors], Array], set[str], set[str]], ...] = (
    (_low_rank, {"down", "up"}, {"down", "up", "mid"}),
    (_hadamard, _HADA, {*_HADA, "hada_t1", "hada_t2"}),
    (_kronecker, set(), {name for name in PARAMETERS.values() if name.startswith("lokr_")}),
    (lambda tensors: _flat(tensors["difference"]), {"difference"}, {"difference"}),  # LyCORIS's full adapter
)
"""Each kind of adapter, the tensors that it requires, and those that it allows in addition to _ANY."""


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """The contents of a file."""

    deltas: Mapping[tuple[str, str], LayerDelta]
    """By component and module, as `known_names` spells them."""
    unexpected_keys: tuple[str, ...]
    """Tensors that belong to no kind of adapter."""


def read_lora(path: Path) -> LoraFile:
    """Read the layers of a ``.safetensors`` file of LoRA or LyCORIS.

    Raises:
        RequestError: the file can't be read, is damaged, or has no adapters.
    """
    file = open_safetensors(path)
    layers: dict[str, dict[str, str]] = defaultdict(dict)
    unexpected: list[str] = []
    for name in file.shapes:
        split = split_name(name)
        if split is None:
            unexpected.append(name)
        else:
            layers[split[0]][split[1]] = name
    settings = _settings(file)
    deltas: dict[tuple[str, str], LayerDelta] = {}
    for layer, names in layers.items():
        component, module = split_component(layer)
        alpha, use_rslora = _alpha_from_config(settings, component, layer)
        compute = next((kind for kind, needed, allowed in _KINDS if needed <= names.keys() <= allowed | _ANY), None)
        if compute is None:  # tensors are missing or of several kinds
            unexpected.extend(names.values())
        else:
            deltas[component, module] = LayerDelta(
                layer=layer, names=names, file=file, compute=compute, alpha=alpha, use_rslora=use_rslora
            )
    if not deltas:
        raise RequestError(
            f"{path} is not a LoRA or LyCORIS file; it has tensors such as '{next(iter(file.shapes), 'none')}'"
        )
    return LoraFile(deltas=deltas, unexpected_keys=tuple(unexpected))


def _settings(file: TensorFile) -> Mapping[str, Any]:
    """Read diffusers' settings in the file, or peft's adapter_config.json next to it, for alphas without tensors."""
    config = file.path.with_name("adapter_config.json")
    try:
        if "lora_adapter_metadata" in file.metadata:
            found = json.loads(file.metadata["lora_adapter_metadata"])
        elif file.path.name == "adapter_model.safetensors" and config.is_file():
            found = json.loads(config.read_text(encoding="utf-8"))
        else:
            return {}
    except (OSError, ValueError, RecursionError):
        raise RequestError(f"{file.path}: its settings are not JSON; save it again") from None
    return cast("Mapping[str, Any]", found) if isinstance(found, dict) else {}


def _alpha_from_config(settings: Mapping[str, Any], component: str, layer: str) -> tuple[float | None, bool]:
    """Get a layer's alpha, and whether it is divided by the square root of the rank."""

    def setting(name: str) -> Any:
        return settings.get(f"{component}.{name}", settings.get(name))

    alpha, patterns = setting("lora_alpha"), cast("Mapping[str, Any]", setting("alpha_pattern") or {})
    for pattern, value in patterns.items():
        if layer == pattern or layer.endswith(f".{pattern}"):
            alpha = value
    return (float(alpha) if isinstance(alpha, (int, float)) else None), bool(setting("use_rslora"))
