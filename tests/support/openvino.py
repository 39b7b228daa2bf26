"""OpenVINO's plugin, made to list its CPU device on any maker's CPU."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import onnxruntime

FOLDER = "SDONNX_OPENVINO"
"""The environment variable for the folder where pip has put onnxruntime-ep-openvino: `auto` does not find it there."""

MODULE = "onnxruntime_ep_openvino"

_LIBRARY = "libonnxruntime_providers_openvino_plugin.so"
_INTEL = 0x8086

_TEXT = '''"""Stands for OpenVINO's plugin."""


def get_library_path():
    """Its library, which loads the plugin's."""
    return {path!r}
'''


def missing():
    """What OpenVINO's CPU device needs and isn't there; None if all is."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return f"{FOLDER} does not name the folder of onnxruntime-ep-openvino (see CONTRIBUTING.md)"
    if not Path(folder, MODULE).is_dir():
        return f"{folder} has no onnxruntime-ep-openvino"
    if not _is_intel() and (not Path(folder, MODULE, _LIBRARY).is_file() or shutil.which("gcc") is None):
        return "OpenVINO's plugin lists no CPU device on this CPU; gcc builds what lets it, on Linux"
    return None


def _is_intel():
    """Whether ONNX Runtime finds that the CPU is Intel's."""
    devices = [each.device for each in onnxruntime.get_ep_devices()]
    return any((each.type.name, each.vendor_id) == ("CPU", _INTEL) for each in devices)


def find_plugin(directory):
    """The folder where Python finds OpenVINO's plugin; on a CPU that it doesn't list, one made in a directory.

    The module there has the plugin's name; its library is the plugin's, behind `openvino_cpu.c`.
    """
    folder = Path(os.environ[FOLDER]).resolve()
    if _is_intel():
        return folder
    library, module = directory / "libopenvino_cpu.so", directory / MODULE / "__init__.py"
    source = Path(__file__).with_name("openvino_cpu.c")
    defined = f'-DPLUGIN="{folder / MODULE / _LIBRARY}"'
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", defined, "-o", library, source], check=True)
    module.parent.mkdir()
    module.write_text(_TEXT.format(path=str(library)), encoding="utf-8")
    return directory


@contextmanager
def installed(folder):
    """Have Python find the plugin in a folder, as if pip had just installed it."""
    sys.path.insert(0, str(folder))
    try:
        import_module(MODULE)
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(MODULE, None)


@contextmanager
def openvino_process(folder, compiled):
    """A process whose sessions run on OpenVINO; gives a function that calls another in there.

    ``compiled`` is the directory of its compiled graphs.
    """
    search = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(search), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(compiled)}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_search, initargs=(search[0],)) as pool:
        with patch.dict(os.environ, settings):
            pool.submit(os.getpid).result()
        yield lambda function, *arguments, **options: pool.submit(function, *arguments, **options).result()


def _search(folder):
    """What multiprocessing gives a process to search comes before PYTHONPATH."""
    sys.path.insert(0, folder)
