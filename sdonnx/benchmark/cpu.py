"""The CPU's name and its instruction set, for reports."""

import ctypes
import platform
from collections.abc import Iterable
from pathlib import Path

from sdonnx_runtime.execution.cpu import cpu_features, read_for_platform, read_proc_field, run_command

UNKNOWN = "unknown"

_X86 = (
    ("AMX", {"amx_int8"}),
    ("AVX-512 with VNNI", {"avx512_vnni", "avx512vnni"}),
    ("AVX2 with VNNI", {"avx_vnni", "avxvnni"}),
    ("AVX-512 without VNNI", {"avx512bw"}),
    ("AVX2 without VNNI", {"avx2"}),
    ("no AVX2", {"sse2"}),
)
_ARM = (
    ("Arm with int8 matrix multiplication", {"i8mm", "feat_i8mm"}),
    ("Arm with dot product", {"asimddp", "feat_dotprod"}),
    ("Arm without dot product", {"asimd", "advsimd", "neon"}),
)
"""The instruction sets that ONNX Runtime chooses its kernels by, best first, with their names on Linux and macOS."""


def cpu_name() -> str:
    """Return the CPU's name, or ``unknown``."""
    readers = {
        "linux": _linux_name,
        "darwin": lambda: run_command("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"),
        "win32": _windows_name,
    }
    return read_for_platform(readers) or platform.processor() or UNKNOWN


def instruction_set() -> str:
    """Return the best instruction set for int8 that the CPU and ONNX Runtime have, such as "AVX-512 with VNNI".

    Windows does not report VNNI; what can't be known is ``unknown``.
    """
    return read_for_platform({"win32": _windows_instruction_set}) or best_isa(cpu_features())


def best_isa(features: Iterable[str]) -> str:
    """Return the best instruction set of a CPU's features, in lower case; ``unknown`` if none is known."""
    present = set(features)
    return next((name for name, spellings in _X86 + _ARM if spellings & present), UNKNOWN)


def _linux_name() -> str:
    name = read_proc_field(Path("/proc/cpuinfo"), "model name", "Hardware")
    return name or Path("/proc/device-tree/model").read_text(encoding="utf-8").strip("\0")


def _windows_name() -> str:
    import winreg

    path = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
    with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path) as key:
        return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()


def _windows_instruction_set() -> str:
    has = ctypes.windll.kernel32.IsProcessorFeaturePresent
    if platform.machine().upper() == "ARM64":
        return best_isa(["asimddp" if has(43) else "asimd"])  # PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
    if has(41):  # PF_AVX512F_INSTRUCTIONS_AVAILABLE
        return "AVX-512, VNNI unknown"
    return "AVX2, VNNI unknown" if has(40) else UNKNOWN  # PF_AVX2_INSTRUCTIONS_AVAILABLE
