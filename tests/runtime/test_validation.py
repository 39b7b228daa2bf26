"""Validation is cheap to import."""

import subprocess
import sys


def test_validation_imports_no_runtime():
    code = (
        "import sys, sdonnx_runtime.validation\n"
        "assert not [name for name in sys.modules if name.startswith(('onnxruntime', 'sdonnx_runtime.execution'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
