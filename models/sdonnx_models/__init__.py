"""The models that come with sdonnx: one directory each, beside this file."""

from pathlib import Path


def bundled() -> dict[str, Path]:
    """The packages in this distribution by name."""
    return {path.parent.name: path.parent for path in sorted(Path(__file__).parent.glob("*/sdonnx.json"))}
