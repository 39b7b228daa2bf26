"""What is said of libraries that are missing or can't be loaded, from causes as systems and libraries print them."""

import importlib
import importlib.machinery
import subprocess
import sys

import pytest
from sdonnx_runtime.errors import DeviceError
from sdonnx_runtime.execution.ort import load_onnxruntime
from sdonnx_runtime.libraries import required

import sdonnx

NUMPY = """
try:
    raise RuntimeError("module was compiled against NumPy C-API version 0x10 (NumPy 1.23) but the running is 0x13")
except RuntimeError as error:
    raise ImportError("\\n\\nIMPORTANT: PLEASE READ THIS FOR ADVICE ON HOW TO SOLVE THIS ISSUE!\\n") from error
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Makes a library of some Python code, and imports it."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(code, name="broken_library"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        with required("pip install it", error=sdonnx.ExportError, purpose="this test"):
            importlib.import_module(name)

    return make


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            ImportError("cannot import name 'x' from 'sdonnx_runtime.request'", name="sdonnx_runtime.request"),
            "sdonnx is installed, but can't be loaded (cannot import name 'x' from 'sdonnx_runtime.request'); "
            "reinstall it: pip install it",
        ),
        (
            ModuleNotFoundError("No module named '_lzma'", name="_lzma"),
            "this Python lacks its module _lzma; install one that is whole",
        ),
    ],
)
def test_a_mixed_installation_and_an_incomplete_python(failure, message):
    with pytest.raises(sdonnx.SdonnxError) as raised, required("pip install it"):
        raise failure
    assert str(raised.value) == message


def test_a_missing_library_is_to_be_installed(library):
    with pytest.raises(sdonnx.ExportError) as failure:
        library("import no_such_library")
    assert str(failure.value) == "this test requires no_such_library, which is not installed; pip install it"


@pytest.mark.parametrize(
    ("code", "cause", "remedy"),
    [
        (
            "raise ImportError('DLL load failed while importing onnx: The specified module could not be found.')",
            "DLL load failed while importing onnx: The specified module could not be found",
            "Visual C++ Redistributable",
        ),
        ("raise OSError('[WinError 126] Error loading \"C:/torch/lib/c10.dll\"')", "c10.dll", "Visual C++"),
        (
            "raise ImportError('libcudart.so.12: cannot open shared object file: No such file or directory')",
            "libcudart.so.12: cannot open shared object file",
            "CUDA and cuDNN",
        ),
        ("raise ImportError('libGL.so.1: cannot open shared object file')", "libGL.so.1", "package of your system"),
        (NUMPY, "compiled against NumPy C-API version 0x10", "fits your numpy"),
        ("raise ImportError('/lib/libm.so.6: version `GLIBC_2.38\\' not found')", "GLIBC_2.38", "newer system"),
        ("import json; json.no_such_name", "no_such_name", "reinstall it: pip install it"),
        ("raise SystemError('initialization of x raised unreported exception')", "unreported", "reinstall it"),
        ("from . import native", "partially initialized", "has the name of a library"),
    ],
)
def test_a_library_that_can_not_be_loaded_keeps_its_cause(code, cause, remedy, library):
    with pytest.raises(sdonnx.ExportError) as failure:
        library(code)
    text = str(failure.value)
    assert text.startswith("broken_library is installed, but can't be loaded (")
    assert cause in text
    assert remedy in text
    assert "\n" not in text


def test_a_truncated_extension_module(tmp_path, library):
    extension = tmp_path / f"damaged_extension{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    extension.write_bytes(b"\x7fELF")
    with pytest.raises(sdonnx.ExportError, match=rf"installed, but can't be loaded \(.*{extension.name}"):
        library("import damaged_extension")


def test_ctrl_c_is_not_a_broken_library(library):
    with pytest.raises(KeyboardInterrupt):
        library("raise KeyboardInterrupt")


def test_what_remains_of_onnxruntime_after_another_of_its_wheels_was_removed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", type(sys)("onnxruntime"))
    with pytest.raises(DeviceError, match=r"ONNX Runtime is installed, but can't be loaded.*sdonnx\[cpu\]"):
        load_onnxruntime()


def test_the_command_line_says_in_one_line_that_numpy_is_broken(tmp_path):
    (tmp_path / "numpy.py").write_text("raise ImportError('libopenblas.so.0: cannot open shared object file')")
    ran = subprocess.run(
        [sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv.pop()); import sdonnx.__main__ as m; m.main()",
         tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: numpy is installed, but can't be loaded (libopenblas.so.0")
    assert len(ran.stderr.splitlines()) == 1
