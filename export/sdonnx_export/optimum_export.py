"""The optimum route, the only one that uses torch; it is imported on first use."""

from pathlib import Path

from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.libraries import required


def export_with_optimum(source: str, directory: Path, revision: str | None) -> None:
    """Trace a checkpoint with optimum-onnx into ``directory``.

    Raises:
        ExportError: optimum is not installed or can't export the checkpoint.
    """
    with required('pip install "sdonnx[torch]"', error=ExportError, purpose="--via optimum"):
        from optimum.exporters.onnx import main_export
    try:
        main_export(source, directory, task="text-to-image", revision=revision or "main", do_validation=False)
    except Exception as error:
        raise ExportError(f"optimum can't export {source}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
