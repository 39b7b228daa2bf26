"""peft's settings of an adapter file, which has them in its metadata or in adapter_config.json next to it."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.files.json_file import load_json
from sdonnx_runtime.files.tensor_file import TensorFile

_METHODS = ("LORA", "LOHA", "LOKR", "IA3")
"""Methods of peft that are supported."""

_CHANGED_MODEL = re.compile(r"pissa|olora|corda|lora_ga|loftq|mica")
"""Initializations that also change the model, which the file doesn't have."""

_PLAIN_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The settings of a file."""

    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Of all components, or of each behind its name and a dot; empty if the file has none."""

    @classmethod
    def read(cls, file: TensorFile) -> "PeftConfig":
        """Read the settings of a file.

        Raises:
            RequestError: they are damaged, or of a method that isn't supported.
        """
        path = file.path.with_name("adapter_config.json")
        try:
            if "lora_adapter_metadata" in file.metadata:
                found = json.loads(file.metadata["lora_adapter_metadata"])
            elif file.path.stem == "adapter_model" and path.is_file():
                found = load_json(path)
            else:
                return cls()
        except (OSError, ValueError, RecursionError):
            raise RequestError(f"{file.path}: its settings are not JSON; save it again") from None
        if not isinstance(found, dict):
            raise RequestError(f"{file.path}: its settings are not a JSON object; save it again")
        values = cast("Mapping[str, Any]", found)
        for name, value in values.items():
            _check_setting(f"{file.path}", name.rpartition(".")[2], value)
        return cls(values=values)

    def strength(self, component: str, module: str, rank: int | None) -> float:
        """The factor on a module's difference: alpha by the rank, or by its square root (rsLoRA, arXiv:2312.03732).

        ``rank`` is that of its tensors; None if they have none.
        """
        alpha = self._of_module("alpha_pattern", component, module)
        for name in ("lora_alpha", "alpha"):
            alpha = self._get(component, name) if alpha is None else alpha
        if rank is None:
            rank = self._of_module("rank_pattern", component, module) or self._get(component, "r")
        if alpha is None or not rank:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if self._get(component, "use_rslora") else rank)

    def _get(self, component: str, name: str) -> Any:
        return self.values.get(f"{component}.{name}", self.values.get(name))

    def _of_module(self, name: str, component: str, module: str) -> Any:
        """A module's value in a setting by patterns, of which the first that matches counts."""
        patterns = cast("Mapping[str, Any]", self._get(component, name) or {})
        for pattern, value in patterns.items():
            plain = pattern.removeprefix("^").removesuffix("$").replace("\\", "")
            if module == plain or (not pattern.startswith("^") and module.endswith(f".{plain}")):
                return value
        return None


def _check_setting(path: str, name: str, value: Any) -> None:
    """Refuse a setting that is damaged, or that changes what the tensors mean."""
    if name == "peft_type" and str(value).upper() not in _METHODS:
        raise RequestError(f"{path} is of peft's method {json.dumps(value)[:40]}; supported are {', '.join(_METHODS)}")
    numbers: list[Any] = [value] if name in ("r", "alpha", "lora_alpha") and value is not None else []
    if name in ("alpha_pattern", "rank_pattern") and value is not None:
        patterns = cast("Mapping[str, Any]", value if isinstance(value, dict) else {"": None})
        numbers = list(patterns.values())
        other = next((pattern for pattern in patterns if pattern and not _PLAIN_PATTERN.fullmatch(pattern)), None)
        if other is not None:
            raise RequestError(f"{path}: {name} has the expression {json.dumps(other)[:80]}; expected names of layers")
    if not all(type(number) in (int, float) and math.isfinite(number) and number >= 0 for number in numbers):
        raise RequestError(
            f"{path}: its setting {name} is {json.dumps(value)[:80]}; expected numbers: save the file again"
        )
    if name == "init_lora_weights" and isinstance(value, str) and _CHANGED_MODEL.match(value):
        raise RequestError(
            f"{path} was trained with init_lora_weights={json.dumps(value)[:40]}, which changes the model too; "
            "convert it with peft's save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
