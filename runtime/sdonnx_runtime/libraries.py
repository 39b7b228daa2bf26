"""Errors of libraries that are missing, or there and can't be loaded."""

import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from traceback import walk_tb

from sdonnx_runtime.errors import SdonnxError

_REMEDIES = {
    r"DLL load failed|WinError (126|127|1114)": "install the Microsoft Visual C++ Redistributable (x64), 2019 or later",
    r"lib(cuda|cu(blas|dart|dnn|fft|rand|solver)|nv)": "install the CUDA and cuDNN that this version was built for",
    r"lib\S+\.(so|dylib)\S*: cannot open|Library not loaded": "install the package of your system that has this file",
    r"numpy.* size changed|(?i:compiled (using|against) (numpy|ABI))": "install a version that fits your numpy",
    r"GLIBC|CXXABI": "it was built for a newer system; install an older version of it",
    r"ELF|Exec format|architecture|WinError 193|Win32": "it was built for another kind of CPU; install it anew",
    r"partially initialized|circular import": "a file or folder of yours has the name of a library; rename it",
}
"""What helps, by what the cause says."""

_TITLES = {"onnxruntime": "ONNX Runtime"}
_OWN = ("sdonnx", "importlib", "_frozen_importlib")


@contextmanager
def required(install: str, *, error: type[SdonnxError] = SdonnxError, purpose: str = "") -> Generator[None, None, None]:
    """Import libraries within; what goes wrong becomes an ``error`` that tells a missing library from a broken one.

    Args:
        install: the command that installs them.
        error: the type of the error.
        purpose: what requires them, "downloading a model", say.
    """
    try:
        yield
    except Exception as failure:  # loading a library runs any code: OSError, AttributeError, SystemError, ...
        raise error(_describe(failure, install, purpose)) from None


def _describe(failure: Exception, install: str, purpose: str) -> str:
    if isinstance(failure, ModuleNotFoundError) and failure.name is not None and "." not in failure.name:
        if failure.name in sys.stdlib_module_names:
            return f"this Python lacks its module {failure.name}; install one that is whole"
        library = _TITLES.get(failure.name, failure.name)
        subject = f"{purpose} requires {library}, which" if purpose else library
        return f"{subject} is not installed; {install}"
    library, cause = _library(failure), _cause(failure)
    known = (text for pattern, text in _REMEDIES.items() if re.search(pattern, cause))
    remedy = next(known, f"reinstall it: {install}")
    return f"{library} is installed, but can't be loaded ({cause}); {remedy}"


def _library(failure: Exception) -> str:
    """The library that was being imported: the first in the traceback that is neither sdonnx nor Python's own."""
    frames = [frame for frame, _ in walk_tb(failure.__traceback__)][2:]  # without `required` and the one that imports
    modules = [str(frame.f_globals.get("__name__", "")) for frame in frames]
    modules.append((failure.name if isinstance(failure, ImportError) else None) or "a library")
    name = next((module for module in modules if module and not module.startswith(_OWN)), "sdonnx").partition(".")[0]
    return _TITLES.get(name, name)


def _cause(failure: BaseException) -> str:
    """The message of the first exception, in one line."""
    while (earlier := failure.__cause__ or (None if failure.__suppress_context__ else failure.__context__)) is not None:
        failure = earlier
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()] or [type(failure).__name__]
    return lines[0].rstrip(".")[:300]
