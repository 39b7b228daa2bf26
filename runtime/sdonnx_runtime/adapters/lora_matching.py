"""Matching of a LoRA file with a model: each tensor counts once, or is left over with the reason."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from sdonnx_runtime.adapters.lora import ParameterDelta
from sdonnx_runtime.adapters.lora_keys import (
    DIFFUSERS_BLOCK,
    ORIGINAL_BLOCK,
    describe_unsupported,
    known_names,
    parse_name,
    precedence,
)
from sdonnx_runtime.adapters.lora_kinds import BIASES, find_kind
from sdonnx_runtime.adapters.peft_config import PeftConfig
from sdonnx_runtime.files.tensor_file import TensorFile

_Spellings = dict[str, dict[str, str]]
"""A layer's tensors by parameter, for each of its names in a file."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """What a file changes in a model."""

    deltas: Mapping[tuple[str, str], ParameterDelta]
    """By component and parameter, such as ``mid_block.attentions.0.proj_in.weight``."""
    left_over: Mapping[str, str]
    """Tensors that can't be applied, and what they are."""


def match_file(file: TensorFile, model: str, parameters: Mapping[str, Collection[str]], keys: Collection[str]) -> Match:
    """Match a file's tensors named ``keys`` with a model's parameters by component.

    Raises:
        RequestError: peft's settings of the file are damaged or not supported.
    """
    return _Matching(file=file, model=model, parameters=parameters, config=PeftConfig.read(file)).match(keys)


@dataclass(frozen=True, kw_only=True)
class _Matching:
    file: TensorFile
    model: str
    parameters: Mapping[str, Collection[str]]
    config: PeftConfig
    left_over: dict[str, str] = field(default_factory=dict[str, str])

    def match(self, keys: Collection[str]) -> Match:
        deltas: dict[tuple[str, str], ParameterDelta] = {}
        has_diffusers_blocks = any(map(DIFFUSERS_BLOCK.search, keys))
        for (component, module), spellings in self._group(keys).items():
            if has_diffusers_blocks and all(map(ORIGINAL_BLOCK.search, spellings)):
                reason = "have original names, in a file with diffusers' names for other layers"
                self._leave(spellings.values(), reason)
            else:
                made = self._make_deltas(component, module, *self._join(spellings))
                deltas |= {(component, delta.parameter): delta for delta in made}
        return Match(deltas=deltas, left_over=self.left_over)

    def _group(self, keys: Collection[str]) -> dict[tuple[str, str], _Spellings]:
        """Group the tensors by layer of the model."""
        names = {component: known_names(_modules(each)) for component, each in self.parameters.items()}
        groups: dict[tuple[str, str], _Spellings] = defaultdict(lambda: defaultdict(dict))
        for key in keys:
            name = parse_name(key)
            module = None if name is None else names.get(name.component, {}).get(name.module)
            if name is None or module is None:
                reason = "are of no known kind" if name is None else f"match no layer of {self.model}"
                self.left_over[key] = describe_unsupported(key) or reason
            elif ".embeddings." in module:
                self.left_over[key] = "are of an embedding layer"
            elif name.parameter in groups[name.component, module][name.layer]:
                self.left_over[key] = "are there twice"
            else:
                groups[name.component, module][name.layer][name.parameter] = key
        return groups

    def _join(self, spellings: _Spellings) -> tuple[str, dict[str, str]]:
        """Join a layer's tensors under its names; of several complete adapters, diffusers' names go first."""
        kinds = {layer: find_kind(tensors) for layer, tensors in spellings.items()}
        complete = [layer for layer, kind in kinds.items() if kind is not None and kind.change is not None]
        complete = complete or [layer for layer, tensors in spellings.items() if not BIASES.isdisjoint(tensors)]
        complete.sort(key=precedence)
        for layer in complete[1:]:
            if precedence(layer) == precedence(complete[0]):
                self._leave([spellings[layer]], f"are there twice, also as '{complete[0]}'")
        chosen = complete[0] if complete else next(iter(spellings))
        joined = dict(spellings[chosen])
        for layer, tensors in spellings.items():
            if layer != chosen and layer not in complete:
                self._leave([{name: key for name, key in tensors.items() if name in joined}], "are there twice")
                joined = {**tensors, **joined}
        return chosen, joined

    def _make_deltas(
        self, component: str, module: str, layer: str, keys: Mapping[str, str]
    ) -> Iterator[ParameterDelta]:
        """Make the deltas of a layer's weight and bias."""
        kind = find_kind(keys)
        if kind is None:
            self._leave([keys], "make no known kind of adapter together")
            return
        delta = ParameterDelta(
            file=self.file, layer=layer, keys=keys, kind=kind, component=component, module=module, config=self.config
        )
        if kind.change is not None:
            yield delta
        if f"{module}.bias" in self.parameters[component]:
            if kind.changes_bias(keys):
                yield replace(delta, is_bias=True)
        else:
            only_bias = {name: key for name, key in keys.items() if name in BIASES}
            self._leave([only_bias], f"change a bias, which the layer of {self.model} doesn't have")

    def _leave(self, tensors: Iterable[Mapping[str, str]], reason: str) -> None:
        self.left_over.update({key: reason for each in tensors for key in each.values()})


def _modules(parameters: Iterable[str]) -> Iterable[str]:
    return dict.fromkeys(name.rpartition(".")[0] for name in parameters)


_FAMILIES: Mapping[str, str] = {
    r"sdxl|stable-diffusion-xl-v1-base": "sdxl", r"sd_?v?1|stable-diffusion-v1": "sd1",
    r"sd_?v?2|stable-diffusion-v2": "sd2",
}  # fmt: skip
"""Beginnings of what trainers' metadata and ModelSpec say that a file is for, and the family."""


def claimed_family(metadata: Mapping[str, str]) -> str | None:
    """Get the family that a file says that it is for; None if it names none that is known."""
    for name in ("ss_base_model_version", "modelspec.architecture"):
        value = metadata.get(name, "").strip().lower()
        for start, family in _FAMILIES.items():
            if re.match(start, value):
                return family
    return "sd2" if metadata.get("ss_v2") == "True" else None
