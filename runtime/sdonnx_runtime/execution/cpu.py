"""The machine that this runs on: its CPU, the instructions that decide how fast int8 is, the memory taken so far."""

import ctypes
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

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
"""What ONNX Runtime chooses its kernels by, best first, and how Linux and macOS call it."""


def cpu_name() -> str:
    """What the CPU calls itself, or ``unknown``."""
    readers = {"linux": _linux_name, "darwin": lambda: _sysctl("machdep.cpu.brand_string"), "win32": _windows_name}
    return read_for_platform(readers) or platform.processor() or UNKNOWN


def instruction_set() -> str:
    """The best instruction set for int8 that the CPU has of those that ONNX Runtime knows, such as "AVX-512 with VNNI".

    Windows does not say whether there is VNNI; what can't be known is ``unknown``.
    """
    readers = {
        "linux": lambda: best_isa(_linux_field("flags", "Features").split()),
        "darwin": lambda: best_isa(_macos_features()),
        "win32": _windows_instruction_set,
    }
    return read_for_platform(readers) or UNKNOWN


def int8_saturates() -> bool:
    """Whether the fastest 8-bit kernels may run over: x86 without VNNI, or where that can't be known."""
    found = instruction_set()
    return platform.machine().lower() in ("x86_64", "amd64", "x86") and "with VNNI" not in found and found != "AMX"


def best_isa(features: Iterable[str]) -> str:
    """The best of a CPU's features, given as /proc/cpuinfo or sysctl write them; ``unknown`` where none is known."""
    present = {feature.lower() for feature in features}
    return next((name for name, spellings in _X86 + _ARM if spellings & present), UNKNOWN)


def read_for_platform(readers: dict[str, Callable[[], str]]) -> str:
    """What this system's reader gives; empty where there is none, or it fails."""
    reader = readers.get(sys.platform)
    try:
        return "" if reader is None else reader()
    except (OSError, AttributeError, ValueError, subprocess.SubprocessError):
        return ""


def read_proc_field(path: Path, *keys: str) -> str:
    """What follows the first of the ``keys`` in a file of lines "key : value"; empty where there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() in keys), "")


def _linux_field(*keys: str) -> str:
    return read_proc_field(Path("/proc/cpuinfo"), *keys)


def _linux_name() -> str:
    device_tree = Path("/proc/device-tree/model")
    return _linux_field("model name", "Hardware") or device_tree.read_text(encoding="utf-8").strip("\0")


def _sysctl(name: str) -> str:
    command = ["/usr/sbin/sysctl", "-n", name]
    return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()


def _macos_features() -> list[str]:
    """Names that hw.optional says 1 of, without their prefixes: "avx2_0", "arm.FEAT_DotProd"."""
    command = ["/usr/sbin/sysctl", "hw.optional"]
    listing = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    present = [key for key, _, value in (line.partition(":") for line in listing.splitlines()) if value.strip() == "1"]
    return [key.rsplit(".", 1)[1].removesuffix("_0") for key in present if "." in key]


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
