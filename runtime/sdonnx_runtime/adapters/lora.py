"""Adapters of weights, LoRA (arXiv:2106.09685) and its kin: what a file of them says, and what becomes of a weight."""

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

MAX_SCALE = 100.0


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A file of adapters, and how strongly they are applied."""

    path: Path
    """A ``.safetensors`` file: LoRA, LoCon, LoHa, LoKr or DoRA, as kohya's, diffusers', peft's or LyCORIS's trainers
    write it."""
    scale: float = 1.0
    """-100 to 100; 0 is as if it were not there."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or abs(self.scale) > MAX_SCALE:
            raise RequestError(f"the LoRA {self.path} has the scale {self.scale}; give a number from -100 to 100")

    @classmethod
    def of(cls, given: "AnyLora") -> "Lora":
        """A file, with its scale where that isn't 1."""
        if isinstance(given, Lora):
            return given
        path, scale = given if isinstance(given, tuple) else (given, 1.0)
        return cls(path=Path(path), scale=scale)


AnyLora: TypeAlias = Lora | tuple[Path | str, float] | Path | str
"""What `Lora.of` takes."""


def find_lora(folder: Path | None, name: str, scale: float) -> Lora:
    """What a prompt means by ``<lora:name:scale>``: a file in a folder or in one within it.

    Raises:
        RequestError: there is no folder, or not one file of that name in it.
    """
    if folder is None:
        raise RequestError(
            f"the prompt has <lora:{name}:{scale:g}>, but there is no folder to look in; give it with --lora-dir "
            "(lora_folder=)"
        )
    found = sorted(path for path in folder.rglob("*.safetensors") if path.stem == name)
    if len(found) != 1:
        said = "no" if not found else f"{len(found)} files"
        raise RequestError(f"{folder} has {said} {name}.safetensors, which the prompt names; give one of its files")
    return Lora(path=found[0], scale=scale)


@dataclass(frozen=True, kw_only=True)
class LayerDelta:
    """What one file does to one layer."""

    layer: str
    """As the file calls it."""
    names: Mapping[str, str]
    """Tensors' names in the file by the values of PARAMETERS."""
    file: TensorFile
    alpha: float | None
    """What the file says of it beside its tensors; None is nothing."""
    by_root: bool
    """Whether alpha is divided by the rank's square root, arXiv:2312.03732."""

    @property
    def kind(self) -> str | None:
        """One of _KINDS; None where tensors are missing, or of several kinds."""
        kinds = [kind for kind, (needed, allowed) in _TENSORS.items() if needed <= self.names.keys() <= allowed]
        return kinds[0] if kinds else None

    def __call__(self, weight: Array, scale: float) -> Array:
        """What becomes of a weight (out, n), of an n that is the product of its other sizes.

        Raises:
            RequestError: the layer has another size.
        """
        tensors = {name: self.file.read(key) for name, key in self.names.items()}
        try:
            difference = _KINDS[str(self.kind)](tensors)
            if difference.size != weight.size or len(difference) != len(weight):
                raise ValueError(f"are for {difference.size} weights of {len(difference)} outputs")
            difference = difference.reshape(weight.shape)
            difference *= np.float32(self._strength(tensors))
            difference = _directed(weight, difference, tensors)
        except (ValueError, KeyError) as error:
            raise RequestError(
                f"{self.file.path}: the tensors of '{self.layer}' don't fit the model's {weight.size} weights of "
                f"{len(weight)} outputs ({error}); take one that was made for this kind of model"
            ) from None
        difference *= np.float32(scale)
        difference += weight
        return difference

    def _strength(self, tensors: Tensors) -> float:
        """``alpha / rank``, or 1 where there is no alpha, or no rank."""
        alpha = float(tensors["alpha"].reshape(-1)[0]) if "alpha" in tensors else self.alpha
        ranks = [len(tensors[name]) for name in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b") if name in tensors]
        if alpha is None or not ranks:
            return 1.0
        return alpha / (math.sqrt(ranks[0]) if self.by_root else ranks[0])


def _low_rank(tensors: Tensors) -> Array:
    """LoRA, and LoCon (arXiv:2309.14859) with or without a kernel in the middle: (out, in * k * k)."""
    down = tensors["down"]
    if "mid" in tensors:
        down = np.einsum("mnkl,ni->mikl", tensors["mid"], _flat(down))
    return _flat(tensors["up"]) @ _flat(down)


def _hadamard(tensors: Tensors) -> Array:
    """LoHa (arXiv:2108.06098): the product, element by element, of two matrices of low rank."""
    first, second = (
        _through(tensors.get(f"hada_t{index}"), tensors[f"hada_w{index}_a"], tensors[f"hada_w{index}_b"])
        for index in (1, 2)
    )
    first *= second
    return _flat(first)


def _kronecker(tensors: Tensors) -> Array:
    """LoKr (arXiv:2212.10650): the Kronecker product of two matrices or kernels, either of which may be of low rank."""
    first, second = (
        tensors[name]
        if (name := f"lokr_w{index}") in tensors
        else _through(tensors.get(f"lokr_t{index}"), tensors[f"{name}_a"], tensors[f"{name}_b"])
        for index in (1, 2)
    )
    return _flat(np.kron(first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)), second))


