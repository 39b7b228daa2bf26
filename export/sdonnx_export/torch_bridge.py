"""Everything that uses torch: pickled checkpoints and the optimum route. Torch is imported on first use only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import ExportError

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}


def load_pickled(path: Path) -> dict[str, tuple[tuple[int, ...], str, Callable[[], AnyArray]]]:
    """Load a pickled file with ``weights_only`` and return each tensor's shape, dtype and reader.

    Raises:
        ExportError: torch is not installed, or the file is damaged or contains more than weights.
    """
    try:
        import torch
    except ImportError:
        raise ExportError(
            f"""{path} is a pickle, which requires torch; pip install "sdonnx[torch]", or use .safetensors"""
        ) from None
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ExportError(
            f"{path} is damaged or contains more than weights ({_first_line(error)}); use .safetensors"
        ) from None

    def reader(tensor: Any) -> Callable[[], AnyArray]:
        return lambda: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    return {
        str(name): (
            tuple(tensor.shape),
            _DTYPES.get(str(tensor.dtype).removeprefix("torch."), "?"),
            reader(tensor),
        )
        for name, tensor in _flatten(loaded).items()
        if isinstance(tensor, torch.Tensor)
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _flatten(loaded: Any) -> dict[str, Any]:
    """The state dict, with the entries of nested dicts such as "string_to_param", and ``global_step``."""
    if not isinstance(loaded, dict):
        return {}
    import torch

    state = dict(loaded.get("state_dict", loaded))
    for name, value in list(state.items()):
        if isinstance(value, dict):
            state |= {f"{name}.{key}": inner for key, inner in value.items()}
    if isinstance(loaded.get("global_step"), int):
        state["global_step"] = torch.tensor(loaded["global_step"])
    return state


def export_with_optimum(source: str, directory: Path, revision: str | None) -> None:
    """Trace a checkpoint with optimum-onnx into ``directory``.

    Raises:
        ExportError: optimum is not installed or can't export the checkpoint.
    """
    try:
        from optimum.exporters.onnx import main_export
    except ImportError:
        raise ExportError("""--via optimum requires optimum-onnx and torch; pip install "sdonnx[torch]\"""") from None
    try:
        main_export(source, directory, task="text-to-image", revision=revision or "main", do_validation=False)
    except Exception as error:
        raise ExportError(f"optimum can't export {source}: {_first_line(error)}") from None
