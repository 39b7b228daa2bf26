"""What needs torch: pickled checkpoints and the optimum route; nothing else imports it, and this only when called."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdonnx_runtime.arrays import AnyArray
from sdonnx_runtime.errors import ExportError

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}


def load_pickled(path: Path) -> dict[str, tuple[tuple[int, ...], str, Callable[[], AnyArray]]]:
    """Shape, dtype and reader of each tensor in a pickled file, which is loaded with ``weights_only``.

    Raises:
        ExportError: torch is not installed, or the file is damaged or holds more than weights.
    """
    try:
        import torch
    except ImportError:
        raise ExportError(
            f"""{path} is pickled, which takes torch to read; pip install "sdonnx[torch]", or use .safetensors"""
        ) from None
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(f"{path} is damaged or holds more than weights ({reason}); use .safetensors") from None
    state = _flat(loaded)

    def reader(tensor: Any) -> Callable[[], AnyArray]:
        return lambda: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    return {
        str(name): (
            tuple(tensor.shape),
            _DTYPES.get(str(tensor.dtype).removeprefix("torch."), "?"),
            reader(tensor),
        )
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor)
    }


def _flat(loaded: Any) -> dict[str, Any]:
    """The weights, with those in a dictionary such as "string_to_param", and the training's step."""
    if not isinstance(loaded, dict):
        return {}
    import torch

    state = dict(loaded.get("state_dict", loaded))
    for name, found in list(state.items()):
        if isinstance(found, dict):
            state |= {f"{name}.{key}": value for key, value in found.items()}
    if isinstance(loaded.get("global_step"), int):
        state["global_step"] = torch.tensor(loaded["global_step"])
    return state


def export_with_optimum(source: str, directory: Path, revision: str | None) -> None:
    """Traces a checkpoint with optimum-onnx into ``directory``.

    Raises:
        ExportError: optimum is not installed, or can't export it.
    """
    try:
        from optimum.exporters.onnx import main_export
    except ImportError:
        raise ExportError("""--via optimum needs optimum-onnx and torch; pip install "sdonnx[torch]\"""") from None
    try:
        main_export(source, directory, task="text-to-image", revision=revision or "main", do_validation=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(f"optimum can't export {source}: {reason}") from None