def _through(core: Array | None, a: Array, b: Array) -> Array:
    """``a @ b``; or a kernel of its core (r, r, k, k), of ``a`` (r, out) and ``b`` (r, in)."""
    if core is None:
        return (a @ _flat(b)).reshape(len(a), *b.shape[1:])
    return np.einsum("ijkl,jr,ip->prkl", core, b, a)


def _difference(tensors: Tensors) -> Array:
    """All of it."""
    return _flat(tensors["difference"])


def _directed(weight: Array, difference: Array, tensors: Tensors) -> Array:
    """The difference; of DoRA (arXiv:2402.09353) that to the sum with the norms that were trained.

    There is one for each output, or for each input.
    """
    norms = tensors.get("output_norms", tensors.get("norms"))
    if norms is None:
        return difference
    difference = np.ascontiguousarray(difference)
    difference += weight
    by_output = "output_norms" in tensors or len(norms) == len(weight)
    places = difference.reshape(len(weight), 1 if by_output else norms.size, -1)
    squares = [np.square(row).sum(axis=1) for row in places]  # (outputs, inputs), of a row at a time: it may be large
    found = np.sqrt(squares if by_output else np.sum(squares, axis=0, keepdims=True))
    places *= (norms.reshape(found.shape) / found)[:, :, None]
    difference -= weight
    return difference


def _flat(data: Array) -> Array:
    return data.reshape(len(data), -1)


_KINDS: Mapping[str, Callable[[Tensors], Array]] = {
    "lora": _low_rank,
    "loha": _hadamard,
    "lokr": _kronecker,
    "difference": _difference,
}

_ANY = {"alpha", "norms", "output_norms"}
_HADA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_TENSORS: Mapping[str, tuple[set[str], set[str]]] = {
    "lora": ({"down", "up"}, {"down", "up", "mid", *_ANY}),
    "loha": (_HADA, {*_HADA, "hada_t1", "hada_t2", *_ANY}),
    "lokr": (set(), {name for name in PARAMETERS.values() if name.startswith("lokr_")} | _ANY),
    "difference": ({"difference"}, {"difference", *_ANY}),
}
"""Which tensors each of _KINDS has to have, and which it may have."""


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """What a file has."""

    changes: Mapping[tuple[str, str], LayerDelta]
    """By component, and by module as `known_names` spells them."""
    strange: tuple[str, ...]
    """Names of tensors that no kind of adapter has."""


def read_lora(path: Path) -> LoraFile:
    """A ``.safetensors`` file of adapters.

    Raises:
        RequestError: it can't be read, is damaged, or has no adapters.
    """
    file = open_safetensors(path)
    layers: dict[str, dict[str, str]] = defaultdict(dict)
    strange: list[str] = []
    for name in file.shapes:
        layer, parameter = split_name(name) or ("", "")
        if parameter == "":
            strange.append(name)
        else:
            layers[layer][parameter] = name
    settings = _settings(file)
    changes: dict[tuple[str, str], LayerDelta] = {}
    for layer, names in layers.items():
        place = split_component(layer)
        alpha, by_root = _told(settings, place[0], layer)
        change = LayerDelta(layer=layer, names=names, file=file, alpha=alpha, by_root=by_root)
        if change.kind is None:
            strange.extend(names.values())
        else:
            changes[place] = change
    if not changes:
        raise RequestError(
            f"{path} has no LoRA, LoHa or LoKr of any layer, but such as '{next(iter(file.shapes), 'nothing')}'; "
            "give a file of adapters"
        )
    return LoraFile(changes=changes, strange=tuple(strange))


def _settings(file: TensorFile) -> Mapping[str, Any]:
    """What diffusers says within a file, or peft beside it; alphas are there where tensors say nothing of them."""
    beside = file.path.with_name("adapter_config.json")
    try:
        if "lora_adapter_metadata" in file.metadata:
            found = json.loads(file.metadata["lora_adapter_metadata"])
        elif file.path.name == "adapter_model.safetensors" and beside.is_file():
            found = json.loads(beside.read_text(encoding="utf-8"))
        else:
            return {}
    except (OSError, ValueError, RecursionError):
        raise RequestError(f"{file.path}: its settings are no JSON; save it again") from None
    return cast("Mapping[str, Any]", found) if isinstance(found, dict) else {}


def _told(settings: Mapping[str, Any], component: str, layer: str) -> tuple[float | None, bool]:
    """A layer's alpha, and whether it is divided by the rank's square root."""

    def setting(name: str) -> Any:
        return settings.get(f"{component}.{name}", settings.get(name))

    alpha, patterns = setting("lora_alpha"), cast("Mapping[str, Any]", setting("alpha_pattern") or {})
    for pattern, value in patterns.items():
        if layer == pattern or layer.endswith(f".{pattern}"):
            alpha = value
    return (float(alpha) if isinstance(alpha, (int, float)) else None), bool(setting("use_rslora"))
