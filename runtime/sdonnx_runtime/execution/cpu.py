"""The CPUs that this process may use, and their features, as the system lists them."""

import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.execution.control_groups import cgroup_cpus

_EXACT_INT8 = {"amx_int8", "avx512_vnni", "avx512vnni", "avx_vnni", "avxvnni"}
"""Features of x86 with which int8 products are summed in int32, by their names on Linux and macOS."""


def int8_saturates() -> bool:
    """Whether the fastest int8 kernels may saturate: on x86 without VNNI, or where that is unknown."""
    return platform.machine().lower() in ("x86_64", "amd64", "x86") and not _EXACT_INT8 & cpu_features()


def usable_cpus() -> int:
    """The logical CPUs that this process may use, by its affinity and its control groups."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = read_for_platform({"linux": lambda: str(cgroup_cpus())})
    return max(1, cpus if quota in ("", "inf") else min(cpus, math.ceil(float(quota))))


def check_threads(threads: int | None) -> None:
    """Raise RequestError if there are not that many CPUs: more threads than CPUs are slower."""
    cpus = usable_cpus()
    if threads is not None and (type(threads) is not int or not 1 <= threads <= cpus):
        raise RequestError(f"threads is {threads!r}; give a whole number from 1 to {cpus}, the CPUs that can be used")


def cpu_features() -> set[str]:
    """The CPU's features in lower case, such as "avx2"; empty where they are unknown, as on Windows."""
    readers = {"linux": lambda: read_proc_field(Path("/proc/cpuinfo"), "flags", "Features"), "darwin": _macos_features}
    return set(read_for_platform(readers).lower().split())


def read_for_platform(readers: dict[str, Callable[[], str]]) -> str:
    """Call this system's reader; empty if there is none, or it fails."""
    reader = readers.get(sys.platform)
    try:
        return "" if reader is None else reader()
    except (OSError, AttributeError, ValueError, subprocess.SubprocessError):
        return ""


def read_proc_field(path: Path, *keys: str) -> str:
    """The value of the first of the ``keys`` in a file of lines "key : value"; empty if there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() in keys), "")


def run_command(*command: str) -> str:
    """The output of a system command, without white space around it."""
    return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()


def _macos_features() -> str:
    """The keys of hw.optional that are 1, without their prefixes: "avx2_0", "arm.FEAT_DotProd"."""
    pairs = (line.partition(":") for line in run_command("/usr/sbin/sysctl", "hw.optional").splitlines())
    present = [key for key, _, value in pairs if value.strip() == "1"]
    return " ".join(key.rsplit(".", 1)[1].removesuffix("_0") for key in present if "." in key)
